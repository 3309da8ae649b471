"""Tokens to their experts and back: two ways, one result.

Every assignment of a token to an expert has a slot in an array of rows, in which the rows of an expert are consecutive.
`capacity` has a fixed number of slots for each expert and row of the batch, and multiplies all of them at once;
`dropless` sorts the assignments by expert, and multiplies groups of unequal size. To dispatch tokens to slots and to
combine the results are two gathers, each the gradient of the other: nothing is scattered.

Experts lie over the mesh axis `expert`, their width over `tensor`. Each device computes its experts' part of its
tokens. Where the batch lies over `expert` too, tokens are gathered along it and results summed, or, where that sends
less, the slots of an expert are sent to the device that has it (`exchange.py`: those of sorted assignments).
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llama_jax.nn.attention.context import unzigzag, zigzag
from llama_jax.nn.base import PyTree
from llama_jax.nn.experts.exchange import AXIS, apply_exchanged, sends_assignments
from llama_jax.nn.experts.groups import Body, Groups, Product, alike
from llama_jax.nn.parameters import gather
from llama_jax.nn.products import product
from llama_jax.parallel import axes_of, mesh_axis_sizes, shard, spec


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How matrices and tokens lie over the mesh.

    stored: for each matrix the dimension that only storage splits, and the mesh axes that do.
    expert_axis: the axis `expert` splits the experts.
    rows_split: it splits the rows of the batch, too.
    summed: mesh axes over which each device has a part of every result.
    """

    stored: Mapping[str, tuple[int, tuple[str, ...]]] = dataclasses.field(default_factory=dict)
    expert_axis: bool = False
    rows_split: bool = False
    summed: tuple[str, ...] = ()


def ranks(experts: Int[Array, "b t k"], wanted: Bool[Array, "b t k"], num_experts: int) -> Int[Array, "b t k"]:
    """Return how many of a row's assignments come before each at the same expert: by choice, then by position.

    Only `wanted` ones count; the ranks of others mean nothing.
    """
    experts = jnp.where(wanted, experts, num_experts)
    if not mesh_axis_sizes():
        return _ranks(experts, num_experts)
    whole = shard(unzigzag(experts), "batch", None, None)
    out = spec("batch", None, None, shape=whole.shape)
    found = jax.shard_map(functools.partial(_ranks, num_experts=num_experts), out_specs=out)(whole)
    return zigzag(shard(found, "batch", "sequence", None))


def _ranks(experts: jax.Array, num_experts: int) -> jax.Array:
    b, t, k = experts.shape
    in_order = experts.swapaxes(1, 2).reshape(b, k * t)
    order = jnp.argsort(in_order, axis=1, stable=True)
    counts = (in_order[..., None] == jnp.arange(num_experts + 1)).sum(1)
    first = jnp.take_along_axis(jnp.cumsum(counts, 1) - counts, in_order, axis=1)
    # The argsort of an order is each element's place in it; less the place of its expert's first.
    return (jnp.argsort(order, axis=1) - first).reshape(b, k, t).swapaxes(1, 2)


def apply_experts(
    body: Body,
    x: Float[Array, "b t d"],
    experts: Int[Array, "b t k"],
    gates: Float[Array, "b t k"],
    kept: Bool[Array, "b t k"],
    params: Mapping[str, PyTree],
    *,
    rank: Int[Array, "b t k"] | None,
    capacity: int,
) -> Float[Array, "b t d"]:
    """Return the sum over a token's kept choices of gate times expert(x).

    `params` are the experts' stored matrices and biases, [E, ...] each, with the logical axes of their dimensions. With
    the `rank` of each assignment, which is below `capacity` for kept ones, by capacity; without it, sorted.
    """
    num_experts = next(iter(params.values()))[...].shape[0]
    x = shard(x, "batch", "sequence", None)
    choice = {"experts": jnp.where(kept, experts, num_experts), "gates": gates}
    choice |= {} if rank is None else {"rank": rank}
    choice = {name: shard(value, "batch", "sequence", None) for name, value in choice.items()}
    matrices = {name: param[...].astype(x.dtype) for name, param in params.items()}
    local = functools.partial(_apply_local, body, num_experts=num_experts, capacity=capacity)
    if not mesh_axis_sizes():
        return local(x, choice, matrices, layout=_Layout())
    logical = {name: param.get_metadata("axes") for name, param in params.items()}
    of_rows = {axis for entry in axes_of(x) for axis in entry}
    for name, value in matrices.items():
        # `shard_map` has to know that rows which are the same on several devices stay so: a matrix that is split over
        # other axes than the rows is gathered outside of it.
        if "embed" in logical[name] and not of_rows.issuperset(axes_of(value)[logical[name].index("embed")]):
            matrices[name] = gather(value, logical[name])
    axes = {name: axes_of(value) for name, value in matrices.items()}
    dims = {name: names.index("embed") for name, names in logical.items() if "embed" in names}  # biases have none
    stored = {name: (dim, axes[name][dim]) for name, dim in dims.items()}
    split = {
        axis for name, of in axes.items() for dim, entry in enumerate(of) if dim != dims.get(name) for axis in entry
    }
    layout = _Layout(stored, AXIS in split, AXIS in axes_of(x)[0] and AXIS in split, tuple(sorted(split)))
    out = spec("batch", "sequence", None, shape=x.shape)
    return jax.shard_map(functools.partial(local, layout=layout), out_specs=out)(x, choice, matrices)


def _apply_local(
    body: Body,
    x: jax.Array,
    choice: dict[str, jax.Array],
    matrices: dict[str, jax.Array],
    *,
    num_experts: int,
    capacity: int,
    layout: _Layout,
) -> jax.Array:
    """Compute a device's part: of its rows, by its experts and its part of their width."""
    for name, (dim, axes) in layout.stored.items():
        if axes:
            matrices[name] = jax.lax.all_gather(matrices[name], axes, axis=dim, tiled=True)
    devices = jax.lax.axis_size(AXIS) if layout.expert_axis else 1
    by_capacity = "rank" in choice
    # What a device sends for each token: its slots to other devices, or itself to all of them.
    exchange = layout.rows_split and by_capacity and num_experts * capacity <= devices * x.shape[1]
    if layout.rows_split and not by_capacity and sends_assignments(choice["experts"].shape[-1], devices):
        flat = {name: value.reshape(-1, value.shape[-1]) for name, value in {"x": x, **choice}.items()}
        y = apply_exchanged(body, matrices=matrices, num_experts=num_experts, **flat).reshape(x.shape)
        return _sum_over(y, [axis for axis in layout.summed if axis != AXIS])
    if layout.rows_split and not exchange:
        x, choice = jax.tree.map(lambda a: jax.lax.all_gather(a, AXIS, axis=0, tiled=True), (x, choice))
    b, t, d = x.shape
    here = num_experts if exchange else num_experts // devices  # experts that this device fills slots of
    first = 0 if exchange or not layout.expert_axis else here * jax.lax.axis_index(AXIS)
    own = choice["experts"] - first
    own = jnp.where((own >= 0) & (own < here), own, here)  # [b, t, k]; `here` for an expert elsewhere, or dropped
    k = own.shape[-1]
    if by_capacity:
        slot = (own * b + jnp.arange(b)[:, None, None]) * capacity + choice["rank"]
        num_slots = here * b * capacity
        slot = jnp.where(own < here, slot, num_slots).reshape(-1)
        product: Product = _of_each
    else:
        slot, num_slots, product = _sorted_slots(own.reshape(-1), here)
    assignment = jnp.full(num_slots, slot.size).at[slot].set(jnp.arange(slot.size), mode="drop", unique_indices=True)
    # Out-of-range slots mean "none": scatter drops them, and the gathers below fill zeros.
    rows = _dispatch(*alike(x.reshape(b * t, d), slot.reshape(b * t, k), assignment))
    if by_capacity:
        rows = rows.reshape(here, b * capacity, d)
        if exchange:
            rows = jax.lax.all_to_all(rows, AXIS, split_axis=0, concat_axis=1, tiled=True)
        rows = body(rows, matrices, product)
        if exchange:
            rows = jax.lax.all_to_all(rows, AXIS, split_axis=1, concat_axis=0, tiled=True)
        rows = rows.reshape(num_slots, d)
    else:
        rows = body(rows, matrices, product)
    picked = _combine(*alike(rows, slot, assignment)).reshape(b, t, k, d).astype(jnp.float32)
    y = (picked * choice["gates"][..., None]).sum(2).astype(x.dtype)
    # Along `expert`, gathered rows are summed and split again in one step below; exchanged ones are complete.
    y = _sum_over(y, [axis for axis in layout.summed if axis != AXIS or not layout.rows_split])
    if layout.rows_split and not exchange:
        y = jax.lax.psum_scatter(y, AXIS, scatter_dimension=0, tiled=True)
    return y


def _sum_over(y: jax.Array, axes: list[str]) -> jax.Array:
    return jax.lax.psum(y, tuple(axes)) if axes else y


def _sorted_slots(own: Int[Array, " a"], num_experts: int) -> tuple[jax.Array, int, Product]:
    """Return slots of assignments sorted by expert, their number, and the product of rows there with their matrices."""
    groups = Groups.of(own.size, num_experts)
    order = jnp.argsort(own, stable=True)  # stable: the slots, and so the sums, do not depend on the platform
    first = jnp.searchsorted(own[order], jnp.arange(num_experts + 1))
    counts = jnp.diff(first)
    slot = jnp.argsort(order) + (jnp.append(groups.first(counts), 0) - first)[own]
    return jnp.where(own < num_experts, slot, groups.num_slots), groups.num_slots, groups.product(counts)


@jax.custom_vjp
def _dispatch(x: jax.Array, slot: jax.Array, assignment: jax.Array) -> jax.Array:
    """Return [M, D], in each slot the token of its assignment, zeros where there is none; tokens are [N, D].

    `slot` [N, K] of each assignment and `assignment` [M] of each slot are inverse to each other.
    """
    return x.at[assignment // slot.shape[1]].get(mode="fill", fill_value=0)


def _dispatch_forward(x, slot, assignment):
    return _dispatch(x, slot, assignment), slot


def _dispatch_backward(slot, d_rows):
    return d_rows.at[slot].get(mode="fill", fill_value=0).sum(1), None, None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _combine(rows: jax.Array, slot: jax.Array, assignment: jax.Array) -> jax.Array:
    """Return [A, D], the row in each assignment's slot, zeros where it has none; rows are [M, D]."""
    return rows.at[slot].get(mode="fill", fill_value=0)


def _combine_forward(rows, slot, assignment):
    return _combine(rows, slot, assignment), assignment


def _combine_backward(assignment, d_picked):
    return d_picked.at[assignment].get(mode="fill", fill_value=0), None, None


_combine.defvjp(_combine_forward, _combine_backward)


def _of_each(rows: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply every expert's rows with its matrix: [E, C, I] x [E, I, O] -> [E, C, O]."""
    return jax.vmap(lambda rows, w: product(rows, w, False, None))(*alike(rows, w))
