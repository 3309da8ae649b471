"""What a checkpoint costs a run: how long a save keeps the steps waiting, and how fast a run is restored.

    python benchmarks/checkpoint.py [--layers 12] [--rounds 5] [--directory DIR]

The state is a Llama-like decoder's with AdamW's moments, in float32: 1.1 GB with 12 layers of width 768. Each round
takes steps with nothing under way, saves, takes steps until the checkpoint has its manifest, and restores it as a run
does that is continued: its files are compared with the manifest, then loaded. The files are dropped from the page cache
before they are compared, and before the plain reading of the same files, which is the disk's rate.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent / "peers"))
from ours import batch, model_config

from llama_jax.__main__ import TUNABLES
from llama_jax.checkpoint import CheckpointConfig, CheckpointStore
from llama_jax.checkpoint.steps import damage
from llama_jax.models import Compute, abstract_params, initialize
from llama_jax.run.skipped import check_finite
from llama_jax.training import AdamW, Hyper, TrainState, init_state, make_train_step

LENGTH, STEPS, EVERY = 128, 4, CheckpointConfig().every_steps or 1000
CHUNK = 1 << 22  # bytes of a plain reading
SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "num_heads": 12,
    "num_kv_heads": 12,
    "head_dim": 64,
    "intermediate_size": 2048,
    "tie_embeddings": True,
}


class Turns:
    """Wall and processor seconds of what is measured, by name."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[float, float]]] = {}

    def __call__[T](self, name: str, work: Callable[[], T]) -> T:
        wall, processor = time.perf_counter(), time.process_time()
        result = work()
        spent = time.perf_counter() - wall, time.process_time() - processor
        self.found.setdefault(name, []).append(spent)
        return result

    def medians(self, name: str) -> tuple[float, float]:
        wall, processor = zip(*self.found[name], strict=True)
        return statistics.median(wall), statistics.median(processor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="of width 768")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="on the disk to measure (default: that of temporary files)")
    args = parser.parse_args()
    config = model_config(SHAPE | {"num_layers": args.layers})
    hyper = AdamW(learning_rate=1e-3, warmup_steps=1).hyper(1000, 0)
    train_step = make_train_step(config, Compute(scan_layers=True))
    state = init_state(initialize(config, 0), hyper)
    abstract = jax.eval_shape(lambda params: init_state(params, hyper), abstract_params(config))
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    turns = Turns()
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        store = CheckpointStore(folder, CheckpointConfig(keep_last=1, keep_best=0))
        for number in range(1 + args.rounds):
            turns = turns if number > 1 else Turns()  # the first round compiles
            state = save(turns, store, train_step, state, hyper)
            restore(turns, store, abstract)
        files = [file for file in Path(folder).rglob("*") if file.is_file()]
    print(
        f"a state of {size / 1e9:.2f} GB; {os.cpu_count()} cores, medians of {args.rounds} rounds, {len(files)} files"
    )
    table = Table("", "seconds", "of processor", "GB/s")
    for name in turns.found:
        wall, processor = turns.medians(name)
        rate = "" if "step" in name else f"{size / 1e9 / wall:.2f}"
        table.add_row(name, f"{wall:.3f}", f"{processor:.3f}", rate)
    Console().print(table)
    (step, of_step), (_, of_saved) = turns.medians("a step"), turns.medians("a save, until it is on disk")
    blocked = sum(turns.medians(name)[0] for name in ("look for NaN", "save returns"))
    print(f"a save blocks the steps for {blocked / (EVERY * step):.3%} of the time of {EVERY} steps")
    print(f"all that it takes of the processor is {(of_saved / of_step) / EVERY:.3%} of theirs")


def take_step(train_step: Callable[..., Any], state: TrainState, hyper: Hyper) -> TrainState:
    state, metrics = train_step(state, batch(np.ones((1, LENGTH), np.int32)), hyper)
    jax.block_until_ready(metrics)
    return state


def save(
    turns: Turns, store: CheckpointStore, train_step: Callable[..., Any], state: TrainState, hyper: Hyper
) -> TrainState:
    """Take steps, save the state, and take more until it is on disk, and once without steps."""
    for _ in range(STEPS):
        state = turns("a step", lambda state=state: take_step(train_step, state, hyper))
    step = int(state.step)
    turns("look for NaN", lambda: check_finite(state, step, store))
    turns("save returns", lambda: store.save(state))
    while store._saving is not None and not store._saving[1].done():
        state = turns("a step during a save", lambda state=state: take_step(train_step, state, hyper))
    state = take_step(train_step, state, hyper)

    def whole() -> None:
        store.save(state)
        store.wait()

    turns("a save, until it is on disk", whole)
    return state


def restore(turns: Turns, store: CheckpointStore, abstract: TrainState) -> None:
    step = store.steps()[-1]
    place = store.directory / str(step)
    drop(place)
    turns("plain reading", lambda: read(place))
    drop(place)
    turns("compare with the manifest", lambda: damage(place, step))
    turns("load", lambda: jax.block_until_ready(store.load(step, abstract)))


def drop(place: Path) -> None:
    """Remove the files from the page cache."""
    for file in place.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(place: Path) -> None:
    buffer = memoryview(bytearray(CHUNK))
    for file in place.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass


if __name__ == "__main__":
    if TUNABLES.keys().isdisjoint(os.environ):  # as `train` starts itself
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | TUNABLES)
    main()
