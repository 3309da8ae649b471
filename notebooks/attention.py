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
# # Attention: quality, speed and cache
#
# Multi-head attention (MHA) keeps a key and a value of every head for every token. Grouped-query (GQA) and multi-query
# attention (MQA) share them among heads, latent attention (MLA) keeps one small vector from which all heads' keys and
# values are made, and sparse attention (DSA) reads only some of them. What does each cost, and what does it save? The
# models are tiny (two layers of width 64, 8 heads of 8, 130,000 tokens of Python): what is decided here
# is decided at this size only.

# %%
import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import notebook_tools as tools  # in this notebook's folder
import numpy as np

import llama_jax
from llama_jax.nn import KERNELS, LatentAttention, Mask, SparseLatentAttention

tools.style()
folder = Path(tempfile.mkdtemp(prefix="attention_"))

# %% [markdown]
# ## Cache
#
# `kv_cache` counts the bytes that decoding keeps, from shapes alone. Here are the attentions at the width and depth of
# LLaMA-2 7B: 32 layers, 32 heads of 128, in bfloat16, for one text. MLA has the sizes of DeepSeek-V2, a latent of 512
# and a rotary part of 64; DSA adds a key of 128 for the indexer that chooses.

# %%
seven = llama_jax.load_config("llama2_7b").model
changes = {
    "MHA": {},
    "GQA, 8 kv heads": {"attention.num_kv_heads": 8},
    "MQA": {"attention.num_kv_heads": 1},
    "MLA": {"attention": "LatentAttention"},
    "DSA": {"attention": "SparseLatentAttention"},
}
cache = llama_jax.inspect.kv_cache({name: llama_jax.override(seven, change) for name, change in changes.items()})
for name, size in cache.per_token.items():
    print(f"{name:16} {size:8,} bytes per token; MHA has {cache.per_token['MHA'] / size:4.1f} times as many")
cache.plot()

# %% [markdown]
# ## Quality at equal parameters
#
# Fewer kv heads are fewer parameters. `match` gives what an attention saves to the feed-forward, so that all variants
# have the same number. Every variant is trained with the same seeds, on the same batches in the same order, and
# compared with MHA seed by seed. DSA chooses 32 keys of at most 128; its indexer learns from a loss on the attention
# weights.

# %%
config = tools.small()
variants = {
    "MHA": {},
    "GQA": {"model.attention.num_kv_heads": 2},
    "MQA": {"model.attention.num_kv_heads": 1},
    "MLA": {"model.attention": LatentAttention},
    "DSA": {
        "model.attention": SparseLatentAttention,
        "model.attention.q_lora_rank": 32,
        "model.attention.index_topk": 32,
        "model.attention.index_loss_weight": 1.0,
    },
}
sweep = llama_jax.ablate(
    config,
    tools.few(variants, "MHA", "MLA"),
    seeds=tools.full(4, quick=2),
    steps=tools.full(130, quick=4),
    match="parameters",
    run_dir=folder / "sweep",
)
sweep

# %%
sweep.plot()

# %% [markdown]
# A claim puts a quantity in a region, and the sweep has an interval of it. It holds where the interval lies in the
# region, does not where they have nothing in common, and is not decided otherwise. The intervals are simultaneous: all
# of them together cover at 95 %. "Hardly any" and "equal" are taken as within 0.02 nats of MHA. The same claims after a
# longer training are in [docs/claims.md](../docs/claims.md). The column tokens/s of the table is of runs one after
# another: on a machine that does other work it says little.

# %%
by_name = {record["variant"]: record for record in sweep.records()}
HARDLY = (-0.02, 0.02)
claims = {
    "MQA": ("MQA costs quality", (0, math.inf)),
    "GQA": ("GQA costs hardly any quality", HARDLY),
    "MLA": ("MLA has equal quality", HARDLY),
    "DSA": ("DSA has equal quality", HARDLY),
}
for name, row in by_name.items():
    if name in claims:
        text, region = claims[name]
        interval = row["simultaneous_low"], row["simultaneous_high"]
        tools.claim(f"{text} (loss minus MHA's)", interval, region, "nats")
smaller = by_name["MHA"]["cache_bytes_per_token"] / by_name["MLA"]["cache_bytes_per_token"]
tools.claim("MLA shrinks the cache (exact: MHA's bytes over MLA's)", (smaller, smaller), (1, math.inf), "times")

# %% [markdown]
# ## Speed of decoding
#
# Decoding one token reads the whole cache: with long texts and several rows this is most of its time. Below, one layer
# of width 512 with 8 heads of 64 continues rows of 4,096 tokens. The compiled calls are timed by turns, so that what
# disturbs the machine disturbs all; the boxes are the quartiles of the times, and the intervals are those of the median
# ratio to MHA's time in the same turn.

# %%
ROWS, LENGTH, TIMES = tools.full((4, 4096, 30), quick=(1, 64, 2))
one_layer = {"hidden_size": 512, "num_layers": 1, "max_positions": 8192, "attention.num_heads": 8}
one_layer |= {"attention.head_dim": 64, "attention.num_kv_heads": 8, "feed_forward.intermediate_size": 512}
wide = llama_jax.override(config.model, one_layer)


def decode_call(model_config):
    """A function that computes one more token of every row after `LENGTH` others."""
    model = llama_jax.build(model_config)
    cache = model.module.init_cache(ROWS, LENGTH + 1)
    token, lengths = jnp.zeros((ROWS, 1), jnp.int32), jnp.full(ROWS, LENGTH, jnp.int32)
    call = jax.jit(lambda module, cache: module.extend(token, cache=cache, lengths=lengths), donate_argnums=1)

    def again():
        nonlocal cache
        _, cache = call(model.module, cache)
        return cache

    return again


shared = {"MHA": {}, "GQA": {"attention.num_kv_heads": 2}, "MQA": {"attention.num_kv_heads": 1}}
shared |= {"MLA": {"attention": "LatentAttention"}}
shared = tools.few(shared, "MHA", "MQA")
turns = tools.by_turns([decode_call(llama_jax.override(wide, change)) for change in shared.values()], TIMES)
seconds = dict(zip(shared, turns, strict=True))

# %%
fig, ax = plt.subplots(layout="constrained")
ax.boxplot([1000 * times for times in seconds.values()], tick_labels=list(seconds), showfliers=False)
ax.set(ylabel="one more token (ms)", ylim=0, title=f"{ROWS} rows of {LENGTH:,} tokens")
plt.show()
print({name: f"{1000 * np.median(times):.2f} ms" for name, times in seconds.items()})
for name in [name for name in seconds if name != "MHA"]:
    ratios = tools.median_interval(seconds["MHA"] / seconds[name])
    tools.claim(f"{name} decodes faster than MHA (MHA's time over its)", ratios, (1, math.inf), "times")

# %% [markdown]
# ## Memory: the N² matrix
#
# The plain formula makes all T x T scores of a head, and keeps the weights for the backward pass. FlashAttention (Dao
# et al. 2022) computes them by blocks with a running maximum and sum, and again in the backward pass. The `blockwise`
# kernel here is this algorithm. XLA says how many bytes of temporary arrays a compiled gradient needs; nothing is run.

# %%
LENGTHS = tools.full([256, 512, 1024, 2048, 4096, 8192], quick=[512, 1024])
HEADS, SIZE = 4, 64


def temporary_bytes(kernel: str, length: int) -> int:
    """XLA's figure of the temporary arrays of the gradient of one row's attention."""

    def loss(q, k, v):
        return KERNELS[kernel].run(q, k, v, Mask(), scale=SIZE**-0.5).sum()

    queries = jax.ShapeDtypeStruct((1, length, HEADS, SIZE), jnp.float32)
    keys = jax.ShapeDtypeStruct((1, HEADS, length, SIZE), jnp.float32)
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(queries, keys, keys).compile()
    return compiled.memory_analysis().temp_size_in_bytes


temporaries = {k: [temporary_bytes(k, length) for length in LENGTHS] for k in ("reference", "blockwise")}

# %%
fig, ax = plt.subplots(layout="constrained")
for name, marker in (("reference", "o"), ("blockwise", "s")):
    ax.loglog(LENGTHS, np.array(temporaries[name]) / 2**20, f"{marker}-", label=name)
matrix = np.array([4 * HEADS * length**2 for length in LENGTHS]) / 2**20
ax.loglog(LENGTHS, matrix, "--", color="gray", label="one T x T float32 matrix a head")
ax.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
ax.minorticks_off()
ax.set(xlabel="length T (tokens)", ylabel="temporary arrays (MiB)")
ax.legend()
plt.show()
growth = {name: math.log2(sizes[-1] / sizes[-2]) for name, sizes in temporaries.items()}
print("memory grows as T to the power of", {name: round(power, 2) for name, power in growth.items()})
share = temporaries["blockwise"][-1] / 2**20 / matrix[-1]
tools.claim("FlashAttention does not store the N² matrix (temporaries / one matrix)", (share, share), (0, 1))
