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
from llama_jax.nn import FeedForward, FeedForwardModule, ForwardContext, Projection, child

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
        "model.num_layers": 3,
        "num_steps": 240,
        "logging.every_steps": 1,
        "logging.validate_every_steps": 20,
        "logging.validation_batches": 16,
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
ax.plot(steps[WINDOW - 1 :], means, color="C0", label=f"training, mean of {WINDOW} steps")
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
# The model is made of plain modules. `lm.model.run` calls a function with them, jitted, on the model's own mesh; the
# function below repeats the first half of a block and stops at the attention weights.


# %%
def attention_weights(module, tokens, layer):
    """[B, T] tokens to [B, N, T, T]: how much each query (row) takes from each key (column)."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = module.embedding(tokens, jnp.float32)
    for i in range(layer):
        x, _, _ = module.layers[i](x, positions=positions, ctx=ForwardContext())
    block = module.layers[layer]
    attention, x = block.attention, block.input_layernorm(x)
    q_BTNH = attention.config.rope.rotate(attention.q_proj(x), positions)
    k_BSKH = attention.config.rope.rotate(attention.k_proj(x), positions)
    num_groups = attention.config.num_heads // attention.config.num_kv_heads
    k_BSNH = jnp.repeat(k_BSKH, num_groups, axis=2)  # query head n reads kv head n // num_groups
    scores = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH) * attention.config.head_dim**-0.5
    return jax.nn.softmax(jnp.where(jnp.tri(tokens.shape[1], dtype=bool), scores, -jnp.inf))


text = "if name in self.names:\n    return self.names[name]"
ids = lm.tokenizer.encode(text, bos=True)
weights = np.asarray(lm.model.run(attention_weights, jnp.array([ids]), layer=1))[0]

stream = lm.tokenizer.stream()
labels = ["BOS"] + [stream.feed(i).replace("\n", "⏎").replace(" ", "·") for i in ids[1:]]
grid = (2, -(-len(weights) // 2))
fig, axes = plt.subplots(*grid, figsize=(11, 8), sharex=True, sharey=True, layout="constrained", squeeze=False)
for head, ax in enumerate(axes.flat[: len(weights)]):
    image = ax.imshow(weights[head], cmap="Blues", vmin=0, vmax=1)
    ax.set_title(f"head {head}", fontsize=9)
    ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
    ax.set_yticks(range(len(labels)), labels, fontsize=6)
fig.supxlabel("key", fontsize=9)
fig.supylabel("query", fontsize=9)
fig.colorbar(image, ax=axes, shrink=0.6, label="attention weight")
plt.show()

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


width = config.model.feed_forward.intermediate_size * 3 // 2
config_2 = llama_jax.override(
    config,
    {
        "model.feed_forward": SquaredReLU(intermediate_size=width),
        "tokenizer.path": str(folder / "swiglu" / "tokenizer"),  # the same tokens, without training it again
    },
)
assert llama_jax.num_parameters(config_2.model) == llama_jax.num_parameters(config.model)

# %% [markdown]
# The saved config names a class that the package does not have, so `components` brings it along. The order of the data
# and the initial values of all other parameters are those of the first run: they depend on the seed, the step and the
# parameter's name, and on nothing else.

# %%
run_2 = llama_jax.train(config_2, folder / "squared_relu", components=(SquaredReLU,))

# %%
fig, ax = plt.subplots(layout="constrained")
for name, one in {"SwiGLU": run, "squared ReLU": run_2}.items():
    measured = np.array([(row["step"], row["val_loss"]) for row in one.metrics() if "val_loss" in row])
    ax.plot(*measured.T, "o-", markersize=4, label=name)
    print(f"{name:14}held-out loss {measured[-1, 1]:.4f}")
ax.set(xlabel="step", ylabel="held-out loss (nats per token)", xlim=0)
ax.legend()
plt.show()

# %% [markdown]
# One run of each. How much another seed would change is not measured here, so the difference does not show which
# feed-forward is better: that takes several seeds, and more than a minute of training.

# %%
lm_2 = llama_jax.load(folder / "squared_relu", components=(SquaredReLU,))
print(lm_2.config.feed_forward, type(lm_2.model.layers[0].feed_forward).__name__)
