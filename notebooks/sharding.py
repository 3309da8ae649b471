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
# # Sharding
#
# How a model is split over devices, what that changes (nothing that it learns), what the devices send to each other,
# and whether a model fits on a machine that is not here. Eight virtual devices of one CPU take the place of eight
# accelerators: the programs are the ones that eight real devices would run, only not faster.
#
# ## Eight devices
#
# XLA makes virtual devices of a CPU when it starts, so the flag has to be set before anything uses JAX. Set later, it
# has no effect, and the assertion fails: restart the kernel then.

# %%
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import math
import tempfile
from collections import Counter
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import notebook_tools as tools  # in this notebook's folder
import numpy as np
import rich
from jax.sharding import NamedSharding
from matplotlib.patches import Rectangle
from rich.table import Table

import llama_jax
from llama_jax.chips import GIB
from llama_jax.models import abstract_params, initialize
from llama_jax.parallel import LOGICAL_AXES, MeshConfig, make_mesh, spec
from llama_jax.planning.xla.compiled import describe, lower_step
from llama_jax.training import init_state

tools.style()
folder = Path(tempfile.mkdtemp(prefix="sharding_"))
assert len(jax.devices()) == 8
jax.devices()

# %% [markdown]
# ## The mesh
#
# A mesh gives the devices coordinates on named axes. Modules name the meaning of each dimension of a weight (`embed`,
# `heads`, `mlp`), and one table says which mesh axes split a dimension of that meaning:

# %%
table = Table("dimension", "split over", "meaning", box=None)
MEANINGS = {
    "batch": "sequences",
    "sequence": "positions of a sequence",
    "heads": "query heads",
    "kv_heads": "heads of keys and values",
    "mlp": "width inside the feed-forward",
    "vocab": "entries of the vocabulary",
    "expert": "experts",
    "embed": "model width, of weights only: gathered before use",
    "layers": "stacked layers, of weights only: each stage has its own",
}
for name, axes in LOGICAL_AXES.items():
    table.add_row(name, ", ".join(axes), MEANINGS[name])
rich.print(table)

# %% [markdown]
# The model of this notebook has eight heads of queries and four of keys and values. `MESHES` are some ways to lay eight
# devices out; an axis that is not named has size 1. `float32` is for the comparison of losses below.

# %%
config = llama_jax.load_config(
    "tiny_python",
    {
        "model.num_layers": 2,
        "model.attention.num_heads": 8,
        "model.attention.num_kv_heads": 4,
        "model.attention.head_dim": 32,
        "compute.dtype": "float32",
        "compute.scan_layers": True,
        "sequence_length": 128,
        "logging.every_steps": 1,
        "logging.validation_batches": 8,
        "logging.sample_prompts": [],
        "optimizer": "AdamW",
        "optimizer.learning_rate": 2.5e-3,
        "optimizer.warmup_steps": 10,
    },
)
config = tools.shrink(config)  # the tests run every cell with hardly any work; here it changes nothing
config = llama_jax.override(config, {"global_batch_size": 8, "num_steps": tools.full(24, quick=3)})
MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "tensor 8": {"tensor": 8},
    "fsdp 2 x tensor 4": {"fsdp": 2, "tensor": 4},
    "data 2 x context 4": {"data": 2, "context": 4},
}
for name, sizes in MESHES.items():
    axes = {axis: size for axis, size in make_mesh(sizes).shape.items() if size > 1}
    print(f"{name:20}{axes}")

# %% [markdown]
# ## Which device has what
#
# Each square is one array (of the layers' weights, one layer and the two dimensions that are ever split), cut as it
# lies on the devices. A piece has the numbers of the devices that hold it: several where they all have a copy.

# %%
ARRAYS = {
    "embedding": ("embedding.weight", {"vocabulary": 0, "width": 1}),
    "q_proj": ("layers.attention.q_proj.weight", {"width": 1, "query heads": 2}),
    "k_proj": ("layers.attention.k_proj.weight", {"width": 1, "kv heads": 2}),
    "down_proj": ("layers.feed_forward.down_proj.weight", {"inner width": 1, "width": 2}),
}
PALETTE = [*plt.rcParams["axes.prop_cycle"].by_key()["color"], "#f0e442"]  # eight colours


def draw(ax, shape, sharding, names):
    """Draw two dimensions of an array, cut into its pieces; `names` are their labels and places in its shape."""
    pieces = {}
    for device, index in sharding.devices_indices_map(tuple(shape)).items():
        spans = [index[dim].indices(shape[dim])[:2] for dim in names.values()]
        pieces.setdefault(tuple(spans), []).append(device.id)
    rows, columns = (shape[dim] for dim in names.values())
    for ((top, bottom), (left, right)), devices in pieces.items():
        x, y, width, height = left / columns, top / rows, (right - left) / columns, (bottom - top) / rows
        color = PALETTE[min(devices)]
        ax.add_patch(Rectangle((x, y), width, height, facecolor=color, alpha=0.4, edgecolor="black"))
        upright = "\n" if height > width else " "
        text = "all" if len(devices) == 8 else upright.join(map(str, devices))
        ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)
    ax.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[], aspect="equal")
    ax.set_ylabel(next(iter(names)), fontsize=9)
    ax.set_xlabel(list(names)[1], fontsize=9)
    ax.spines[:].set_visible(False)


fig, axes = plt.subplots(len(MESHES), len(ARRAYS) + 1, figsize=(7.2, 8.4), layout="constrained")
stored = {}
for row, (mesh_name, sizes) in zip(axes, MESHES.items(), strict=True):
    with jax.set_mesh(make_mesh(sizes)):
        params = abstract_params(config.model)  # shapes and shardings; nothing is allocated
        shape = (config.global_batch_size, config.sequence_length)
        of_batch = NamedSharding(jax.sharding.get_mesh(), spec("batch", "sequence", shape=shape))
    stored[mesh_name] = sum(math.prod(p.sharding.shard_shape(p.shape)) for p in params.values())
    for ax, (weight, names) in zip(row, ARRAYS.values(), strict=False):
        draw(ax, params[weight].shape, params[weight].sharding, names)
    draw(row[-1], shape, of_batch, {"sequences": 0, "positions": 1})
    row[0].annotate(mesh_name, (-0.35, 0.5), xycoords="axes fraction", rotation=90, va="center", fontweight="bold")
for ax, title in zip(axes[0], [*ARRAYS, "batch"], strict=True):
    ax.set_title(title)
plt.show()

# %% [markdown]
# `data` copies every weight and splits the batch. `fsdp` splits the batch and the weights, along the model width.
# `tensor` splits heads, feed-forward and vocabulary, and every device sees all of the batch; four heads of keys and
# values cannot be split over eight devices, so that `tensor 8` copies them. `context` splits the positions. What a
# device stores of the parameters follows:

# %%
whole = llama_jax.num_parameters(config.model)
for name, number in stored.items():
    print(f"{name:20}{number:>10,} of {whole:,} parameters on a device: {number / whole:.1%}")
assert stored["data 8"] == whole
assert whole / 8 < stored["fsdp 8"] < 1.01 * whole / 8  # every device has the weights of the norms

# %% [markdown]
# ## The same losses
#
# A run has its mesh in the config (on the command line, `python train.py tiny_python --mesh.fsdp 2 --mesh.tensor 4`),
# and nothing else changes:

# %%
on_mesh = llama_jax.override(config, {"mesh": MeshConfig(**MESHES["fsdp 2 x tensor 4"])})
run = llama_jax.train(on_mesh, folder / "run", quiet=True)

# %% [markdown]
# To see what the devices do, the same steps once more on every mesh, and on one device, one stage at a time:
# `lower_step` traces the train step for a mesh, `compile` makes one program for all its devices, and `describe` reads
# its memory and what the devices send to each other. First values and batches do not depend on the mesh.


# %%
def train_on(sizes, devices):
    """Return the losses of the run's steps on a mesh of these sizes, and XLA's figures of the program."""
    one = llama_jax.override(config, {"mesh": MeshConfig(**({"fsdp": 1} | sizes))})
    lowered, mesh = lower_step(one, devices)
    program = lowered.compile()
    with jax.set_mesh(mesh):
        hyper = one.optimizer.hyper(one.num_steps, one.seed)
        state, losses = init_state(initialize(one.model, one.seed), hyper), []
        for step in range(one.num_steps):
            batch = {
                name: jax.device_put(array, NamedSharding(mesh, spec("batch", "sequence", shape=array.shape)))
                for name, array in run.batch(step).items()
            }
            state, metrics = program(state, batch, hyper)
            losses.append(float(metrics["loss"]))
    return np.array(losses), describe(program, mesh, 0.0)


shown = tools.full(list(MESHES), quick=["fsdp 8"])
found = {"one device": train_on({}, jax.devices()[:1])}
found |= {name: train_on(MESHES[name], jax.devices()) for name in shown}

# %%
alone = found["one device"][0]
logged = np.array([row["loss"] for row in run.metrics()])
losses = {name: values for name, (values, _) in found.items()} | {"llama_jax.train, fsdp 2 x tensor 4": logged}
for name, values in losses.items():
    gap = np.abs(values - alone).max()
    print(f"{name:36}last loss {values[-1]:.6f}, largest difference at any step {gap:.1e}")
print(f"neighbours of the first loss in float32 are {np.spacing(np.float32(alone[0])):.1e} apart")

# %% [markdown]
# Sums are taken in another order on every mesh, so that the losses agree up to rounding.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.6), layout="constrained")
steps = np.arange(1, len(alone) + 1)
left.plot(steps, alone, color="black", linewidth=1, label="one device")
for (name, values), mark in zip(list(losses.items())[1:-1], "os^Dv", strict=False):
    left.plot(steps, values, mark, markersize=4, markevery=4, fillstyle="none", label=name)
    right.plot(steps, 1e6 * (values - alone), mark, markersize=4, fillstyle="none")
left.set(xlabel="step", ylabel="training loss (nats per token)")
right.set(xlabel="step", ylabel="loss minus one device's (10$^{-6}$ nats)")
right.axhline(0, color="black", linewidth=0.5)
fig.legend(loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# ## What the devices send
#
# The collectives are XLA's: the program names no exchange of data, only how its arrays are split. Bytes are those that
# a device sends by a ring algorithm.

# %%
table = Table("mesh", "collective", "over", "times a step", "MiB sent", box=None)
for column in table.columns[3:]:
    column.justify = "right"
sent = {}
for name, (_, program) in found.items():
    times, size = Counter(), Counter()
    for collective in program.collectives:
        if collective.axes:
            key = collective.kind, " and ".join(collective.axes)
            times[key] += collective.count
            size[key] += collective.count * collective.wire_bytes / 2**20
    sent[name] = size
    for (kind, over), mib in size.most_common():
        table.add_row(name, kind, over, f"{times[kind, over]}", f"{mib:.2f}")
rich.print(table)

# %%
kinds = sorted({kind for size in sent.values() for kind, _ in size})
fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.4), layout="constrained", sharey=True)
bottom = np.zeros(len(sent))
for kind in kinds:
    values = [sum(mib for (one, _), mib in size.items() if one == kind) for size in sent.values()]
    left.barh(list(sent), values, left=bottom, label=kind)
    bottom += values
left.set(xlabel="MiB that a device sends in a step", xlim=(0, 1.05 * bottom.max()))
left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
bottom = np.zeros(len(sent))
for part in ("arguments", "temporaries"):
    values = np.array([getattr(program.memory, part) / 2**20 for _, program in found.values()])
    right.barh(list(sent), values, left=bottom, label=part)
    bottom += values
right.set(xlabel="MiB of a device's memory (XLA's figure)")
right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
left.invert_yaxis()
plt.show()

# %% [markdown]
# ## A machine that is not here
#
# `plan` needs no device: it works out, by formulas, what a run takes on a machine and how long a step lasts at best.
# Will Llama-3 8B train on 16 chips of TPU v5e?

# %%
big = llama_jax.load_config("llama3_8b")
report = llama_jax.plan(big, "v5e:4x4")
rich.print(report)

# %% [markdown]
# Not as it is, but with the change in the last line. The same run on other machines, each with the smallest change that
# makes it fit:

# %%
MACHINES = ["v5e:4x4", "v5e:8x8", "v6e:4x4", "v5p:2x2x4", "h100:8", "h200:8", "b200:8", "h100:4x8"]
reports = {machine: llama_jax.plan(big, machine) for machine in MACHINES}
table = Table("machine", "chips", "GiB needed", "GiB there", "change that helps", "then GiB", "tokens/s", box=None)
for column in (1, 2, 3, 5, 6):
    table.columns[column].justify = "right"
chosen = {}
for machine, one in reports.items():
    change = one.suggestion
    chosen[machine] = plan = change.plan if change else one.plan
    table.add_row(
        machine,
        f"{plan.num_chips}",
        f"{one.plan.total_bytes / GIB:.1f}",
        f"{plan.capacity / GIB:.1f}",
        change.command() if change else "none needed",
        f"{plan.total_bytes / GIB:.1f}",
        f"{plan.tokens_per_second:,.0f}",
    )
rich.print(table)

# %%
PARTS = {"parameters": ["parameters"], "optimizer": ["optimizer"], "gradients": ["gradients"]}
fig, ax = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
bottom = np.zeros(len(chosen))
for label in (*PARTS, "activations and the rest"):
    named = [sum(plan.memory.get(kind, 0) for kind in PARTS) for plan in chosen.values()]
    values = [
        (plan.memory.get(label, 0) if label in PARTS else plan.total_bytes - part) / GIB
        for plan, part in zip(chosen.values(), named, strict=True)
    ]
    ax.barh(list(chosen), values, left=bottom, label=label)
    bottom += values
for place, plan in enumerate(chosen.values()):
    (line,) = ax.plot([plan.capacity / GIB] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
line.set_label("memory of the device")
ax.invert_yaxis()
ax.set(xlabel="GiB on each device, with the change that helps")
ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
plt.show()

# %% [markdown]
# Gradient accumulation does most: a device then works on a part of its sequences at a time, and keeps the activations
# of that part only. With `search_all` the report has every mesh, accumulation and recomputation (`remat`) that fits. On
# four nodes of eight H100s:

# %%
candidates = llama_jax.plan(big, "h100:4x8", search_all=True).candidates
fig, ax = plt.subplots(layout="constrained")
for remat, mark in zip(("full", "attention", "dots", "none"), "os^D", strict=True):
    plans = [one.plan for one in candidates if one.plan.remat == remat]
    memory = [plan.total_bytes / GIB for plan in plans]
    speed = [plan.tokens_per_second / 1e3 for plan in plans]
    ax.plot(memory, speed, mark, markersize=4.5, alpha=0.6, label=remat)
ax.set(xlabel="GiB on each device (estimate)", ylabel="thousand tokens/s (at best)", ylim=0)
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="remat")
plt.show()
best = candidates[0]
print(f"{len(candidates)} options fit; the fastest, bound by {best.plan.bound}: {best.command()}")
print(f"{best.plan.total_bytes / GIB:.1f} GiB, {best.plan.tokens_per_second:,.0f} tokens/s")

# %% [markdown]
# The figures are estimates: [docs/planning.md](../docs/planning.md) compares those of memory with XLA's, and a step
# takes at least the time that the planner gives. `llama_jax.plan(..., compile=True)` asks XLA itself, with the real
# train step (extra `plan`).
