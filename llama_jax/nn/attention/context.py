"""Attention over a sequence that is split among devices (a context axis), exact, its causal work in balance.

With n devices the sequence has 2n chunks, and device d holds chunks d and 2n-1-d: the zigzag order (`zigzag` and
`unzigzag` go there and back; the model does both). Device d has to see its own keys, and then of every other device
exactly two chunk pairs, whichever device it is: its late chunk with the other's early one, and the two early or the two
late ones.

Keys and values come from the others around a ring, one hop while the last part is computed (Liu et al. 2023), or all at
once (`all_gather`), which holds all of them on every device. The parts join by their logsumexp.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llama_jax.nn.attention import blockwise
from llama_jax.nn.masks import AttentionMask
from llama_jax.parallel import axes_of, mesh_axis_sizes

AXIS = "context"
EARLY, LATE = 0, 1


def splits(length: int) -> bool:
    """Whether a sequence of this length is split over the context axis, in zigzag order."""
    size = mesh_axis_sizes().get(AXIS, 1)
    return size > 1 and length % (2 * size) == 0


def chunk_order(size: int) -> list[int]:
    """The chunks in the order in which the devices hold them."""
    return [chunk for device in range(size) for chunk in (device, 2 * size - 1 - device)]


def zigzag(x: jax.Array) -> jax.Array:
    """[B, T, ...] in the order of the text -> in zigzag order; as it is where no context axis splits it."""
    return _reorder(x, chunk_order(mesh_axis_sizes()[AXIS])) if splits(x.shape[1]) else x


def unzigzag(x: jax.Array) -> jax.Array:
    """The inverse of `zigzag`."""
    if not splits(x.shape[1]):
        return x
    order = chunk_order(mesh_axis_sizes()[AXIS])
    return _reorder(x, sorted(range(len(order)), key=order.__getitem__))


def _reorder(x: jax.Array, order: list[int]) -> jax.Array:
    first, _, *rest = [axes or None for axes in axes_of(x)]
    pieces = jnp.split(jax.sharding.reshard(x, PartitionSpec(first, None, *rest)), len(order), axis=1)
    whole = jnp.concatenate([pieces[chunk] for chunk in order], axis=1)
    return jax.sharding.reshard(whole, PartitionSpec(first, (AXIS,), *rest))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def context_attention(q, k, v, mask: AttentionMask, scale: float):
    """The local part of the result, inside `shard_map`: q [B, K, G, T, H], k and v [B, K, T, H], T = the local two
    chunks."""
    return _vjp_forward(q, k, v, mask, scale)[0]


def _vjp_forward(q, k, v, mask, scale):
    size = jax.lax.axis_size(AXIS)
    first = blockwise.forward(q, k, v, _own_mask(mask, q.shape[3]), scale)
    carry = tuple(_halves(x, 3) for x in first)
    q2 = _halves(q, 3)

    def visit(carry, keys, owner):
        for mine, theirs, mask_ in _tiles(mask, owner, q.shape[3] // 2):
            part = blockwise.forward(_at(q2, mine), _at(keys["k"], theirs), _at(keys["v"], theirs), mask_(keys), scale)
            joined = _join(tuple(_at(x, mine) for x in carry), part)
            carry = tuple(
                jax.lax.dynamic_update_index_in_dim(x, y, mine, 0) for x, y in zip(carry, joined, strict=True)
            )
        return carry, {}

    carry, _ = _travel(visit, carry, _keys(k, v, mask), {}, size, mask.context)
    out, logsumexp = (_whole(x, 3) for x in carry)
    out = out.astype(q.dtype)
    return out, (q, k, v, mask, out, logsumexp)


def _vjp_backward(scale, residuals, d_out):
    q, k, v, mask, out, logsumexp = residuals
    size = jax.lax.axis_size(AXIS)
    delta = blockwise.row_sums(d_out, out)
    own = blockwise.backward(q, k, v, _own_mask(mask, q.shape[3]), scale, logsumexp, delta, d_out)
    d_q, d_keys = _halves(own[0], 3), {"k": _halves(own[1], 2), "v": _halves(own[2], 2)}
    rows = tuple(_halves(x, 3) for x in (q, logsumexp, delta, d_out))

    def visit(d_q, keys, owner):
        d_keys = {name: jnp.zeros(keys[name].shape, jnp.float32) for name in ("k", "v")}
        for mine, theirs, mask_ in _tiles(mask, owner, q.shape[3] // 2):
            q_, lse, delta_, d_out_ = (_at(x, mine) for x in rows)
            k_, v_ = _at(keys["k"], theirs), _at(keys["v"], theirs)
            d_q_, d_k_, d_v_ = blockwise.backward(q_, k_, v_, mask_(keys), scale, lse, delta_, d_out_)
            d_q = d_q.at[mine].add(d_q_)
            d_keys = {"k": d_keys["k"].at[theirs].add(d_k_), "v": d_keys["v"].at[theirs].add(d_v_)}
        return d_q, d_keys

    d_q, d_keys = _travel(visit, d_q, _keys(k, v, mask), d_keys, size, mask.context)
    d_k, d_v = (_whole(d_keys[name], 2).astype(k.dtype) for name in ("k", "v"))
    return _whole(d_q, 3).astype(q.dtype), d_k, d_v, None


context_attention.defvjp(_vjp_forward, _vjp_backward)


def _keys(k, v, mask: AttentionMask) -> dict[str, Any]:
    """What travels, in halves (early, late)."""
    keys = {"k": _halves(k, 2), "v": _halves(v, 2)}
    return keys if mask.segment_ids is None else keys | {"segments": _halves(mask.segment_ids, 1)}


def _travel(visit, carry: Any, keys: Any, d_keys: Any, size: int, method: str) -> tuple[Any, Any]:
    """`visit(carry, keys, owner) -> (carry, part)` for the keys of every other device; the parts that all devices have
    for an owner's keys are added to its `d_keys` ({} in the forward pass)."""
    me = jax.lax.axis_index(AXIS)
    steps = jnp.arange(1, size)
    if method == "all_gather":
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
        # Both hops depend on nothing computed in this step, so they can run beside it.
        following, d_keys = hop(keys), hop(d_keys)
        carry, part = visit(carry, keys, (me - step) % size)
        return (carry, following, jax.tree.map(jnp.add, d_keys, part)), None

    # The keys of the last step need not travel on.
    (carry, keys, d_keys), _ = jax.lax.scan(step, (carry, hop(keys), d_keys), steps[:-1])
    carry, part = visit(carry, keys, (me + 1) % size)
    return carry, hop(jax.tree.map(jnp.add, hop(d_keys), part))


def _own_mask(mask: AttentionMask, length: int) -> AttentionMask:
    """Of the device's own queries and keys. In zigzag order what comes later comes later in the text, too."""
    if mask.window is None:
        return mask
    index = jnp.concatenate([_places(jax.lax.axis_index(AXIS), half, length // 2) for half in (EARLY, LATE)])
    return AttentionMask(mask.causal, mask.window, index[None], index, mask.segment_ids)


def _tiles(mask: AttentionMask, owner, length: int):
    """(half of the queries, half of the owner's keys, their mask) of each chunk pair that has anything to see."""
    me = jax.lax.axis_index(AXIS)
    # The late chunk of a device comes after the early ones of all; beyond that, who has the earlier early chunk has the
    # later late one.
    half = jnp.where(owner < me, EARLY, LATE)
    pairs = ((LATE, EARLY), (half, half)) if mask.causal else [(i, j) for i in (0, 1) for j in (0, 1)]

    def mask_of(mine, theirs):
        def make(keys):
            tile = AttentionMask(causal=False)
            if mask.segment_ids is not None:
                segments = _at(_halves(mask.segment_ids, 1), mine), _at(keys["segments"], theirs)
                tile = AttentionMask(False, None, None, None, *segments)
            if mask.window is not None:
                q_index, key_index = _places(me, mine, length)[None], _places(owner, theirs, length)
                tile = AttentionMask(
                    mask.causal, mask.window, q_index, key_index, tile.segment_ids, tile.key_segment_ids
                )
            return tile

        return make

    for mine, theirs in pairs:
        yield mine, theirs, mask_of(mine, theirs)


def _places(device, half, length: int) -> jax.Array:
    """Where in the text the positions of a device's chunk stand."""
    chunk = jnp.where(half == EARLY, device, 2 * jax.lax.axis_size(AXIS) - 1 - device)
    return chunk * length + jnp.arange(length)


def _join(a, b):
    """Results over two sets of keys as one: (out, logsumexp) each."""
    logsumexp = jnp.logaddexp(a[1], b[1])
    out = sum(out * jnp.exp(lse - logsumexp)[..., None] for out, lse in (a, b))
    return out, logsumexp


def _halves(x: jax.Array, axis: int) -> jax.Array:
    return jnp.stack(jnp.split(x, 2, axis=axis))


def _whole(x: jax.Array, axis: int) -> jax.Array:
    return jnp.concatenate([x[EARLY], x[LATE]], axis=axis)


def _at(x: jax.Array, index) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)
