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
# # Norms
#
# LayerNorm subtracts the mean and divides by the standard deviation; RMSNorm divides by the root mean square and leaves
# the rest out. Before a sublayer ("pre") or after the sum with the residual ("post")? How much time does a norm take,
# how large are the first gradients, and what does the choice do to the loss? The models are tiny (three layers of width
# 64); what is decided here is decided at this size and on this machine only.

# %%
import dataclasses
import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import notebook_tools as tools  # in this notebook's folder
import numpy as np
from flax import nnx

import llama_jax
from llama_jax.ablation.statistics import t_interval
from llama_jax.nn import LayerNorm, RMSNorm

tools.style()
folder = Path(tempfile.mkdtemp(prefix="norms_"))

# %% [markdown]
# ## Time
#
# Zhang and Sennrich (2019) report between 7 % and 64 % less time for whole models with RMSNorm. First the norm alone,
# value and gradient on 1,024 tokens; then loss and gradient of a whole model. Both norms are called by turns, so that
# what disturbs the machine disturbs both, and the interval is that of the median ratio of two neighbours in time.

# %%
norms = {"LayerNorm": LayerNorm(eps=1e-5, bias=True), "RMSNorm": RMSNorm(eps=1e-5)}
WIDTHS, REPEATS = tools.full(([256, 1024, 4096], 60), quick=([64], 8))


def norm_call(norm, width: int):
    """A function that computes the value and gradient of a norm."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1024, width)), jnp.float32)
    graph, state = nnx.split(norm.build(width, rngs=nnx.Rngs(0)))
    gradient = jax.jit(jax.value_and_grad(lambda state, x: jnp.square(nnx.merge(graph, state)(x)).sum(), (0, 1)))
    return lambda: gradient(state, x)


for width in WIDTHS:
    layer, rms = tools.by_turns([norm_call(norm, width) for norm in norms.values()], REPEATS)
    print(
        f"width {width}: medians {1e6 * np.median(layer):,.0f} µs (LayerNorm), {1e6 * np.median(rms):,.0f} µs (RMSNorm)"
    )
    tools.claim("RMSNorm alone is 40 % faster", tools.median_interval(layer / rms), (1.4, math.inf), "times")

# %%
config = tools.small({"model.num_layers": tools.full(3, quick=2), "model.norm": "LayerNorm"})
tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, tools.full((8, 129), quick=(4, 65)))
models = [dataclasses.replace(config.model, norm=norm) for norm in norms.values()]
calls = [tools.gradient_call(model, tokens) for model in models]
layer, rms = tools.by_turns(calls, tools.full(30, quick=8))
print(f"a whole model: medians {1e3 * np.median(layer):,.1f} ms (LayerNorm), {1e3 * np.median(rms):,.1f} ms (RMSNorm)")
tools.claim("RMSNorm makes a model 40 % faster", tools.median_interval(layer / rms), (1.4, math.inf), "times")

# %% [markdown]
# ## First gradients by layer
#
# Xiong et al. (2020) bound the gradient of the last layer at the start: with post-norm it is as large in a Transformer
# of any depth, with pre-norm it falls with the square root of the number of layers; so post-norm needs small first
# steps. Here are 12 layers with random weights on random tokens: the norm of the gradient of each feed-forward's second
# matrix. The claim is about the last layer; the others are drawn for the course.

# %%
DEEP = tools.full(12, quick=3)
gradients = {}
for placement in ("pre", "post"):
    deep = llama_jax.override(config.model, {"num_layers": DEEP, "norm_placement": placement})
    found = [
        llama_jax.inspect.gradient_norms(llama_jax.build(deep, seed=seed), tokens)
        for seed in range(tools.full(3, quick=2))
    ]
    gradients[placement] = np.array([norms_of.layers["feed_forward.down_proj.weight"] for norms_of in found])

# %%
fig, ax = plt.subplots(layout="constrained")
for number, (placement, values) in enumerate(gradients.items()):
    ax.plot(values.T, marker="os"[number], color=f"C{number}", markersize=4, linewidth=1)
    ax.plot([], marker="os"[number], color=f"C{number}", label=f"{placement}-norm, one line a seed")
ax.set(xlabel="layer", ylabel="norm of the gradient", yscale="log")
ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
plt.show()
growth = {placement: values[:, -1] / values[:, 0] for placement, values in gradients.items()}
print("last layer / first layer:", {placement: values.round(2).tolist() for placement, values in growth.items()})
larger = gradients["post"][:, -1] / gradients["pre"][:, -1]
_, low, high = t_interval(larger)
tools.claim("The last layer's first gradient is larger with post-norm", (low, high), (1, math.inf), "times")

# %% [markdown]
# ## Loss
#
# The same seeds, batches and first values. The learning rate is 8e-3 with a warm-up of 30 steps, or with none. In a run
# of 100 steps a warm-up also takes away many steps at the full rate; the comparison includes that.

# %%
steep = {"optimizer.learning_rate": 8e-3, "optimizer.warmup_steps": tools.full(30, quick=2)}
abrupt = {"optimizer.warmup_steps": 0}
variants = {
    "LayerNorm, pre": {},
    "RMSNorm, pre": {"model.norm": RMSNorm},
    "LayerNorm, post": {"model.norm_placement": "post"},
    "LayerNorm, pre, no warm-up": abrupt,
    "LayerNorm, post, no warm-up": {"model.norm_placement": "post"} | abrupt,
}
sweep = llama_jax.ablate(
    llama_jax.override(config, steep),
    tools.few(variants, "LayerNorm, pre", "RMSNorm, pre"),
    seeds=tools.full(4, quick=2),
    steps=tools.full(100, quick=4),
    run_dir=folder / "sweep",
)
sweep

# %%
sweep.plot()

# %% [markdown]
# "Equal" is taken as within 0.02 nats. The column tokens/s of the table is of runs one after another: on a machine that
# does other work it says less than the times by turns above. The same claims after a longer training are in
# [docs/claims.md](../docs/claims.md).

# %%
by_name = {record["variant"]: record for record in sweep.records()}
row = by_name["RMSNorm, pre"]
interval = row["simultaneous_low"], row["simultaneous_high"]
tools.claim("RMSNorm has equal quality (loss minus LayerNorm's)", interval, (-0.02, 0.02), "nats")


# %%
def finals(name: str) -> np.ndarray:
    """The last validation losses of a variant, by seed."""
    return np.array([t[sweep.metric] for t in sweep.trials() if t["variant"] == name], float)


for placement in ("pre", "post"):
    name = f"LayerNorm, {placement}"
    if f"{name}, no warm-up" in by_name:
        _, low, high = t_interval(finals(f"{name}, no warm-up") - finals(name))
        text = f"{placement}-norm needs warm-up (loss without it, minus that with it)"
        tools.claim(text, (low, high), (0, math.inf), "nats")
