"""Exact attention by blocks with an online softmax (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1).

Neither direction ever holds more than a [T/16, 512] block of scores per head, and what no query of a block may see is
not computed: a causal block of queries reads only the keys up to its end, a window only those from its beginning on.

Queries come grouped here: q [B, K, G, T, H], k and v [B, K, S, H].
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama_jax.nn.masks import AttentionMask

MASKED = -1e30  # finite, so that a fully masked block does not make inf - inf
MAX_QUERY_BLOCKS = 16
MIN_QUERY_BLOCK = 128
KEY_BLOCK = 512

Grouped = Float[Array, "b k g t h"]
Keys = Float[Array, "b k s h"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise(q: Grouped, k: Keys, v: Keys, mask: AttentionMask, scale: float) -> Grouped:
    """softmax(scale q k^T) v, in the dtype of q."""
    return _vjp_forward(q, k, v, mask, scale)[0]


def _vjp_forward(q, k, v, mask, scale):
    out, logsumexp = forward(q, k, v, mask, scale)
    out = out.astype(q.dtype)
    return out, (q, k, v, mask, out, logsumexp)


def _vjp_backward(scale, residuals, d_out):
    q, k, v, mask, out, logsumexp = residuals
    d_q, d_k, d_v = backward(q, k, v, mask, scale, logsumexp, row_sums(d_out, out), d_out)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


blockwise.defvjp(_vjp_forward, _vjp_backward)


def row_sums(d_out: Grouped, out: Grouped) -> Float[Array, "b k g t"]:
    """What the softmax's gradient subtracts from each row."""
    return jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)


def scores(q: Grouped, k: Keys, mask: AttentionMask, queries: slice, start, scale: float) -> Float[Array, "b k g t s"]:
    """Masked float32 scores against keys [start, start + S); `start` may be traced."""
    b, n_kv, g, t, h = q.shape
    # The heads of a group are stacked on the query dimension: one product per kv head.
    s = jnp.einsum("bkmh,bksh->bkms", q.reshape(b, n_kv, g * t, h), k, preferred_element_type=jnp.float32)
    allowed = mask.allowed(queries, start, k.shape[2])
    return jnp.where(allowed[:, None, None], s.reshape(b, n_kv, g, t, k.shape[2]) * scale, MASKED)


def forward(
    q: Grouped, k: Keys, v: Keys, mask: AttentionMask, scale: float
) -> tuple[Float[Array, "b k g t h"], Float[Array, "b k g t"]]:
    """The result in float32, and the logsumexp of each row's scores, by which results over other keys can join."""
    outs, logsumexps = [], []
    for queries, first, stop in _query_blocks(q.shape[3], k.shape[2], mask):
        q_i = q[:, :, :, queries]

        def step(carry, start, size, q_i=q_i, queries=queries):
            top, total, out = carry
            s = scores(q_i, _block(k, start, size), mask, queries, start, scale)
            new_top = jnp.maximum(top, s.max(-1))
            p = jnp.exp(s - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            part = jnp.einsum("bkgts,bksh->bkgth", p.astype(v.dtype), _block(v, start, size))
            return (new_top, total * shrink + p.sum(-1), out * shrink[..., None] + part), ()

        shape = q_i.shape[:-1]
        init = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros(q_i.shape, jnp.float32))
        (top, total, out), _ = _over_keys(step, init, first, stop)
        outs.append(out / total[..., None])
        logsumexps.append(top + jnp.log(total))
    return jnp.concatenate(outs, axis=3), jnp.concatenate(logsumexps, axis=3)


def backward(q, k, v, mask: AttentionMask, scale: float, logsumexp, delta, d_out) -> tuple[jax.Array, ...]:
    """Gradients in q, k and v, float32. `logsumexp` and `delta` (`row_sums`) are those over all keys of the row."""
    d_q = []
    d_k, d_v = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for queries, first, stop in _query_blocks(q.shape[3], k.shape[2], mask):
        q_i, d_out_i = q[:, :, :, queries], d_out[:, :, :, queries]
        lse_i, delta_i = logsumexp[:, :, :, queries, None], delta[:, :, :, queries, None]

        def step(d_q_i, start, size, q_i=q_i, d_out_i=d_out_i, lse_i=lse_i, delta_i=delta_i, queries=queries):
            k_j, v_j = _block(k, start, size), _block(v, start, size)
            p = jnp.exp(scores(q_i, k_j, mask, queries, start, scale) - lse_i)
            d_p = jnp.einsum("bkgth,bksh->bkgts", d_out_i, v_j, preferred_element_type=jnp.float32)
            d_s = (p * (d_p - delta_i) * scale).astype(q.dtype)
            # Transposed: XLA:CPU would copy the whole block of scores to bring the summed dimension last.
            d_v_j = jnp.einsum("bkgth,bkgts->bkhs", d_out_i, p.astype(q.dtype)).swapaxes(2, 3)
            d_k_j = jnp.einsum("bkgth,bkgts->bkhs", q_i, d_s).swapaxes(2, 3)
            return d_q_i + jnp.einsum("bkgts,bksh->bkgth", d_s, k_j), (d_k_j, d_v_j)

        d_q_i, (d_k_i, d_v_i) = _over_keys(step, jnp.zeros(q_i.shape, jnp.float32), first, stop)
        d_q.append(d_q_i)
        d_k, d_v = d_k.at[:, :, first:stop].add(d_k_i), d_v.at[:, :, first:stop].add(d_v_i)
    return jnp.concatenate(d_q, axis=3), d_k, d_v


def _query_blocks(num_queries: int, num_keys: int, mask: AttentionMask):
    """(queries, first key, end of keys) that each block may need; static, so that nothing masked is computed."""
    size = max(MIN_QUERY_BLOCK, -(-num_queries // MAX_QUERY_BLOCKS))
    for start in range(0, num_queries, size):
        stop = min(start + size, num_queries)
        if mask.q_index is not None or mask.key_index is not None:
            yield slice(start, stop), 0, num_keys
            continue
        reach = num_keys if mask.window is None else mask.window - 1
        yield slice(start, stop), max(0, start - reach), stop if mask.causal else min(num_keys, stop + reach)


def _over_keys(step, carry, first: int, stop: int):
    """`step(carry, start, size)` over key blocks: a scan over the full ones, then the rest; ys joined over keys."""
    full = (stop - first) // KEY_BLOCK if stop - first > KEY_BLOCK else 0
    ys = []
    if full:
        carry, y = jax.lax.scan(lambda c, i: step(c, first + i * KEY_BLOCK, KEY_BLOCK), carry, jnp.arange(full))
        ys.append(jax.tree.map(lambda a: jnp.moveaxis(a, 0, 2).reshape(*a.shape[1:3], -1, a.shape[-1]), y))
    start = first + full * KEY_BLOCK
    if start < stop:
        carry, y = step(carry, start, stop - start)
        ys.append(y)
    return carry, jax.tree.map(lambda *a: jnp.concatenate(a, axis=2), *ys)


def _block(x, start, size: int):
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=2)
