"""Attention over a sequence that is split among devices (a context axis), exact, its causal work in balance.

With n devices the sequence has 2n chunks, and device d holds chunks d and 2n-1-d: the zigzag order (`zigzag` and
`unzigzag` go there and back; the model does both). Queries of device d attend to its own keys, and to exactly two chunk
pairs of every other device: its late chunk with the other's early one, and the two early or the two late ones.

Keys and values come from the other devices around a ring, one hop while the last part is computed (Liu et al. 2023), or
all at once (`all_gather`), which holds all of them on every device. The parts join by their logsumexp. Splash attention
takes gathered keys in the order of the text (`gathered`), and the places of its queries.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llama_jax.nn.attention import blockwise
from llama_jax.nn.attention.blockwise import Grouped, Keys, Result, Sinks, Values
from llama_jax.nn.base import Mask, PyTree
from llama_jax.parallel import axes_of, mesh_axis_sizes

AXIS = "context"
EARLY, LATE = 0, 1


def splits(length: int) -> bool:
    """Return whether a sequence of this length is split over the context axis, in zigzag order."""
    size = mesh_axis_sizes().get(AXIS, 1)
    return size > 1 and length % (2 * size) == 0


def chunk_order(size: int) -> list[int]:
    """Return the chunks in the order in which the devices hold them."""
    return [chunk for device in range(size) for chunk in (device, 2 * size - 1 - device)]


def zigzag(x: jax.Array) -> jax.Array:
    """Put [B, T, ...] from the order of the text into zigzag order; do nothing where no context axis splits it."""
    return _reorder(x, chunk_order(mesh_axis_sizes()[AXIS])) if splits(x.shape[1]) else x


def unzigzag(x: jax.Array) -> jax.Array:
    """Put [B, T, ...] from zigzag order into the order of the text: the inverse of `zigzag`."""
    if not splits(x.shape[1]):
        return x
    order = chunk_order(mesh_axis_sizes()[AXIS])
    return _reorder(x, sorted(range(len(order)), key=order.__getitem__))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(x: jax.Array, axis: int) -> jax.Array:
    """Return the parts of all devices in the order of the text, inside `shard_map`; float32 sums its gradient."""
    order = chunk_order(jax.lax.axis_size(AXIS))
    chunks = jnp.split(jax.lax.all_gather(x, AXIS, axis=axis, tiled=True), len(order), axis)
    return jnp.concatenate([chunks[i] for i in sorted(range(len(order)), key=order.__getitem__)], axis)


def _gathered_forward(x: jax.Array, axis: int) -> tuple[jax.Array, None]:
    return gathered(x, axis), None


def _gathered_backward(axis: int, _: None, d_y: jax.Array) -> tuple[jax.Array]:
    order = chunk_order(jax.lax.axis_size(AXIS))
    chunks = jnp.split(d_y.astype(jnp.float32), len(order), axis)
    zigzagged = jnp.concatenate([chunks[i] for i in order], axis)
    return (jax.lax.psum_scatter(zigzagged, AXIS, scatter_dimension=axis, tiled=True).astype(d_y.dtype),)


gathered.defvjp(_gathered_forward, _gathered_backward)


def _reorder(x: jax.Array, order: list[int]) -> jax.Array:
    first, _, *rest = [axes or None for axes in axes_of(x)]
    pieces = jnp.split(jax.sharding.reshard(x, PartitionSpec(first, None, *rest)), len(order), axis=1)
    whole = jnp.concatenate([pieces[chunk] for chunk in order], axis=1)
    return jax.sharding.reshard(whole, PartitionSpec(first, (AXIS,), *rest))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def context_attention(
    q: Grouped, k: Keys, v: Values, mask: Mask, sinks: Sinks | None, scale: float, strategy: str
) -> Result:
    """Return the local part of the result, inside `shard_map`, where T is the device's two chunks.

    `strategy` is ring or all_gather; `sinks` are as in `blockwise`.
    """
    return _vjp_forward(q, k, v, mask, sinks, scale, strategy)[0]


def _vjp_forward(q, k, v, mask, sinks, scale, strategy):
    size = jax.lax.axis_size(AXIS)
    # The device's own keys come first: every query attends to at least its own, so the logsumexps begin finite.
    first = blockwise.forward(q, k, v, _own_mask(mask, q.shape[3]), scale)
    carry = tuple(_halves(x, 3) for x in first)
    q2 = _halves(q, 3)

    def visit(carry, keys, owner):
        for mine, theirs in _tiles(mask, owner):
            tile = _tile_mask(mask, keys, owner, mine, theirs, q.shape[3] // 2)
            part = blockwise.forward(_at(q2, mine), _at(keys["k"], theirs), _at(keys["v"], theirs), tile, scale)
            joined = _join(tuple(_at(x, mine) for x in carry), part)
            carry = tuple(
                jax.lax.dynamic_update_index_in_dim(x, y, mine, 0) for x, y in zip(carry, joined, strict=True)
            )
        return carry, {}

    carry, _ = _travel(visit, carry, _keys(k, v, mask), {}, size, strategy)
    out, logsumexp = blockwise.with_sinks(*(_whole(x, 3) for x in carry), sinks)
    out = out.astype(q.dtype)
    return out, (q, k, v, mask, sinks, out, logsumexp)


def _vjp_backward(scale, strategy, residuals, d_out):
    q, k, v, mask, sinks, out, logsumexp = residuals
    size = jax.lax.axis_size(AXIS)
    delta = blockwise.row_sums(d_out, out)
    # `logsumexp` and `delta` are of the whole row, so each part's gradient is exact without the others.
    own = blockwise.backward(q, k, v, _own_mask(mask, q.shape[3]), scale, logsumexp, delta, d_out)
    d_q, d_keys = _halves(own[0], 3), {"k": _halves(own[1], 2), "v": _halves(own[2], 2)}
    rows = tuple(_halves(x, 3) for x in (q, logsumexp, delta, d_out))

    def visit(d_q, keys, owner):
        d_keys = {name: jnp.zeros(keys[name].shape, jnp.float32) for name in ("k", "v")}
        for mine, theirs in _tiles(mask, owner):
            tile = _tile_mask(mask, keys, owner, mine, theirs, q.shape[3] // 2)
            q_, lse, delta_, d_out_ = (_at(x, mine) for x in rows)
            k_, v_ = _at(keys["k"], theirs), _at(keys["v"], theirs)
            d_q_, d_k_, d_v_ = blockwise.backward(q_, k_, v_, tile, scale, lse, delta_, d_out_)
            d_q = d_q.at[mine].add(d_q_)
            d_keys = {"k": d_keys["k"].at[theirs].add(d_k_), "v": d_keys["v"].at[theirs].add(d_v_)}
        return d_q, d_keys

    d_q, d_keys = _travel(visit, d_q, _keys(k, v, mask), d_keys, size, strategy)
    d_k, d_v = (_whole(d_keys[name], 2).astype(k.dtype) for name in ("k", "v"))
    d_sinks = blockwise.sinks_gradient(sinks, logsumexp, delta)
    return _whole(d_q, 3).astype(q.dtype), d_k, d_v, None, d_sinks


context_attention.defvjp(_vjp_forward, _vjp_backward)


def _keys(k, v, mask: Mask) -> dict[str, PyTree]:
    """Return the arrays that travel between devices, in halves (early, late)."""
    keys = {"k": _halves(k, 2), "v": _halves(v, 2)}
    return keys if mask.segment_ids is None else keys | {"segments": _halves(mask.segment_ids, 1)}


def _travel(visit, carry: PyTree, keys: PyTree, d_keys: PyTree, size: int, strategy: str) -> tuple[PyTree, PyTree]:
    """Call `visit(carry, keys, owner) -> (carry, part)` for the keys of every other device.

    The parts that all devices have for an owner's keys are added to its `d_keys` ({} in the forward pass).
    """
    me = jax.lax.axis_index(AXIS)
    steps = jnp.arange(1, size)
    if strategy == "all_gather":
        everyone = jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS), keys)

        def look(state, step):
            carry, total = state
            owner = (me - step) % size
            carry, part = visit(carry, jax.tree.map(lambda x: _at(x, owner), everyone), owner)
            return (carry, jax.tree.map(lambda t, d: t.at[owner].set(d), total, part)), None

        total = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), d_keys)
        (carry, total), _ = jax.lax.scan(look, (carry, total), steps)
        return carry, jax.tree.map(lambda t, d: d + jax.lax.psum_scatter(t, AXIS), total, d_keys)

    def hop(x):
        return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, [(i, (i + 1) % size) for i in range(size)]), x)

    def step(state, step):
        carry, keys, d_keys = state
        # Neither hop depends on what this step computes, so both can run at the same time as it.
        following, d_keys = hop(keys), hop(d_keys)
        carry, part = visit(carry, keys, (me - step) % size)
        return (carry, following, jax.tree.map(jnp.add, d_keys, part)), None

    # The keys of the last step need not travel on; their gradients take one more hop home to the owner.
    (carry, keys, d_keys), _ = jax.lax.scan(step, (carry, hop(keys), d_keys), steps[:-1])
    carry, part = visit(carry, keys, (me + 1) % size)
    return carry, hop(jax.tree.map(jnp.add, hop(d_keys), part))


def _own_mask(mask: Mask, length: int) -> Mask:
    """Return the mask of the device's own queries and keys."""
    if mask.window is None:
        return mask  # within a device, what comes later in zigzag order comes later in the text, too
    index = jnp.concatenate([_places(jax.lax.axis_index(AXIS), half, length // 2) for half in (EARLY, LATE)])
    return Mask(mask.causal, mask.window, None, mask.segment_ids, None, index[None], index)


def _tiles(mask: Mask, owner):
    """Return (half of the queries, half of the owner's keys) of each chunk pair with anything to attend to."""
    me = jax.lax.axis_index(AXIS)
    # Late chunks come after the early ones of all devices. A device before this one has an earlier early chunk and a
    # later late chunk, so early queries attend to its early keys; of a device after this one, late ones to late keys.
    half = jnp.where(owner < me, EARLY, LATE)
    return ((LATE, EARLY), (half, half)) if mask.causal else [(i, j) for i in (0, 1) for j in (0, 1)]


def _tile_mask(mask: Mask, keys: dict[str, PyTree], owner, mine, theirs, length: int) -> Mask:
    """Return the mask of one pair of chunks; all keys of a causal pair come before its queries."""
    tile = Mask(causal=False)
    if mask.segment_ids is not None:
        segments = _at(_halves(mask.segment_ids, 1), mine)
        tile = Mask(causal=False, segment_ids=segments, key_segment_ids=_at(keys["segments"], theirs))
    if mask.window is not None:
        queries = _places(jax.lax.axis_index(AXIS), mine, length)[None]
        changes = {"query_places": queries, "key_places": _places(owner, theirs, length)}
        tile = dataclasses.replace(tile, causal=mask.causal, window=mask.window, **changes)
    return tile


def _places(device, half, length: int) -> jax.Array:
    """Return the places in the text of a device's early or late chunk."""
    chunk = jnp.where(half == EARLY, device, 2 * jax.lax.axis_size(AXIS) - 1 - device)
    return chunk * length + jnp.arange(length)


def _join(a, b):
    """Join the results over two sets of keys: (out, logsumexp) each."""
    logsumexp = jnp.logaddexp(a[1], b[1])
    out = sum(out * jnp.exp(lse - logsumexp)[..., None] for out, lse in (a, b))
    return out, logsumexp


def _halves(x: jax.Array, axis: int) -> jax.Array:
    return jnp.stack(jnp.split(x, 2, axis=axis))


def _whole(x: jax.Array, axis: int) -> jax.Array:
    return jnp.concatenate([x[EARLY], x[LATE]], axis=axis)


def _at(x: jax.Array, index) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)
