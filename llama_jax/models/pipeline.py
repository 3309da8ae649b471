"""Layers over the stages of a pipeline, each of which passes its microbatch on to the next one (GPipe, Huang et al.
2019).

The pipeline axis splits stacked layers, and around them the batch. Within `shard_map` over this axis alone a stage
applies its layers to one microbatch at a tick; the other axes split arrays there as everywhere. With R repeats the
layers are R S chunks, chunk c on stage c mod S, and a microbatch goes around R times (the interleaved schedule of
Narayanan et al. 2021, section 2.2, with one direction after the other). Microbatches enter in groups of S, so that a
result of the last stage is the first one's input at the next tick. All M take R M + S - 1 ticks, of which a stage works
for R M.

Stage s holds the microbatches s M/S ... (s + 1) M/S - 1, and in the end their results. Where the first stage takes one,
it leaves the result of the group before in its place; that column of microbatches then moves down by one stage.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llama_jax.config import UserError
from llama_jax.models.config import Compute, ModelConfig, repeating_pattern
from llama_jax.nn import Experts, ForwardContext, PyTree
from llama_jax.parallel import batch_parts, mesh_axis_sizes, reshape

AXIS = "pipeline"
MICROBATCHES = 4  # of a stage, at most, where their number is not given: a bubble of a fifth of the ticks

type Apply = Callable[[PyTree, jax.Array, jax.Array, ForwardContext], jax.Array]


def check_pipeline(config: ModelConfig, compute: Compute, sizes: dict[str, int], rows: int) -> None:
    """Raise UserError where a mesh with a pipeline axis cannot compute the model on batches of `rows`."""
    stages, repeats, kind = sizes[AXIS], compute.pipeline_repeats, type(config).__name__
    if stages == 1:
        return
    key, stacks = f"mesh.pipeline={stages}", config.stacks()
    if len(stacks) > 1 or config.has_source:
        raise UserError(f"{key} is for one stack of layers, and {kind} has {' and '.join(stacks)}: set it to 1")
    (pieces,) = stacks.values()
    if any(isinstance(feed_forward, Experts) for _, feed_forward in pieces):
        raise UserError(f"{key} does not go with experts, whose balance is that of a whole batch: set it to 1")
    if config.needs_rng:
        raise UserError(
            f"{key} does not go with dropout, whose draws are for a whole batch: set it to 1, or dropout to 0"
        )
    if not compute.scan_layers:
        raise UserError(f"{key} needs compute.scan_layers=true: stages hold parts of the stacked layers")
    leading, period = repeating_pattern(pieces)
    if leading or len(pieces) % (period * stages * repeats):
        found = f"{len(pieces) - leading} of {len(pieces)} layers with a pattern of {period}" if period else "none"
        raise UserError(
            f"{key} with compute.pipeline_repeats={repeats} needs equal layers, or a pattern of them that repeats "
            f"{stages * repeats} times or a multiple of that, and the model has {found}: take other numbers"
        )
    _of_stage(compute, stages, rows // batch_parts(sizes))


def num_microbatches(compute: Compute, stages: int, rows: int) -> int:
    """Return into how many microbatches a pipeline cuts a batch, of which each device has `rows` around the layers."""
    return stages * _of_stage(compute, stages, rows)


def _of_stage(compute: Compute, stages: int, rows: int) -> int:
    """Return the microbatches that each stage holds. Raises UserError for a number that does not fit stages or rows."""
    if (wanted := compute.pipeline_microbatches) is None:
        return max(n for n in range(1, MICROBATCHES + 1) if rows % n == 0)
    if wanted % stages or rows % (wanted // stages):
        raise UserError(
            f"compute.pipeline_microbatches={wanted} must be mesh.pipeline={stages} times a divisor of {rows}, the "
            "rows of a device: take another number, or none"
        )
    return wanted // stages


def pipelined(
    apply: Apply,
    state: PyTree,
    x: Float[Array, "b t d"],
    positions: Int[Array, "b t"],
    ctx: ForwardContext,
    compute: Compute,
) -> Float[Array, "b t d"]:
    """Return the result of all layers: `apply(state, x, positions, ctx)` is that of the layers in its state, [L, ...].

    Raises UserError for a number of rows that the batch's axes, or the microbatches, do not divide.
    """
    sizes = mesh_axis_sizes()
    stages, parts = sizes[AXIS], batch_parts(sizes)
    if len(x) % parts:
        raise UserError(f"a batch of {len(x)} rows does not fit mesh.pipeline={stages}: take a multiple of {parts}")
    count = _of_stage(compute, stages, len(x) // parts)
    # Arrays [B, T] travel with their microbatch; a bias of the scores is the same for all rows.
    others, tree = jax.tree.flatten((positions, ctx))
    of_rows = [leaf.ndim == 2 for leaf in others]
    rows = [leaf for leaf in others if leaf.ndim == 2]
    fixed = [leaf for leaf in others if leaf.ndim != 2]
    local = functools.partial(_run, apply, count, compute.pipeline_repeats, stages, tree, of_rows)
    specs = P(AXIS), P(AXIS), P()
    # The checks of what differs between stages would not see through the `shard_map` of attention within.
    mapped = jax.shard_map(local, in_specs=specs, out_specs=P(AXIS), axis_names={AXIS}, check_vma=False)
    return mapped(state, [x, *rows], fixed)


def _run(
    apply: Apply,
    count: int,
    repeats: int,
    stages: int,
    tree: Any,
    of_rows: list[bool],
    state: PyTree,
    rows: list[jax.Array],
    fixed: list[jax.Array],
) -> jax.Array:
    """Return a stage's part of the result [B / S, T, D], within `shard_map`; `count` is M / S."""
    stage = jax.lax.axis_index(AXIS)
    up = [(s, (s + 1) % stages) for s in range(stages)]
    down = [(to, at) for at, to in up]
    chunk_of = _chunks(state, stages, repeats, stage)
    held = [_cut(x, count) for x in rows]

    def exchange(held: PyTree, arrived: PyTree, tick: jax.Array | int) -> tuple[PyTree, PyTree]:
        """Return the held microbatches and the stage's next one; `arrived` comes from the stage before."""
        group, place = jnp.divmod(tick, stages * repeats)
        slot = (group * stages + place) % count

        def take(held: PyTree, arrived: PyTree) -> tuple[PyTree, PyTree]:
            column = [jax.lax.dynamic_index_in_dim(x, slot, keepdims=False) for x in held]
            first = stage == 0
            taken = [jnp.where(first, x, y) for x, y in zip(column, arrived, strict=True)]
            left = [jnp.where(first, y, x) for x, y in zip(column, arrived, strict=True)]
            left = [jax.lax.ppermute(x, AXIS, down) for x in left]
            return [_put(x, y, slot) for x, y in zip(held, left, strict=True)], taken

        if repeats == 1:
            return take(held, arrived)
        return jax.lax.cond(place < stages, take, lambda *same: same, held, arrived)

    def tick(carry: tuple[PyTree, PyTree], number: jax.Array) -> tuple[tuple[PyTree, PyTree], None]:
        held, (x, *own) = exchange(*carry, number)
        travelling, constant = iter(own), iter(fixed)
        leaves = [next(travelling if is_row else constant) for is_row in of_rows]
        y = apply(chunk_of(number), x, *jax.tree.unflatten(tree, leaves))
        return (held, [jax.lax.ppermute(value, AXIS, up) for value in (y, *own)]), None

    num_ticks = repeats * count * stages + stages - 1
    # Until its first microbatch arrives a stage works on one of its own: the numbers are finite, and nobody takes them.
    (held, arrived), _ = jax.lax.scan(tick, (held, [x[0] for x in held]), jnp.arange(num_ticks))
    held, _ = exchange(held, arrived, num_ticks)
    # Result m came to the slot (m + S) mod M/S.
    return _joined(jnp.roll(held[0], -stages, axis=0))


def _chunks(state: PyTree, stages: int, repeats: int, stage: jax.Array) -> Callable[[jax.Array], PyTree]:
    """Return the function from a tick to the parameters that this stage applies, from those that it stores.

    A stage stores chunks s R ... (s + 1) R - 1 and applies s, s + S, ...: each travels once in a step.
    """
    if repeats == 1:
        return lambda tick: state
    # In round k a stage sends its chunk i = (k - floor(s g / S)) mod R, with g the greatest common divisor of R and S:
    # no two stages send to the same one.
    common = math.gcd(repeats, stages)
    sent = np.array([[(k - s * common // stages) % repeats for s in range(stages)] for k in range(repeats)])
    numbers = sent + repeats * np.arange(stages)
    round_of = np.zeros((repeats, stages), int)
    for k, s in np.ndindex(numbers.shape):
        round_of[numbers[k, s] // stages, numbers[k, s] % stages] = k

    def moved(x: jax.Array) -> jax.Array:
        parts = jnp.reshape(x, (repeats, x.shape[0] // repeats, *x.shape[1:]), out_sharding=_below(x, 2))
        received = []
        for k in range(repeats):
            part = jax.lax.dynamic_index_in_dim(parts, jnp.asarray(sent[k])[stage], keepdims=False)
            received.append(jax.lax.ppermute(part, AXIS, [(s, int(n) % stages) for s, n in enumerate(numbers[k])]))
        return jnp.stack(received)

    chunks = jax.tree.map(moved, state)

    def chunk_of(tick: jax.Array) -> PyTree:
        repeat = (jnp.maximum(tick - stage, 0) // stages) % repeats
        index = jnp.asarray(round_of)[repeat, stage]
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), chunks)

    return chunk_of


def _below(x: jax.Array, leading: int) -> P:
    """Return the partition spec of x [n, ...] with its first dimension made `leading` ones, all of them whole."""
    return P(*(None,) * leading, *jax.typeof(x).sharding.spec[1:])


def _cut(x: jax.Array, count: int) -> jax.Array:
    """Return rows [B, ...] as [count, B / count, ...]: every n-th row, so that all devices have some of each."""
    axes = "batch", None, "sequence", *(None,) * (x.ndim - 2)
    return jnp.moveaxis(reshape(x, (x.shape[0] // count, count, *x.shape[1:]), *axes), 1, 0)


def _joined(x: jax.Array) -> jax.Array:
    """Return the inverse of `_cut`."""
    axes = "batch", "sequence", *(None,) * (x.ndim - 3)
    return reshape(jnp.moveaxis(x, 0, 1), (x.shape[0] * x.shape[1], *x.shape[2:]), *axes)


def _put(x: jax.Array, y: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, y, index, 0)
