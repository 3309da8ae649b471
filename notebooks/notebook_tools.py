"""Helpers of all notebooks: the reduced mode in which the tests run them, and the look of figures.

In the reduced mode (the environment variable LLAMA_JAX_QUICK is set) every cell runs, with hardly any work.
"""

import math
import os
import sys
import tempfile
from pathlib import Path

QUICK = bool(os.environ.get("LLAMA_JAX_QUICK"))


def full[T](value: T, *, quick: T) -> T:
    """Return `value`, in the reduced mode `quick`: `num_steps = full(300, quick=8)`."""
    return quick if QUICK else value


def few[T](variants: dict[str, T], *names: str) -> dict[str, T]:
    """Return `variants`, in the reduced mode those of these names."""
    return {name: variants[name] for name in names} if QUICK else variants


def shrink(config):
    """Return the run config itself, in the reduced mode that of eight steps of two small layers on 30 files."""
    import llama_jax

    small = {
        "model.hidden_size": 64,
        "model.num_layers": 2,
        "model.vocab_size": 512,
        "data.path": [str(Path(os.__file__).parent / "asyncio" / "*.py")],
        "data.cache_dir": str(Path(tempfile.gettempdir()) / "llama_jax_corpora"),
        "tokenizer.vocab_size": 512,
        "num_steps": 8,
        "global_batch_size": 4,
        "sequence_length": 64,
        "logging.every_steps": 1,
        "logging.validate_every_steps": 8,
        "logging.validation_batches": 2,
        "logging.sample_prompts": [],
        "optimizer.warmup_steps": 2,
        "compute.preflight": False,
    }
    return llama_jax.override(config, small) if QUICK else config


def small(changes=None):
    """Return tiny_python's run config with two layers of width 64 and 1,024 tokens a batch, a run of seconds."""
    import llama_jax

    sizes = {
        "model.vocab_size": 1024,
        "tokenizer.vocab_size": 1024,
        "model.hidden_size": 64,
        "model.num_layers": 2,
        "model.attention.num_heads": 8,
        "model.attention.num_kv_heads": 8,
        "model.attention.head_dim": 8,
        "model.feed_forward.intermediate_size": 176,
        "global_batch_size": 8,
        "sequence_length": 128,
        "num_steps": 150,
        "optimizer": "AdamW",
        "optimizer.learning_rate": 4e-3,
        "optimizer.warmup_steps": 20,
        "logging.validate_every_steps": 75,
        "logging.validation_batches": 24,
        "logging.sample_prompts": [],
        "compute.dtype": "float32",
        "compute.preflight": False,
        "checkpoint.every_steps": 10_000,
        "checkpoint.keep_best": 0,
    }
    config = shrink(llama_jax.load_config("tiny_python", sizes))
    return llama_jax.override(config, changes or {})


def by_turns(calls, repeats: int):
    """Return the seconds of each of several functions without arguments, [functions, repeats], called by turns.

    What slows the machine down for a while slows all of them down. Each is called once before.
    """
    import time

    import jax
    import numpy as np

    for call in calls:
        jax.block_until_ready(call())
    times = np.zeros((len(calls), repeats))
    for repeat in range(repeats):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[i, repeat] = time.perf_counter() - start
    return times


def gradient_call(config, tokens):
    """Return a compiled function without arguments: a model's mean loss on tokens [B, T] and its gradient."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import llama_jax

    graph, state = nnx.split(llama_jax.build(config).module)
    tokens = jnp.asarray(tokens, jnp.int32)

    def loss(state):
        scores = jax.nn.log_softmax(nnx.merge(graph, state)(tokens[:, :-1]))
        return -jnp.take_along_axis(scores, tokens[:, 1:, None], 2).mean()

    gradient = jax.jit(jax.value_and_grad(loss))
    return lambda: gradient(state)


def losses_by_position(model, rows, at_once: int = 32):
    """Return a model's mean loss at each position of texts [B, T+1], float64 [T]."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    total = np.zeros(rows.shape[1] - 1)
    for part in np.array_split(rows, -(-len(rows) // at_once)):
        scores = jax.nn.log_softmax(model(part[:, :-1]))
        total -= np.asarray(jnp.take_along_axis(scores, jnp.asarray(part[:, 1:, None]), 2)).sum((0, 2))
    return total / len(rows)


def median_interval(values, level: float = 0.95) -> tuple[float, float]:
    """Return the interval of the median between two of the values: it needs no distribution, and bears outliers."""
    import numpy as np
    from scipy.stats import binom

    outside = int(binom.ppf((1 - level) / 2, len(values), 0.5))
    ordered = np.sort(values)
    return (float(ordered[outside - 1]), float(ordered[-outside])) if outside else (-math.inf, math.inf)


def judge(interval, region) -> str:
    """Return whether a claim holds: that a quantity, of which an interval is known, is in a region (low, high)."""
    (low, high), (least, most) = interval, region
    if least <= low and high <= most:
        return "holds"
    return "does not hold" if high < least or most < low else "not decided at this size"


def claim(text: str, interval, region, unit: str = "") -> None:
    """Print a claim, the interval of its quantity and the region in which the claim puts it, and the judgement."""
    (low, high), (least, most) = interval, region
    claimed = (
        f"above {least:g}"
        if most == math.inf
        else f"below {most:g}"
        if least == -math.inf
        else f"{least:g} to {most:g}"
    )
    measured = " ".join(filter(None, (f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}", unit)))
    print(f"{text}\n    measured {measured}\n    claimed {claimed}: {judge(interval, region)}")


def style() -> None:
    """Set the style of figures: the palette of Okabe and Ito, no frame, pixels enough for a dense screen."""
    import matplotlib.pyplot as plt
    from cycler import cycler

    from llama_jax.figures import COLORS

    look = {
        "axes.prop_cycle": cycler(color=["#{:02x}{:02x}{:02x}".format(*color) for color in COLORS]),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": "medium",
        "figure.figsize": (7, 3.5),
        "image.cmap": "Blues",
        "legend.frameon": False,
    }
    plt.rcParams.update(look)
    if "IPython" in sys.modules:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("retina")
