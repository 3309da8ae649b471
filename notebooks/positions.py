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
# # Positions
#
# Attention by itself does not know an order. Sinusoids and learned vectors are added to the embeddings, RoPE turns
# queries and keys, ALiBi lowers the scores of far keys, and a causal model may do without any. What do they have in
# common, what does each cost at equal training, and what happens beyond the length of training? The models are tiny
# (two layers of width 64, texts of 64 tokens); what is decided here is decided at this size only.

# %%
import math
import tempfile
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import notebook_tools as tools  # in this notebook's folder
import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

import llama_jax
from llama_jax.ablation.statistics import t_interval
from llama_jax.models import Compute, from_params
from llama_jax.nn import Alibi, LearnedPositions, Rope, SinusoidalPositions

tools.style()
folder = Path(tempfile.mkdtemp(prefix="positions_"))

# %% [markdown]
# ## Sinusoids: a shift is a rotation
#
# Vaswani et al. (2017) chose sines and cosines of geometric frequencies because PE(pos + k) is a linear function of
# PE(pos). Each pair (sin wp, cos wp) is turned by the angle wk, whatever p is: the matrix below has one such rotation
# for each frequency, and depends on k alone.

# %%
WIDTH, POSITIONS, SHIFT = 64, 200, 17
positions = jnp.arange(POSITIONS)[None]
encoding = np.asarray(SinusoidalPositions().build(WIDTH, rngs=None)(positions))[0].astype(np.float64)
matrix = np.zeros((WIDTH, WIDTH))
for i in range(WIDTH // 2):
    angle = SHIFT * 10000 ** (-2 * i / WIDTH)
    cos, sin = np.cos(angle), np.sin(angle)
    matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[cos, sin], [-sin, cos]]
error = np.abs(encoding[:-SHIFT] @ matrix.T - encoding[SHIFT:]).max()
print(f"largest |M PE(pos) - PE(pos + {SHIFT})| over {POSITIONS - SHIFT} positions: {error:.1e}")
print(f"M is orthogonal up to {np.abs(matrix @ matrix.T - np.eye(WIDTH)).max():.1e}")

# %%
fig, (left, right) = plt.subplots(1, 2, layout="constrained")
image = left.imshow(encoding.T, aspect="auto", cmap="RdBu", vmin=-1, vmax=1)
left.set(xlabel="position", ylabel="dimension", title="PE(pos)")
fig.colorbar(image, ax=left, ticks=(-1, 0, 1))
products = encoding @ encoding.T
for position, style in ((20, "-"), (100, "--"), (180, ":")):
    right.plot(np.arange(POSITIONS) - position, products[position], style, label=f"pos = {position}")
right.set(xlabel="k", ylabel="PE(pos) · PE(pos + k)", xlim=(-60, 60))
right.legend()
plt.show()

# %% [markdown]
# ## RoPE: scores depend on the distance
#
# RoPE (Su et al. 2021) turns the pairs of a query at position m by the angles of m, and those of a key by n. Their
# product then depends on n - m alone: the same query and key, at the same distance, from any place on.

# %%
rope = Rope(theta=10000.0, scaling=None)
query, key = np.random.default_rng(0).standard_normal((2, 1, 1, 1, WIDTH)).astype(np.float32)


def score(m: int, n: int) -> float:
    """The product of the query at position m and the key at position n."""
    turned = [rope.rotate(jnp.asarray(x), jnp.array([[place]])) for x, place in ((query, m), (key, n))]
    return float(jnp.vdot(*turned))


for distance in (0, 3, 50):
    scores = [score(m, m - distance) for m in (50, 100, 1000, 5000)]
    print(f"distance {distance:2}: from 50, 100, 1000, 5000 on", " ".join(f"{s:9.4f}" for s in scores))

# %% [markdown]
# With the distance the angles of the pairs spread, and the mean of the scores falls: fast at first, more slowly with a
# larger theta. A scaling stretches the curve. `rope_decay` computes it from the frequencies.

# %%
TRAINED, FACTOR = 64, 4  # the length of training, and how many times longer the texts below are
llama_jax.inspect.rope_decay({"theta 100": Rope(100.0, None), "theta 10,000": rope}, 256, head_dim=WIDTH).plot()

# %% [markdown]
# ## Trained alike
#
# Five positions, the same seeds, batches and first values of shared parameters. RoPE is the baseline. Sinusoids are
# added to embeddings times the square root of the width, as in their paper: smaller ones drown in them. The table of
# learned positions has a row for each position of the longer texts, of which training sees the first quarter. The
# column tokens/s of the table is of runs one after another: on a machine that does other work it says little.

# %%
config = tools.small(
    {
        "sequence_length": TRAINED,
        "global_batch_size": tools.full(16, quick=4),
        "model.max_positions": TRAINED * FACTOR,
    }
)
no_rope = {"model.attention.rope": None}
variants = {
    "RoPE": {},
    "sinusoids": no_rope | {"model.positions": SinusoidalPositions, "model.embedding_scale": WIDTH**0.5},
    "learned": no_rope | {"model.positions": LearnedPositions},
    "ALiBi": no_rope | {"model.position_bias": Alibi},
    "none": no_rope,
}
variants = tools.few(variants, "RoPE", "ALiBi")
sweep = llama_jax.ablate(
    config,
    variants,
    seeds=tools.full(4, quick=2),
    steps=tools.full(150, quick=4),
    run_dir=folder / "sweep",
)
sweep

# %%
sweep.plot()

# %% [markdown]
# ## Beyond the training length
#
# Now the trained models read held-out texts of four times the length of training. The loss at a position is the mean
# over the texts; bands are t intervals over seeds. Where a model uses what it reads, the loss falls with the position.

# %%
runs = {name: [llama_jax.open_run(t.directory) for t in sweep.record.trials_of(name)] for name in variants}
tokenizer = runs["RoPE"][0].load().tokenizer
held_out = "".join(runs["RoPE"][0].dataset.texts("validation"))
ROWS, LONG = tools.full(256, quick=8), TRAINED * FACTOR
ids = np.array(tokenizer.encode(held_out[:1_000_000])[: ROWS * (LONG + 1)])
rows = ids[: len(ids) // (LONG + 1) * (LONG + 1)].reshape(-1, LONG + 1)
models = {name: [run.load().model for run in found] for name, found in runs.items()}
by_position = {
    name: np.array([tools.losses_by_position(model, rows) for model in found]) for name, found in models.items()
}


# %%
def draw(curves: dict[str, np.ndarray]) -> None:
    """Losses [seeds, LONG] by name over the position, as means of 16 positions."""
    _, ax = plt.subplots(layout="constrained")
    for number, (name, values) in enumerate(curves.items()):
        means = values.reshape(len(values), -1, 16).mean(2)
        mean, low, high = t_interval(means.T)
        places = 8 + 16 * np.arange(len(mean))
        ax.plot(places, mean, marker="osD^v"[number % 5], markersize=4, color=f"C{number}", label=name)
        ax.fill_between(places, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
    ax.axvline(TRAINED, color="gray", linestyle="--", linewidth=1)
    ax.set(xlabel=f"position (training ends at {TRAINED})", ylabel="loss (nats per token)", xlim=(0, LONG))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    plt.show()


draw(by_position)

# %% [markdown]
# The claim "extrapolates" is taken as: beyond the training length the loss is no more than 0.02 nats above that of the
# second half of it, where as much can be read. A model that does not use what it reads does so in vain: the claim is
# judged only where the loss is below that of the tokens' frequencies in these texts, the best that such a model can do.


# %%
def excess(values: np.ndarray, start: int, stop: int) -> tuple[float, float]:
    """The t interval over seeds of the mean loss from `start` to `stop`, minus that of the second half of training."""
    inside = values[:, TRAINED // 2 : TRAINED].mean(1)
    _, low, high = t_interval(values[:, start:stop].mean(1) - inside)
    return float(low), float(high)


counts = np.bincount(rows[:, 1:].ravel())
shares = counts[counts > 0] / counts.sum()
blind = -(shares * np.log(shares)).sum()
print(f"loss of the frequencies: {blind:.3f} nats per token")
for name, values in by_position.items():
    text = f"{name} extrapolates (loss at {LONG // 2} to {LONG}, minus that at {TRAINED // 2} to {TRAINED})"
    if t_interval(values[:, TRAINED // 2 : TRAINED].mean(1))[2] < blind:
        tools.claim(text, excess(values, LONG // 2, LONG), (-math.inf, 0.02), "nats")
    else:
        print(f"{text}\n    not judged: it does not use what it reads")

# %% [markdown]
# ## Scaling RoPE after training
#
# The frequencies of a trained model can be changed: divided by the factor (linear), by a larger theta (NTK-aware), or
# the slow ones only and with sharper attention (YaRN). The weights stay as they are, without another step of training.

# %%
scalings = {
    "as trained": {},
    "linear": {"attention.rope.scaling": "LinearScaling", "attention.rope.scaling.factor": FACTOR},
    "NTK": {"attention.rope.scaling": "NTKScaling", "attention.rope.scaling.factor": FACTOR},
    "YaRN": {
        "attention.rope.scaling": "YarnScaling",
        "attention.rope.scaling.factor": FACTOR,
        "attention.rope.scaling.original_max_positions": TRAINED,
    },
}


def scaled(model, changes):
    """The model with other frequencies."""
    return from_params(llama_jax.override(model.config, changes), model.params(), Compute(dtype="float32"))


scalings = tools.few(scalings, "as trained", "YaRN")
stretched = {
    name: np.array([tools.losses_by_position(scaled(m, s), rows) for m in models["RoPE"]])
    for name, s in scalings.items()
}
draw(stretched)

# %%
for name, values in stretched.items():
    beyond = excess(values, LONG // 2, LONG)
    text = f"RoPE, {name}, extrapolates (loss at {LONG // 2} to {LONG}, minus that at {TRAINED // 2} to {TRAINED})"
    tools.claim(text, beyond, (-math.inf, 0.02), "nats")
    if name != "as trained":
        gain = t_interval((values - stretched["as trained"])[:, LONG // 2 :].mean(1))[1:]
        tools.claim(f"{name} helps beyond (loss minus that as trained)", gain, (-math.inf, 0), "nats")

# %% [markdown]
# ## Attention by distance
#
# How much of its attention does a query give to a key at a distance? Mean weights over layers, heads, seeds and queries
# of the second half of training's length, relative to equal shares over the keys that the query sees.

# %%
fig, ax = plt.subplots(layout="constrained")
queries = np.arange(TRAINED // 2, TRAINED)
for number, (name, found) in enumerate(models.items()):
    weights = [llama_jax.inspect.attention_maps(m, rows[:8, :TRAINED]).weights.mean((0, 1, 2)) for m in found]
    weights = np.mean(weights, 0) * (np.arange(TRAINED) + 1)[:, None]
    by_distance = [weights[queries, queries - distance].mean() for distance in range(TRAINED // 2)]
    ax.plot(by_distance, marker="osD^v"[number % 5], markersize=3, label=name)
ax.axhline(1, color="gray", linestyle="--", linewidth=1)
ax.set(xlabel="distance (tokens)", ylabel="attention / equal share", yscale="log")
ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()
