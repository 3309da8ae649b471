# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart
#
# Train a small Llama, look inside, replace one of its pieces and train it again. Nothing is downloaded: the text is the
# interpreter's own standard library.

# %%
import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import notebook_tools as tools  # in this notebook's folder
import numpy as np
import rich

import llama_jax
from llama_jax.nn import FeedForward, FeedForwardModule, Projection, child

tools.style()
folder = Path(tempfile.mkdtemp(prefix="quickstart_"))
jax.devices()

# %% [markdown]
# ## A config, with some keys changed
#
# A config is a tree of frozen dataclasses. `load_config` finds `configs/tiny_python.py` by its name and changes some
# dotted keys. A wrong key or value is an error of one sentence.

# %%
config = llama_jax.load_config(
    "tiny_python",
    {
        "model.num_layers": 2,
        "num_steps": 200,
        "logging.every_steps": 1,
        "logging.validate_every_steps": 20,
        "logging.validation_batches": 8,
        "checkpoint.keep_best": 0,  # the last one is enough here
    },
)
config = tools.shrink(config)  # the tests run every cell with hardly any work; here it changes nothing
print(f"{llama_jax.num_parameters(config.model):,} parameters")
rich.print(config.model)

# %%
try:
    llama_jax.override(config, {"model.attention.num_kv_head": 3})
except llama_jax.UserError as error:
    print(error)

# %% [markdown]
# ## Train
#
# `train` does what `python train.py` does: it tokenizes the text once, trains, validates on held-out files and saves
# checkpoints. Called again with the same directory it continues.

# %%
run = llama_jax.train(config, folder / "swiglu")

# %%
metrics = run.metrics()
{name: round(value, 4) for name, value in metrics[-1].items()}

# %%
steps, losses = np.array([(row["step"], row["loss"]) for row in metrics]).T
held_out = np.array([(row["step"], row["val_loss"]) for row in metrics if "val_loss" in row])
WINDOW = tools.full(20, quick=2)
means = np.convolve(losses, np.ones(WINDOW) / WINDOW, mode="valid")

fig, ax = plt.subplots(layout="constrained")
ax.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8, label="training, one batch")
ax.plot(steps[: len(means)] + (WINDOW - 1) / 2, means, color="C0", label=f"training, mean of {WINDOW} steps")
ax.plot(*held_out.T, "o-", color="C1", markersize=4, label="held-out files")
ax.set(xlabel="step", ylabel="loss (nats per token)", xlim=0)
ax.legend()
plt.show()

# %% [markdown]
# A batch has about a thousand tokens, so that the loss of one batch is mostly a matter of which texts it has; the mean
# over neighbouring steps shows the course. The held-out loss is measured on the same batches every time. The first loss
# is near the logarithm of the vocabulary's size, a uniform guess.

# %%
print(f"first loss {losses[0]:.3f}, uniform guess {np.log(config.model.vocab_size):.3f}")
print(f"from batch to batch, last {2 * WINDOW} steps: standard deviation {losses[-2 * WINDOW :].std():.3f}")
print(f"tokens in a batch: {config.global_batch_size * config.sequence_length:,}")

# %% [markdown]
# ## Sample
#
# `load` needs nothing but the directory: config, tokenizer and weights travel together.

# %%
lm = run.load()  # the same as llama_jax.load(folder / "swiglu")
prompt = "def read(self, size):\n"
for text in llama_jax.generate_text(lm, [prompt, prompt], max_new_tokens=48, temperature=0.7, seed=0):
    print(prompt + text, end="\n\n" + "-" * 60 + "\n")

# %% [markdown]
# ## One layer's attention
#
# `llama_jax.inspect` has small functions that take a loaded model and return arrays with a `plot()`. A row is a query,
# and shows how much it takes from each key.

# %%
maps = llama_jax.inspect.attention_maps(lm, "if name in self.names:\n    return self.names[name]")
maps.plot(layer=1)

# %% [markdown]
# ## A feed-forward of your own
#
# A piece is a frozen config and the module that it builds. This one is the squared ReLU of Primer (So et al. 2021),
# `down(relu(up(x))²)`: two matrices where SwiGLU has three, so 1.5 times the width has the same number of parameters.
# Dimensions are named (`embed`, `mlp`), which is all that sharding needs to know.


# %%
@dataclasses.dataclass(frozen=True)
class SquaredReLU(FeedForward):
    """down(relu(up(x))^2) (So et al. 2021).

    intermediate_size: width inside.
    """

    intermediate_size: int

    def build(self, width, *, rngs):
        return SquaredReLUModule(self, width, rngs=rngs)


class SquaredReLUModule(FeedForwardModule):
    def __init__(self, config, width, *, rngs):
        outer, inner = {"embed": width}, {"mlp": config.intermediate_size}
        self.up_proj = Projection(outer, inner, bias=False, rngs=child(rngs, "up_proj"))
        self.down_proj = Projection(inner, outer, bias=False, rngs=child(rngs, "down_proj"))

    def __call__(self, x, *, ctx):
        return self.down_proj(jnp.square(jax.nn.relu(self.up_proj(x)))), {}


# %% [markdown]
# ## Is it better?
#
# One run of each would not say: another seed changes the loss, too. `ablate` trains every variant with several seeds,
# the same order of the data and the same first values of all parameters that variants share, and compares them seed by
# seed. `match` adjusts the width of the feed-forward until both have the same number of parameters.

# %%
sweep = llama_jax.ablate(
    config,
    {"SwiGLU": {}, "squared ReLU": {"model.feed_forward": SquaredReLU}},
    seeds=tools.full(3, quick=2),
    steps=tools.full(100, quick=4),
    match="parameters",
    run_dir=folder / "sweep",
)
sweep

# %%
sweep.plot()

# %% [markdown]
# The difference is an answer only with its interval, and only for this size, this text and so many steps. Where the
# interval has 0 in it, these seeds do not decide; `seeds needed` is how many probably would. The column tokens/s is of
# runs one after another: on a machine that does other work it says little.

# %%
row = sweep.records()[1]
interval = row["difference_low"], row["difference_high"]
tools.claim("Squared ReLU lowers the loss (its loss minus SwiGLU's)", interval, (-np.inf, 0), "nats per token")
