"""What a checkpoint costs a run: how long a save keeps the steps waiting, and how fast a run is restored.

    python benchmarks/checkpoint.py [--layers 12] [--rounds 5] [--directory DIR]

The state is a Llama-like decoder's with AdamW's moments, in float32: 1.1 GB with 12 layers of width 768. In turns, each
round takes steps with nothing under way, saves, takes steps until the checkpoint has its manifest, and restores it as a
run does that is continued: its files are compared with the manifest, then loaded. Before every reading the files are
dropped from the page cache; the plain reading of the same files is the disk's rate.
"""

import argparse
import contextlib
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from llama_jax.checkpoint import CheckpointConfig, CheckpointStore
from llama_jax.checkpoint.steps import damage
from llama_jax.models import Compute, DecoderConfig, abstract_params, initialize
from llama_jax.nn import GroupedQuery, RMSNorm, Rope, SwiGLU
from llama_jax.run.skipped import check_finite
from llama_jax.training import AdamW, TrainState, init_state, make_train_step

ROWS, LENGTH, STEPS = 1, 128, 8
CHUNK = 1 << 22  # bytes of a plain reading


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="of width 768")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="on the disk to measure (default: that of temporary files)")
    args = parser.parse_args()
    config = DecoderConfig(
        vocab_size=8192,
        hidden_size=768,
        num_layers=args.layers,
        max_positions=LENGTH,
        attention=GroupedQuery(
            num_heads=12,
            num_kv_heads=12,
            head_dim=64,
            rope=Rope(theta=10000.0, scaling=None),
            qkv_bias=False,
            out_bias=False,
        ),
        feed_forward=SwiGLU(intermediate_size=2048, bias=False),
        norm=RMSNorm(eps=1e-5),
        tie_embeddings=True,
    )
    hyper = AdamW(learning_rate=1e-3, warmup_steps=1).hyper(1000, 0)
    state = init_state(initialize(config, 0), hyper)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    step = functools.partial(take_step, make_train_step(config, Compute(scan_layers=True)), hyper)
    abstract = jax.eval_shape(lambda params: init_state(params, hyper), abstract_params(config))
    state = step(state)
    found: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        found.setdefault(name, []).append(time.perf_counter() - began)
        return result

    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        store = CheckpointStore(folder, CheckpointConfig(keep_last=1, keep_best=0))
        for number in range(args.rounds + 1):
            alone = time.perf_counter()
            for _ in range(STEPS):
                state = step(state)
            alone = (time.perf_counter() - alone) / STEPS
            began = time.perf_counter()
            timed("look for NaN", lambda: check_finite(state, int(state.step), store))
            timed("save returns", lambda: store.save(state))
            steps, inside = 0, time.perf_counter()
            while store._saving is not None and not store._saving[1].done():
                state = step(state)
                steps += 1
            now = time.perf_counter()
            store.wait()
            found.setdefault("a step", []).append(alone)
            found.setdefault("on disk", []).append(now - began)
            found.setdefault("the steps meanwhile", []).append(now - inside - steps * alone)
            found.setdefault("all that training waits", []).append(now - began - steps * alone)
            saved = store.steps()[-1]
            place = Path(folder, str(saved))
            drop(place)
            timed("plain reading", lambda: read(place))
            drop(place)
            timed("compare with the manifest", lambda: damage(place, saved))
            timed("load", lambda: jax.block_until_ready(store.load(saved, abstract)))
            drop(place)
            timed("load, not in the page cache", lambda: jax.block_until_ready(store.load(saved, abstract)))
            files = [file for file in place.rglob("*") if file.is_file()]
            stored = sum(file.stat().st_size for file in files)
            if number == 0:
                found.clear()
    console = Console()
    console.print(f"a state of {size / 1e9:.2f} GB, {stored / 1e9:.2f} GB in {len(files)} files on disk")
    table = Table("", "seconds", "from to", "GB/s")
    for name, values in found.items():
        median = statistics.median(values)
        table.add_row(
            name,
            f"{median:.3f}",
            f"{min(values):.3f} to {max(values):.3f}",
            f"{size / 1e9 / median:.2f}" if median > 0 else "",
        )
    console.print(table)


def take_step(train_step: Callable[..., Any], hyper: Any, state: TrainState) -> TrainState:
    tokens = jnp.ones((ROWS, LENGTH), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens, "segment_ids": tokens, "weights": tokens.astype(jnp.float32)}
    batch["positions"] = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), tokens.shape)
    state, metrics = train_step(state, batch, hyper)
    jax.block_until_ready(metrics)
    return state


def drop(place: Path) -> None:
    """Remove the files from the page cache."""
    for file in place.rglob("*"):
        if file.is_file():
            with contextlib.closing(os.fdopen(os.open(file, os.O_RDONLY))) as opened:
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
    main()
