"""Tokens to their experts and back: two ways, one result.

Every assignment of a token to an expert has a place in an array of rows, in which the rows of an expert stand together.
`capacity` has so many places for each expert and row of the batch, and multiplies them all at once; `dropless` has the
assignments sorted by expert, and multiplies groups of unequal size. To go to the places and to come back are two
gathers, each the gradient of the other: nothing is scattered.

Experts lie over the mesh axis `expert`, their width over `tensor`. Each device computes its experts' part of its
tokens. Where the batch lies over `expert` too, tokens are gathered along it and results summed, or, where that sends
less, the places of an expert are sent to the device that has it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llama_jax.nn.attention.context import unzigzag, zigzag
from llama_jax.nn.parameters import gather
from llama_jax.parallel import axes_of, mesh_axis_sizes, platform, shard, spec

AXIS = "expert"
# Rows that a product takes of one expert at a time; groups are padded to a multiple. Other platforms have `ragged_dot`.
BLOCKS = {"cpu": 64, "gpu": 256, "cuda": 256}

# [rows, D] and weights by name, each product through the function -> [rows, D].
Body = Callable[[jax.Array, dict[str, jax.Array], Callable[[jax.Array, jax.Array], jax.Array]], jax.Array]


def ranks(experts: Int[Array, "b t k"], wanted: Bool[Array, "b t k"], num_experts: int) -> Int[Array, "b t k"]:
    """How many of a row's assignments come before each at the same expert: by choice, then by position.

    Only `wanted` ones count; the ranks of others mean nothing.
    """

    def local(experts: jax.Array) -> jax.Array:
        b, t, k = experts.shape
        in_order = experts.swapaxes(1, 2).reshape(b, k * t)
        order = jnp.argsort(in_order, axis=1, stable=True)
        counts = (in_order[..., None] == jnp.arange(num_experts + 1)).sum(1)
        first = jnp.take_along_axis(jnp.cumsum(counts, 1) - counts, in_order, axis=1)
        return (jnp.argsort(order, axis=1) - first).reshape(b, k, t).swapaxes(1, 2)

    experts = jnp.where(wanted, experts, num_experts)
    if not mesh_axis_sizes():
        return local(experts)
    whole = shard(unzigzag(experts), "batch", None, None)
    found = jax.shard_map(local, out_specs=spec("batch", None, None, shape=whole.shape))(whole)
    return zigzag(shard(found, "batch", "sequence", None))


def dispatch(
    body: Body,
    x: Float[Array, "b t d"],
    experts: Int[Array, "b t k"],
    weights: Float[Array, "b t k"],
    kept: Bool[Array, "b t k"],
    params: dict[str, Any],
    *,
    rank: Int[Array, "b t k"] | None,
    capacity: int,
) -> Float[Array, "b t d"]:
    """The sum over a token's kept choices of weight times expert(x).

    `params` are the experts' stored weights, [E, ...] each, with the logical axes of their dimensions. With `rank`, of
    kept assignments below `capacity`, by capacity; without it, sorted.
    """
    num_experts = next(iter(params.values()))[...].shape[0]
    x = shard(x, "batch", "sequence", None)
    choice = {"experts": jnp.where(kept, experts, num_experts), "weights": weights}
    choice |= {} if rank is None else {"rank": rank}
    choice = {name: shard(value, "batch", "sequence", None) for name, value in choice.items()}
    values = {name: param[...].astype(x.dtype) for name, param in params.items()}
    run = functools.partial(_local, body, num_experts=num_experts, capacity=capacity)
    if not mesh_axis_sizes():
        return run(x, choice, values, stored={}, expert_axis=False, rows_split=False, summed=())
    logical = {name: param.get_metadata("axes") for name, param in params.items()}
    of_rows = {axis for entry in axes_of(x) for axis in entry}
    for name, value in values.items():
        # Rows that are whole on these devices have to be known to stay so: what they meet is gathered before.
        if not of_rows.issuperset(axes_of(value)[logical[name].index("embed")]):
            values[name] = gather(value, logical[name])
    axes = {name: axes_of(value) for name, value in values.items()}
    stored = {name: (logical[name].index("embed"), of[logical[name].index("embed")]) for name, of in axes.items()}
    split = {
        axis for name, of in axes.items() for dim, entry in enumerate(of) if dim != stored[name][0] for axis in entry
    }
    rows_split = AXIS in axes_of(x)[0] and AXIS in split
    run = functools.partial(
        run, stored=stored, expert_axis=AXIS in split, rows_split=rows_split, summed=tuple(sorted(split))
    )
    return jax.shard_map(run, out_specs=spec("batch", "sequence", None, shape=x.shape))(x, choice, values)


def _local(
    body: Body,
    x: jax.Array,
    choice: dict[str, jax.Array],
    values: dict[str, jax.Array],
    *,
    num_experts: int,
    capacity: int,
    stored: dict[str, tuple[int, tuple[str, ...]]],
    expert_axis: bool,
    rows_split: bool,
    summed: tuple[str, ...],
) -> jax.Array:
    """A device's part: of its rows, by its experts and its part of their width."""
    for name, (dim, axes) in stored.items():
        if axes:
            values[name] = jax.lax.all_gather(values[name], axes, axis=dim, tiled=True)
    devices = jax.lax.axis_size(AXIS) if expert_axis else 1
    by_capacity = "rank" in choice
    # What a device sends for each token: its places to other devices, or itself to all of them.
    exchange = rows_split and by_capacity and num_experts * capacity <= devices * x.shape[1]
    if rows_split and not exchange:
        x, choice = jax.tree.map(lambda a: jax.lax.all_gather(a, AXIS, axis=0, tiled=True), (x, choice))
    b, t, d = x.shape
    here = num_experts if exchange else num_experts // devices
    first = 0 if exchange or not expert_axis else here * jax.lax.axis_index(AXIS)
    own = choice["experts"] - first
    own = jnp.where((own >= 0) & (own < here), own, here)  # [b, t, k], `here` for what is elsewhere or dropped
    k = own.shape[-1]
    if by_capacity:
        place = (own * b + jnp.arange(b)[:, None, None]) * capacity + choice["rank"]
        num_places = here * b * capacity
        place = jnp.where(own < here, place, num_places).reshape(-1)
    else:
        place, num_places, product = _sorted_places(own.reshape(-1), here)
    source = jnp.full(num_places, place.size).at[place].set(jnp.arange(place.size), mode="drop", unique_indices=True)
    rows = _spread(*_alike(x.reshape(b * t, d), place.reshape(b * t, k), source))
    if by_capacity:
        rows = rows.reshape(here, b * capacity, d)
        if exchange:
            rows = jax.lax.all_to_all(rows, AXIS, split_axis=0, concat_axis=1, tiled=True)
        rows = body(rows, values, lambda rows, w: jnp.einsum("eci,eio->eco", rows, w))
        if exchange:
            rows = jax.lax.all_to_all(rows, AXIS, split_axis=1, concat_axis=0, tiled=True)
        rows = rows.reshape(num_places, d)
    else:
        rows = body(rows, values, product)
    picked = _collect(*_alike(rows, place, source)).reshape(b, t, k, d).astype(jnp.float32)
    y = (picked * choice["weights"][..., None]).sum(2).astype(x.dtype)
    summed = tuple(axis for axis in summed if axis != AXIS or not rows_split)
    if summed:
        y = jax.lax.psum(y, summed)
    if rows_split and not exchange:
        y = jax.lax.psum_scatter(y, AXIS, scatter_dimension=0, tiled=True)
    return y


def _sorted_places(
    own: Int[Array, " a"], num_experts: int
) -> tuple[jax.Array, int, Callable[[jax.Array, jax.Array], jax.Array]]:
    """Places of assignments sorted by expert, their number, and the product of rows there with their experts' weights.

    Where `ragged_dot` would multiply every row with every expert, groups are padded to blocks.
    """
    a, largest = own.size, BLOCKS.get(platform())
    block = 1
    while block < min(largest or 1, a / num_experts):
        block *= 2
    # Each expert's last block may be partly empty; no more blocks than assignments have anything in them.
    num_blocks = min(a, a // block + num_experts)
    order = jnp.argsort(own, stable=True)
    first = jnp.searchsorted(own[order], jnp.arange(num_experts + 1))
    counts = jnp.diff(first)
    blocks = (counts + block - 1) // block
    ends = jnp.cumsum(blocks)
    padding = jnp.append(block * (ends - blocks), 0) - first
    place = jnp.argsort(order) + padding[own]
    place = jnp.where(own < num_experts, place, num_blocks * block)
    if largest is None:
        return place, a, lambda rows, w: jax.lax.ragged_dot(rows, w, counts)
    of_block = jnp.minimum(jnp.searchsorted(ends, jnp.arange(num_blocks), side="right"), num_experts - 1)

    def product(rows: jax.Array, w: jax.Array) -> jax.Array:
        return _blocked(*_alike(rows, w), of_block, ends)

    return place, num_blocks * block, product


def _alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays that differ between the same devices of a `shard_map`: where one does, all count as if they did."""
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    axes = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(array, tuple(axes - own), to="varying") if axes - own else array
        for array, own in zip(arrays, varying, strict=True)
    )


@jax.custom_vjp
def _spread(x: jax.Array, place: jax.Array, source: jax.Array) -> jax.Array:
    """[N, D] tokens -> [M, D]: at each place the token of assignment `source`, zeros where there is none."""
    return x.at[source // place.shape[1]].get(mode="fill", fill_value=0)


def _spread_forward(x, place, source):
    return _spread(x, place, source), place


def _spread_backward(place, d_rows):
    return d_rows.at[place].get(mode="fill", fill_value=0).sum(1), None, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _collect(rows: jax.Array, place: jax.Array, source: jax.Array) -> jax.Array:
    """[M, D] -> [A, D]: what stands at each assignment's place, zeros where it has none."""
    return rows.at[place].get(mode="fill", fill_value=0)


def _collect_forward(rows, place, source):
    return _collect(rows, place, source), source


def _collect_backward(source, d_picked):
    return d_picked.at[source].get(mode="fill", fill_value=0), None, None


_collect.defvjp(_collect_forward, _collect_backward)


@jax.custom_vjp
def _blocked(rows: jax.Array, w: jax.Array, of_block: jax.Array, ends: jax.Array) -> jax.Array:
    """[blocks * M, I] x [E, I, O] -> [blocks * M, O]: each block with its expert's weight; `ends` count blocks."""
    return _each_block(rows, w, of_block, ends, transposed=False)


def _each_block(rows, w, of_block, ends, *, transposed: bool):
    size = rows.shape[0] // of_block.shape[0]

    def step(i, out):
        w_i = jax.lax.dynamic_index_in_dim(w, of_block[i], keepdims=False)
        y = jnp.einsum("mo,io->mi" if transposed else "mi,io->mo", _block(rows, i, size), w_i)
        return jax.lax.dynamic_update_slice_in_dim(out, y, i * size, 0)

    out = _zeros_like((rows.shape[0], w.shape[1 if transposed else 2]), rows)
    return jax.lax.fori_loop(0, ends[-1], step, out)


def _blocked_forward(rows, w, of_block, ends):
    return _blocked(rows, w, of_block, ends), (rows, w, of_block, ends)


def _blocked_backward(residuals, d_out):
    rows, w, of_block, ends = residuals
    size = rows.shape[0] // of_block.shape[0]

    def of_expert(expert, d_w):
        def add(i, total):
            return total + jnp.einsum("mi,mo->io", _block(rows, i, size), _block(d_out, i, size))

        total = _zeros_like(w.shape[1:], rows)
        first = jnp.where(expert > 0, ends[expert - 1], 0)
        return jax.lax.dynamic_update_index_in_dim(d_w, jax.lax.fori_loop(first, ends[expert], add, total), expert, 0)

    d_w = _zeros_like(w.shape, rows)
    d_w = jax.lax.fori_loop(0, w.shape[0], of_expert, d_w)
    return _each_block(d_out, w, of_block, ends, transposed=True), d_w, None, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _block(rows, i, size):
    return jax.lax.dynamic_slice_in_dim(rows, i * size, size)


def _zeros_like(shape, rows):
    """Zeros that count as different between devices where `rows` do: a loop begins with the type that it ends with."""
    return _alike(jnp.zeros(shape, rows.dtype), rows)[0]
