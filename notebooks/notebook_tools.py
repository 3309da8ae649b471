"""Helpers of all notebooks: the reduced mode in which the tests run them, and the look of figures.

In the reduced mode (the environment variable LLAMA_JAX_QUICK is set) every cell runs, with hardly any work.
"""

import os
import sys
import tempfile
from pathlib import Path

QUICK = bool(os.environ.get("LLAMA_JAX_QUICK"))


def full[T](value: T, *, quick: T) -> T:
    """Return `value`, in the reduced mode `quick`: `num_steps = full(300, quick=8)`."""
    return quick if QUICK else value


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
