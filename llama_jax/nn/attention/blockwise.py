"""Exact attention by blocks with an online softmax (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1).

Neither direction ever holds more than a [T/16, 512] block of scores per head, and blocks of keys that no query of a
block attends to are not computed: a causal block of queries reads only the keys up to its end, a window only those from
its beginning on. With a prefix, or keys at any places, all are read; with queries at any places (a cache) those up to
the last query, in the forward pass. A query without any key to attend to gets zeros, and passes no gradient.

Queries are grouped here: q [B, K, G, T, H], k [B, K, S, H] and v [B, K, S, V], whose heads may have another size.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama_jax.nn.base import Mask
from llama_jax.nn.products import never, turned

MASKED = -1e30  # finite, so that a fully masked block does not make inf - inf
# Where running maxima begin: below every score and so far above MASKED that exp(MASKED - NOTHING) is 0. In a row where
# no key is allowed it stays the maximum and the logsumexp.
NOTHING = MASKED / 2
MAX_QUERY_BLOCKS = 16
MIN_QUERY_BLOCK = 128
KEY_BLOCK = 512

Grouped = Float[Array, "b k g t h"]
Keys = Float[Array, "b k s h"]
Values = Float[Array, "b k s v"]
Result = Float[Array, "b k g t v"]
Sinks = Float[Array, "1 n 1 1"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def blockwise(q: Grouped, k: Keys, v: Values, mask: Mask, sinks: Sinks | None, scale: float) -> Result:
    """Compute softmax(scale q k^T) v, in the dtype of q; the softmax's denominator has exp(sinks), too."""
    return _vjp_forward(q, k, v, mask, sinks, scale)[0]


def _vjp_forward(q, k, v, mask, sinks, scale):
    out, logsumexp = with_sinks(*forward(q, k, v, mask, scale), sinks)
    out = out.astype(q.dtype)
    return out, (q, k, v, mask, sinks, out, logsumexp)


def _vjp_backward(scale, residuals, d_out):
    q, k, v, mask, sinks, out, logsumexp = residuals
    delta = row_sums(d_out, out)
    d_q, d_k, d_v = backward(q, k, v, mask, scale, logsumexp, delta, d_out)
    d_sinks = sinks_gradient(sinks, logsumexp, delta)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, d_sinks


blockwise.defvjp(_vjp_forward, _vjp_backward)


def row_sums(d_out: Result, out: Result) -> Float[Array, "b k g t"]:
    """Return the sum that the softmax's gradient subtracts from each row."""
    return jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)


def with_sinks(
    out: Result, logsumexp: Float[Array, "b k g t"], sinks: Sinks | None
) -> tuple[Result, Float[Array, "b k g t"]]:
    """Return result and logsumexp over all keys and a sink: a score without a value; as they are for None."""
    if sinks is None:
        return out, logsumexp
    total = jnp.logaddexp(logsumexp, sinks.reshape(1, *logsumexp.shape[1:3], 1))
    return out * jnp.exp(logsumexp - total)[..., None], total


def sinks_gradient(sinks: Sinks | None, logsumexp, delta) -> Sinks | None:
    """Return the gradient in the sinks, for a `logsumexp` with them: `backward`'s of a score whose value is 0."""
    if sinks is None:
        return None
    shares = jnp.exp(sinks.reshape(1, *logsumexp.shape[1:3], 1) - logsumexp)
    return -(shares * delta).sum((0, 3)).reshape(sinks.shape)


def scores(q: Grouped, k: Keys, mask: Mask, first_query, first_key, scale: float) -> Float[Array, "b k g t s"]:
    """Return masked float32 scores of T queries from `first_query` on against S keys from `first_key` on."""
    b, n_kv, g, t, h = q.shape
    # The heads of a group are stacked on the query dimension: one product for each kv head.
    s = jnp.einsum("bkmh,bksh->bkms", q.reshape(b, n_kv, g * t, h), k, preferred_element_type=jnp.float32)
    allowed = mask.allowed(first_query, t, first_key, k.shape[2])
    return jnp.where(allowed[:, None, None], s.reshape(b, n_kv, g, t, k.shape[2]) * scale, MASKED)


def forward(q: Grouped, k: Keys, v: Values, mask: Mask, scale: float) -> tuple[Result, Float[Array, "b k g t"]]:
    """Return the result in float32, and the logsumexp of each row's scores.

    Results over different sets of keys join by it. It is NOTHING in rows without an allowed key.
    """
    q, mask, zero = _together(q, mask)
    # Of a cache, whose keys are in their order, those after the last query of a block are not read.
    in_cache = mask.query_places is not None and mask.key_places is None and mask.causal and mask.prefix is None

    def block(carry, begin, size, first, stop):
        q_i = _block(q, begin, size, 3)

        def step(carry, start, size):
            top, total, out = carry  # running maximum, sum of exp(score - top), and sum of exp(score - top) v
            s = scores(q_i, _block(k, start, size), mask, begin, start, scale)
            new_top = jnp.maximum(top, s.max(-1))
            p = jnp.exp(s - new_top[..., None])
            shrink = jnp.exp(top - new_top)  # corrects what was summed with the smaller maximum
            part = jnp.einsum("bkgts,bksh->bkgth", p.astype(v.dtype), _block(v, start, size))
            return (new_top, total * shrink + p.sum(-1), out * shrink[..., None] + part), ()

        shape = q_i.shape[:-1]
        init = (jnp.full(shape, NOTHING), jnp.zeros(shape), jnp.zeros((*shape, v.shape[3]), jnp.float32))
        if in_cache:
            top, total, out = _over_seen(step, init, zero, stop, _block(mask.query_places, begin, size, 1).max() + 1)
        else:
            (top, total, out), _ = _over_keys(step, init, zero, first, stop)
        total = jnp.where(total > 0, total, 1)  # no key was allowed: `out` is 0, and stays it
        return carry, (out / total[..., None], top + jnp.log(total))

    return over_queries(block, (), q.shape[3], k.shape[2], mask)[1]


def backward(q, k, v, mask: Mask, scale: float, logsumexp, delta, d_out) -> tuple[jax.Array, ...]:
    """Return the gradients in q, k and v, float32.

    `logsumexp` and `delta` (`row_sums`) are those over all keys of the row, also where k and v are a part of them.
    """
    q, mask, zero = _together(jnp.where(never(d_out), 0, q), mask)  # so that no scores of the forward pass are kept
    rows = lambda x: x.reshape(*x.shape[:2], -1, x.shape[-1])  # noqa: E731 (the heads of a group, stacked)

    def block(carry, begin, size, first, stop):
        q_i, d_out_i, lse_i, delta_i = (_block(x, begin, size, 3) for x in (q, d_out, logsumexp, delta))
        lse_i, delta_i = lse_i[..., None], delta_i[..., None]

        def step(d_q_i, start, size):
            k_j, v_j = _block(k, start, size), _block(v, start, size)
            p = jnp.exp(scores(q_i, k_j, mask, begin, start, scale) - lse_i)  # the softmax, computed again
            # With p = softmax(s): dL/ds = p * (dL/dp - delta), where delta is the row's sum of p * dL/dp.
            d_p = jnp.einsum("bkgth,bksh->bkgts", d_out_i, v_j, preferred_element_type=jnp.float32)
            d_s = (p * (d_p - delta_i) * scale).astype(q.dtype)
            # Transposed: XLA:CPU would copy the whole block of scores to bring the summed dimension last.
            d_v_j = turned(turned(rows(d_out_i)) @ rows(p.astype(q.dtype)))
            d_k_j = turned(turned(rows(q_i)) @ rows(d_s))
            return d_q_i + jnp.einsum("bkgts,bksh->bkgth", d_s, k_j), (d_k_j, d_v_j)

        d_q_i, d_keys = _over_keys(step, jnp.zeros(q_i.shape, jnp.float32), zero, first, stop)
        # Keys of a block of queries are consecutive: their gradients are added to a slice of the sums.
        carry = tuple(total.at[:, :, first:stop].add(d) for total, d in zip(carry, d_keys, strict=True))
        return carry, (d_q_i,)

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    (d_k, d_v), (d_q,) = over_queries(block, zeros, q.shape[3], k.shape[2], mask)
    return d_q, d_k, d_v


def _together(q: Grouped, mask: Mask) -> tuple[Grouped, Mask, jax.Array]:
    """Return q, the mask, and a 0 to add to the places of key blocks, tied together by a barrier.

    The mask of a block is the same in every layer. In the gradient of a scan over layers JAX computes loop-invariant
    values once, before the loop: that would be the masks of all blocks, quadratic in the sequence. Behind the barrier
    they depend on the layer's q.
    """
    return jax.lax.optimization_barrier((q, mask, jnp.int32(0)))


def over_queries(block, carry, num_queries: int, num_keys: int, mask: Mask):
    """Call `block(carry, begin, size, first, stop) -> (carry, ys)` for blocks of queries; return carry and joined ys.

    Keys [first, stop) are those that the block may need, at least one. Where all blocks need all keys it is a scan;
    else a Python loop, in which what is masked is not computed.
    """
    size = max(MIN_QUERY_BLOCK, -(-num_queries // MAX_QUERY_BLOCKS))
    anywhere = any(x is not None for x in (mask.query_places, mask.key_places, mask.prefix))
    everything = anywhere or (not mask.causal and mask.window is None)
    if num_queries > size and num_queries % size == 0 and everything:
        begins = jnp.arange(0, num_queries, size)
        carry, ys = jax.lax.scan(lambda c, begin: block(c, begin, size, 0, num_keys), carry, begins)
        return carry, jax.tree.map(lambda a: _joined(a, 3), ys)
    parts = []
    for begin in range(0, num_queries, size):
        end = min(begin + size, num_queries)
        first, stop = 0, num_keys
        if not everything and mask.causal:
            stop = min(num_keys, end)
        if not everything and mask.window is not None:
            # Where queries go on beyond the last key their window is empty: one key is read, and masked.
            stop = min(stop, end + mask.window - 1)
            first = min(max(0, begin - mask.window + 1), stop - 1)
        carry, ys = block(carry, begin, end - begin, first, stop)
        parts.append(ys)
    return carry, jax.tree.map(lambda *a: jnp.concatenate(a, axis=3), *parts)


def _over_keys(step, carry, zero: jax.Array, first: int, stop: int):
    """Call `step(carry, start, size)` for blocks of keys, the full ones in a scan; return carry and joined ys."""
    full = (stop - first) // KEY_BLOCK if stop - first > KEY_BLOCK else 0
    start = first + full * KEY_BLOCK
    ys = []
    if full:
        starts = jnp.arange(first, start, KEY_BLOCK)
        carry, y = jax.lax.scan(lambda c, start: step(c, zero + start, KEY_BLOCK), carry, starts)
        ys.append(jax.tree.map(lambda a: _joined(a, 2), y))
    if start < stop:
        carry, y = step(carry, start, stop - start)
        ys.append(y)
    return carry, jax.tree.map(lambda *a: jnp.concatenate(a, axis=2), *ys)


def _over_seen(step, carry, zero: jax.Array, stop: int, seen: jax.Array):
    """Call `step` for the blocks of `stop` keys that begin before `seen`, known at run time only; return carry."""
    size = min(KEY_BLOCK // 2, stop)  # smaller ones compute less that is masked
    full = stop // size * size
    count = -(-jnp.minimum(full, seen) // size)
    carry = jax.lax.fori_loop(0, count, lambda i, carry: step(carry, zero + i * size, size)[0], carry)
    if full < stop:
        carry = jax.lax.cond(seen > full, lambda c: step(c, zero + full, stop - full)[0], lambda c: c, carry)
    return carry


def _joined(blocks: jax.Array, axis: int) -> jax.Array:
    """Join blocks [n, ..., size, ...] to [..., n size, ...]; `axis` is that of size, n not counted."""
    shape = blocks.shape[1:]
    return jnp.moveaxis(blocks, 0, axis).reshape(*shape[:axis], -1, *shape[axis + 1 :])


def _block(x, start, size: int, axis: int = 2):
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)
