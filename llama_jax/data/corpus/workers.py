"""Shards, or other parts of a corpus, many at once: each made by one of several processes."""

import concurrent.futures
import functools
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import loky
from loky.backend import get_context

from llama_jax.config import UserError
from llama_jax.data.config import DataConfig
from llama_jax.data.corpus.shards import ShardMaker
from llama_jax.data.readers import KINDS, FileKind, added_readers
from llama_jax.data.readers.records import Unit
from llama_jax.tokenizers import load_tokenizer

# Each process has one thread: there are as many of them as cores.
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "LLAMA_JAX_TOKENIZER_THREADS": "1"}
POLL_SECONDS = 0.2

type Work[J] = Callable[[int, J, Callable[[int], None]], None]
"""Does job `number`; the function that it is given takes how much of it is done."""

_work: Work[Any]  # of a worker process, set by `_start`
_updates: Any


def make_shards(
    maker: ShardMaker, shards: Mapping[int, list[Unit]], num_workers: int, progress: Callable[[int], None]
) -> None:
    """Make all `shards` by `num_workers` processes; a finished shard stays whatever happens to the others.

    `progress` is called with the number of bytes that are done. Raises UserError as `make_in_processes` does, and for a
    tokenizer that is another one after it was saved and loaded.
    """
    with tempfile.TemporaryDirectory(prefix="llama_jax-tokenizer-") as directory:
        path = maker.tokenizer.save(directory)  # its libraries' objects cannot be pickled
        if load_tokenizer(path).fingerprint != maker.tokenizer.fingerprint:
            raise UserError("this tokenizer cannot be saved and loaded as it is: prepare with num_workers=1")
        start = functools.partial(_shard_work, maker.directory, maker.key, maker.config, path)
        jobs = {number: (units, sum(unit.size for unit in units)) for number, units in shards.items()}
        make_in_processes("shards", jobs, start, num_workers, progress)


def _shard_work(directory: Path, key: str, config: DataConfig, tokenizer: Path | str) -> Work[list[Unit]]:
    return ShardMaker(directory, key, config, load_tokenizer(tokenizer)).make


def make_in_processes[J](
    what: str,
    jobs: Mapping[int, tuple[J, int]],
    start: Callable[[], Work[J]],
    num_workers: int,
    progress: Callable[[int], None],
) -> None:
    """Do all `jobs`, by number with their sizes, by `num_workers` processes; each calls `start` once.

    `progress` is called with the size that is done. Raises UserError for what a process could not make, and where one
    was killed.
    """
    updates = get_context("loky").SimpleQueue()  # (job, its size that is done)
    # Processes of loky: multiprocessing would import the user's script again, or fork one that has JAX's threads.
    # Loky sends the classes of a notebook too.
    pool = loky.ProcessPoolExecutor(
        num_workers, env=ONE_THREAD, initializer=_start, initargs=(os.getpid(), start, added_readers(), updates)
    )
    try:
        _collect(pool, updates, jobs, progress)
    except loky.process_executor.BrokenProcessPool as error:
        raise UserError(
            f"a process that made {what} ended ({str(error).splitlines()[0]}): start again, the {what} that are "
            "finished are kept (perhaps it was killed for its memory: try a smaller num_workers)"
        ) from None
    finally:
        pool.shutdown(kill_workers=True)


def _collect(
    pool: loky.ProcessPoolExecutor,
    updates: Any,
    jobs: Mapping[int, tuple[Any, int]],
    progress: Callable[[int], None],
) -> None:
    """Let the pool do all jobs, and report their progress."""
    done = dict.fromkeys(jobs, 0)
    waiting = {pool.submit(_make, number, job) for number, (job, _) in jobs.items()}
    while waiting:
        finished, waiting = concurrent.futures.wait(waiting, POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
        while not updates.empty():
            number, size = updates.get()
            done[number] = size
        for future in finished:
            number = future.result()
            done[number] = jobs[number][1]
        progress(sum(done.values()))


def _start(parent: int, start: Callable[[], Work[Any]], readers: list[FileKind], updates: Any) -> None:
    """Prepare a worker process."""
    global _work, _updates
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    os.dup2(2, 1)  # the parent's output is a report, which libraries must not print into
    KINDS.extend(readers)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _work, _updates = start(), updates


def _end_with(parent: int) -> None:
    """End this process when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


def _make(number: int, job: Any) -> int:
    """Do a job in a worker process; return its number."""
    _work(number, job, lambda done: _updates.put((number, done)))
    return number
