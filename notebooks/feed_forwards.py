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
# # Feed-forwards
#
# Two matrices with ReLU, GELU or SiLU between them, three with a gate (SwiGLU), or several of them of which a router
# chooses for each token (experts). At equal parameters a gated one has two thirds of the width; at equal active FLOPs
# experts have more parameters. What does that do to the loss? The models are tiny (two layers of width 64); what is
# decided here is decided at this size only.

# %%
import math
import tempfile
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import notebook_tools as tools  # in this notebook's folder

import llama_jax
from llama_jax.nn import ACTIVATIONS, MLP, Experts, SoftmaxTopK

tools.style()
folder = Path(tempfile.mkdtemp(prefix="feed_forwards_"))

# %% [markdown]
# ## Activations
#
# ReLU is 0 for all inputs below 0. GELU (x times the normal distribution's function) and SiLU (x times the logistic
# one) are smooth, and slightly negative there.

# %%
x = jnp.linspace(-4, 3, 200)
fig, ax = plt.subplots(layout="constrained")
for name, style in (("relu", "-"), ("gelu", "--"), ("silu", "-.")):
    ax.plot(x, ACTIVATIONS[name](x), style, label=name)
ax.set(xlabel="x", ylabel="activation")
ax.legend()
plt.show()

# %% [markdown]
# ## At equal parameters
#
# The baseline is SwiGLU, with 176 inside, about 8/3 of the width of 64. `match` finds the width of the others; all
# have the same seeds, batches and first values of the parameters that they share.

# %%
config = tools.small()
variants = {
    "SwiGLU": {},
    "ReLU": {"model.feed_forward": MLP, "model.feed_forward.activation": "relu"},
    "GELU": {"model.feed_forward": MLP, "model.feed_forward.activation": "gelu"},
    "SiLU": {"model.feed_forward": MLP, "model.feed_forward.activation": "silu"},
}
dense = llama_jax.ablate(
    config,
    tools.few(variants, "SwiGLU", "ReLU"),
    seeds=tools.full(4, quick=2),
    steps=tools.full(120, quick=4),
    match="parameters",
    run_dir=folder / "dense",
)
dense

# %%
dense.plot()

# %% [markdown]
# The claim holds where the whole interval is below 0, does not where it is above, and is not decided otherwise. The
# same after a longer training is in [docs/claims.md](../docs/claims.md). The column tokens/s of the table is of runs
# one after another: on a machine that does other work it says little.

# %%
for row in dense.records():
    if row["variant"] != "SwiGLU":
        interval = -row["simultaneous_high"], -row["simultaneous_low"]
        tools.claim(f"SwiGLU beats {row['variant']} (SwiGLU's loss minus its)", interval, (-math.inf, 0), "nats")

# %% [markdown]
# ## Experts at equal FLOPs
#
# Eight experts of half the width, of which each token takes two: the matrix products are those of one dense
# feed-forward and of the router, and `match` takes off what the router costs. Without a balance loss the router is free
# to prefer some experts; with one (Fedus et al. 2021), uneven loads cost.

# %%
experts = {
    "model.feed_forward": Experts,
    "model.feed_forward.num_experts": 8,
    "model.feed_forward.router": SoftmaxTopK,
    "model.feed_forward.router.top_k": 2,
}
sparse = llama_jax.ablate(
    config,
    {
        "dense": {},
        "experts": experts,
        "experts, balanced": experts | {"model.feed_forward.load_balance_loss": 0.01},
    },
    seeds=tools.full(3, quick=2),
    steps=tools.full(100, quick=4),
    match="flops",
    run_dir=folder / "sparse",
)
sparse

# %%
for row in sparse.records():
    if row["variant"] != "dense":
        interval = row["simultaneous_low"], row["simultaneous_high"]
        text = f"At equal FLOPs, {row['variant']} are better (loss minus that of the dense)"
        tools.claim(text, interval, (-math.inf, 0), "nats")

# %% [markdown]
# ## The load of experts
#
# `expert_load` has each expert's share of the tokens over the steps of a run, as means over layers. The entropy is 1
# where all have the same share. The two figures have scales of their own: mind the numbers at the colours.

# %%
runs = {
    name: llama_jax.open_run(sparse.record.trials_of(name)[0].directory) for name in ("experts", "experts, balanced")
}
loads = {name: llama_jax.inspect.expert_load(run) for name, run in runs.items()}
loads["experts"].plot()

# %%
loads["experts, balanced"].plot()

# %%
for name, load in loads.items():
    shares = load.load[-1] * load.load.shape[1]
    print(
        f"{name:18} last step: shares {shares.min():.2f} to {shares.max():.2f} of the equal one, "
        f"entropy {load.entropy[-1]:.4f}"
    )
