"""Many shards at once, by processes of our own."""

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llama_jax.config import UserError, to_json
from llama_jax.data.config import DataConfig
from llama_jax.data.objectives import Causal
from llama_jax.data.readers import Unit
from llama_jax.data.shards import ShardSet, make_shard
from llama_jax.tokenizers import Tokenizer, load_tokenizer

# Each process has one thread: there are as many of them as cores.
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "LLAMA_JAX_TOKENIZER_THREADS": "1"}


def make_shards(
    shard_set: ShardSet,
    shards: Mapping[int, list[Unit]],
    config: DataConfig,
    tokenizer: Tokenizer,
    num_workers: int,
    progress: Callable[[int], None],
) -> None:
    """Makes all `shards`, each in one of `num_workers` processes; those that are finished stay whatever happens.

    Programs of their own, because multiprocessing would import the user's script again or fork a process that has
    JAX's threads. Raises UserError for what a process could not make, and where one ended.
    """
    with tempfile.TemporaryDirectory(prefix="llama_jax-tokenizer-") as directory:
        path = tokenizer.save(directory)
        if load_tokenizer(path).fingerprint != tokenizer.fingerprint:
            raise UserError("this tokenizer cannot be saved and loaded as it is: prepare with num_workers=1")
        job = {
            "directory": str(shard_set.directory.absolute()),
            "key": shard_set.key,
            "tokenizer": str(path),
            # Without the objective, of which shards know nothing: it may be a notebook's own class.
            "config": to_json(dataclasses.replace(config, objective=Causal())),
        }
        with _workers(min(num_workers, len(shards)), job) as workers:
            _hand_out(workers, shards, progress)


class _Worker:
    """A process and the shard that it is at."""

    def __init__(self, job: dict[str, Any], replies: queue.SimpleQueue):
        program = [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))]  # -P: its folder has no modules
        self.process = subprocess.Popen(
            program,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=os.environ | ONE_THREAD,
        )  # fmt: skip
        self.shard: int | None = None
        self.done = 0
        self._listener = threading.Thread(target=self._listen, args=(replies,), daemon=True)
        self._listener.start()
        self.tell(job)

    def tell(self, message: object) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: the listener says so
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def _listen(self, replies: queue.SimpleQueue) -> None:
        assert self.process.stdout is not None
        try:
            for line in self.process.stdout:
                replies.put((self, json.loads(line)))
        except ValueError:  # half a line: it was killed
            self.process.kill()
        replies.put((self, {"ended": self.process.wait()}))

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self._listener.join()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


@contextlib.contextmanager
def _workers(count: int, job: dict[str, Any]) -> Iterator[tuple[list[_Worker], queue.SimpleQueue]]:
    replies: queue.SimpleQueue = queue.SimpleQueue()
    workers: list[_Worker] = []
    try:
        for _ in range(count):
            workers.append(_Worker(job, replies))
        yield workers, replies
    finally:
        for worker in workers:
            worker.stop()


def _hand_out(
    started: tuple[list[_Worker], queue.SimpleQueue],
    shards: Mapping[int, list[Unit]],
    progress: Callable[[int], None],
) -> None:
    workers, replies = started
    waiting = iter(shards.items())
    finished = 0  # bytes
    left = len(shards)

    def next_shard(worker: _Worker) -> None:
        if (found := next(waiting, None)) is not None:
            worker.shard, units = found
            worker.tell({"shard": worker.shard, "units": [dataclasses.astuple(unit) for unit in units]})

    for worker in workers:
        next_shard(worker)
    while left:
        worker, reply = replies.get()
        if "error" in reply:
            raise UserError(reply["error"])
        if "ended" in reply:
            raise UserError(
                f"a process that made shard {worker.shard} ended with code {reply['ended']}: start again, the shards "
                "that are finished are kept (-9: it was killed, perhaps for its memory; try a smaller num_workers)"
            )
        if "done" in reply:
            finished += sum(unit.size for unit in shards[worker.shard])
            worker.done = 0
            left -= 1
            next_shard(worker)
        else:
            worker.done = reply["bytes"]
        progress(finished + sum(worker.done for worker in workers))


def serve(lines: Iterator[str], reply: Callable[[dict[str, Any]], None]) -> None:
    """A worker's side: the job is the first of `lines`, every other a shard to make."""
    from llama_jax.config import from_json
    from llama_jax.data.files import CorpusFile

    job = json.loads(next(lines))
    tokenizer = load_tokenizer(job["tokenizer"])
    config = from_json(DataConfig, job["config"])
    shard_set = ShardSet(Path(job["directory"]), job["key"], tokenizer.fingerprint)
    for line in lines:
        message = json.loads(line)
        units = [Unit(CorpusFile(*file), index, count) for file, index, count in message["units"]]
        try:
            make_shard(shard_set, message["shard"], units, config, tokenizer, lambda done: reply({"bytes": done}))
        except UserError as error:
            reply({"error": str(error)})
        else:
            reply({"done": message["shard"]})
