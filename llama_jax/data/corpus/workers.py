"""Many shards at once, each made by one of several processes."""

import concurrent.futures
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import loky
from loky.backend import get_context

from llama_jax.config import UserError
from llama_jax.data.config import DataConfig
from llama_jax.data.corpus.shards import ShardSet, make_shard
from llama_jax.data.readers.records import Unit
from llama_jax.tokenizers import Tokenizer

# Each process has one thread: there are as many of them as cores.
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "LLAMA_JAX_TOKENIZER_THREADS": "1"}
POLL_SECONDS = 0.2

_job: dict[str, Any] = {}  # of a worker process: what `_start` was given


def make_shards(
    shard_set: ShardSet,
    shards: Mapping[int, list[Unit]],
    config: DataConfig,
    tokenizer: Tokenizer,
    num_workers: int,
    progress: Callable[[int], None],
) -> None:
    """Make all `shards` by `num_workers` processes; a finished shard stays whatever happens to the others.

    `progress` is called with the number of bytes that are done. Processes of loky, because multiprocessing would import
    the user's script again or fork a process that has JAX's threads. Raises UserError for what a process could not
    make, and where one was killed.
    """
    updates = get_context("loky").SimpleQueue()  # (shard, its bytes that are done)
    pool = loky.ProcessPoolExecutor(
        min(num_workers, len(shards)), env=ONE_THREAD, initializer=_start,
        initargs=(os.getpid(), shard_set, config, tokenizer, updates),
    )  # fmt: skip
    done = dict.fromkeys(shards, 0)
    try:
        waiting = {pool.submit(_make, number, units) for number, units in shards.items()}
        while waiting:
            finished, waiting = concurrent.futures.wait(waiting, POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
            while not updates.empty():
                number, size = updates.get()
                done[number] = size
            for future in finished:
                number = future.result()
                done[number] = sum(unit.size for unit in shards[number])
            progress(sum(done.values()))
    except loky.process_executor.BrokenProcessPool as error:
        raise UserError(
            f"a process that made shards ended ({str(error).splitlines()[0]}): start again, the shards that are "
            "finished are kept (perhaps it was killed for its memory: try a smaller num_workers)"
        ) from None
    finally:
        pool.shutdown(kill_workers=True)


def _start(parent: int, *job: Any) -> None:
    """Prepare a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    os.dup2(2, 1)  # the parent's output is a report, which libraries must not print into
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _job.update(zip(("shard_set", "config", "tokenizer", "updates"), job, strict=True))


def _end_with(parent: int) -> None:
    """End this process when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


def _make(number: int, units: list[Unit]) -> int:
    """Make a shard in a worker process; return its number."""
    updates = _job["updates"]
    make_shard(
        _job["shard_set"], number, units, _job["config"], _job["tokenizer"], lambda done: updates.put((number, done))
    )
    return number
