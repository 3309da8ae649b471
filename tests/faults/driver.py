"""`train`, made to die at a chosen moment: driver.py MOMENT CONFIG [--key value ...].

MOMENT is `kill@N` and `terminate@N` (a signal when the metrics of step N are written), `save@N` (killed when the
checkpoint of step N is whole but does not yet have its name), or `never`.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from llama_jax import __main__ as command_line
from llama_jax.run.reporting import JsonLines


def before(owner: Any, name: str, then: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        then(*args)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def main(moment: str, argv: list[str]) -> int:
    kind, _, step = moment.partition("@")

    def at_metrics(_: Any, metrics: dict[str, Any]) -> None:
        if metrics["step"] == int(step):
            os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGTERM)

    def at_rename(source: Any, *_: Any) -> None:
        if os.fspath(source).rstrip("/").endswith(f"/checkpoints/{step}.orbax-checkpoint-tmp"):
            os.kill(os.getpid(), signal.SIGKILL)

    if kind == "save":
        before(os, "rename", at_rename)
        before(os, "replace", at_rename)
    elif kind != "never":
        before(JsonLines, "write", at_metrics)
    return command_line.main(["train", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
