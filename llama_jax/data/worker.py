"""A process that makes shards: `python -m llama_jax.data.worker`, with a job and shards as JSON lines on stdin."""

import json
import os
import signal
import sys

from llama_jax.data.workers import serve


def main() -> None:
    """Makes what it is told to until its input ends, as it does when the process that started it has."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; who started us ends us
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no reply

    def reply(message: dict) -> None:
        try:
            replies.write(json.dumps(message) + "\n")
            replies.flush()
        except BrokenPipeError:  # nobody is there any more
            os._exit(1)

    serve(iter(sys.stdin.readline, ""), reply)


if __name__ == "__main__":
    main()
