"""Where guesses of tokens pay: the time of a pass that checks k guesses beside that of a pass over one token.

A text grows by 1 + r tokens in a pass where r guesses are right. So guesses that cost nothing themselves pay where r is
above the ratio of the two times less 1: the table has this r. Random weights, float32, by turns in one process.

python benchmarks/speculation.py
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
from works import LLAMA56M, STORIES15M

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).parent / "peers")]
from ours import COMPUTE, model_config, weights  # noqa: E402

from llama_jax.models import Model, from_params  # noqa: E402
from llama_jax.sampling.loop import logits_of  # noqa: E402

SHAPES = {"15M": STORIES15M, "56M": LLAMA56M}
PLACE, LENGTH = 64, 256  # of the first of the tokens, and of the cache
PASSES = 16  # in one call


def passes(module: Any, tokens: jax.Array) -> jax.Array:
    """Run passes over [B, T], each over the best tokens of the one before."""
    cache, lengths = module.init_cache(len(tokens), LENGTH, None), jnp.full(len(tokens), PLACE)

    def one(_: jax.Array, state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        hidden, cache = module.extend(state[0], cache=state[1], lengths=lengths)
        return logits_of(module, hidden).argmax(-1), cache

    return jax.lax.fori_loop(0, PASSES, one, (tokens, cache))[0]


def times(model: Model, rows: int, guesses: list[int], rounds: int) -> list[float]:
    """Return the median seconds of a pass for each number of guesses."""
    seconds: list[list[float]] = [[] for _ in guesses]
    for i in range(rounds + 1):
        for k, found in zip(guesses, seconds, strict=True):
            start = time.perf_counter()
            model.run(passes, jnp.ones((rows, 1 + k), jnp.int32)).block_until_ready()
            if i:  # the first compiles
                found.append((time.perf_counter() - start) / PASSES)
    return [statistics.median(found) for found in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare passes that check guesses with a pass over one token.")
    parser.add_argument("--guesses", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    table = Table("weights", "rows", "1 token (ms)", *(f"{k} guesses (right ones that pay)" for k in args.guesses))
    for name, work in SHAPES.items():
        dense = from_params(model_config(work), weights(work), COMPUTE)
        for form, model in ((f"{name} float32", dense), (f"{name} int8", dense.quantized("int8"))):
            for rows in args.rows:
                one, *more = times(model.for_decoding, rows, [0, *args.guesses], args.rounds)
                found = [f"{t * 1e3:.2f} ms ({t / one - 1:.2f})" for t in more]
                table.add_row(form, str(rows), f"{one * 1e3:.2f}", *found)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    main()
