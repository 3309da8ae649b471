"""Attention kernels: the plain reference, and a blockwise one whose memory is linear in the sequence.

q [B, T, N, H], k and v [B, K, S, H]; query head n reads kv head n // (N/K). Softmax in float32, result in the dtype of
q. Both see the local part of the arrays only: `attend` splits batch and heads over the mesh.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama_jax.config import UserError
from llama_jax.nn.masks import AttentionMask
from llama_jax.parallel import fitting, mesh_axis_sizes, shard, spec

MASKED = -1e30  # finite, so that a fully masked block does not make inf - inf
MAX_QUERY_BLOCKS = 16
MIN_QUERY_BLOCK = 128
KEY_BLOCK = 512

Queries = Float[Array, "b t n h"]
Keys = Float[Array, "b k s h"]


def attend(q: Queries, k: Keys, v: Keys, mask: AttentionMask, *, scale: float) -> Queries:
    """softmax(scale q k^T) v over the keys that `mask` allows, by the kernel that it names.

    Raises UserError for an unknown kernel.
    """
    name = mask.kernel
    if name == "auto":
        name = "blockwise" if q.shape[1] > MIN_QUERY_BLOCK else "reference"
    if name not in KERNELS:
        raise UserError(f"attention_kernel={name!r} does not exist: the kernels are auto, {', '.join(KERNELS)}")
    kernel = functools.partial(KERNELS[name], scale=scale)
    sizes = mesh_axis_sizes()
    if math.prod(sizes.values()) <= 1:
        return kernel(q, k, v, mask)
    return _sharded(kernel, q, k, v, mask, sizes.get("tensor", 1))


def _sharded(kernel, q: Queries, k: Keys, v: Keys, mask: AttentionMask, tensor: int) -> Queries:
    """The kernel under shard_map, batch and heads split; keys and values are gathered along the sequence."""
    num_heads, num_kv_heads = q.shape[2], k.shape[1]
    heads = fitting("heads", num_heads)
    if heads and num_kv_heads % tensor:  # fewer kv heads than devices: each device gets a copy of the one it needs
        copies = math.lcm(num_kv_heads, tensor) // num_kv_heads
        copies = copies if num_heads % (num_kv_heads * copies) == 0 else num_heads // num_kv_heads
        k, v = (jnp.repeat(x, copies, axis=1) for x in (k, v))
    k, v = (shard(x, "batch", heads and "kv_heads", None, None) for x in (k, v))
    if mask.segment_ids is not None and q.shape[1] != k.shape[2]:
        raise ValueError("segment ids need as many queries as keys")
    q = shard(q, "batch", None, "heads", None)  # with a context axis, a shard's queries are not the first ones
    out = spec("batch", None, "heads", None, shape=q.shape)
    mask = jax.tree.map(lambda x: shard(x, "batch", None), mask)
    y = jax.shard_map(kernel, out_specs=out, check_vma=False)(q, k, v, mask)
    return shard(y, "batch", "sequence", "heads", None)


def _grouped(q: Queries, num_kv_heads: int) -> Float[Array, "b k g t h"]:
    b, t, n, h = q.shape
    return q.reshape(b, t, num_kv_heads, n // num_kv_heads, h).transpose(0, 2, 3, 1, 4)


def _ungrouped(y: Float[Array, "b k g t h"]) -> Queries:
    b, k, g, t, h = y.shape
    return y.transpose(0, 3, 1, 2, 4).reshape(b, t, k * g, h)


def _scores(q, k, mask: AttentionMask, queries: slice, start, scale: float) -> Float[Array, "b k g t s"]:
    """Masked float32 scores against keys [start, start + S); `start` may be traced."""
    b, n_kv, g, t, h = q.shape
    # The heads of a group are stacked on the query dimension: one product per kv head.
    s = jnp.einsum("bkmh,bksh->bkms", q.reshape(b, n_kv, g * t, h), k, preferred_element_type=jnp.float32)
    allowed = mask.allowed(queries, start, k.shape[2])
    return jnp.where(allowed[:, None, None], s.reshape(b, n_kv, g, t, k.shape[2]) * scale, MASKED)


def reference(q: Queries, k: Keys, v: Keys, mask: AttentionMask, *, scale: float) -> Queries:
    """The plain formula, all scores at once: what every other kernel is compared with."""
    q_ = _grouped(q, k.shape[1])
    scores = _scores(q_, k, mask, slice(0, q.shape[1]), 0, scale)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return _ungrouped(jnp.einsum("bkgts,bksh->bkgth", weights, v))


def blockwise(q: Queries, k: Keys, v: Keys, mask: AttentionMask, *, scale: float) -> Queries:
    """Exact attention by blocks with an online softmax (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1).

    Neither direction ever holds more than a [T/16, 512] block of scores per head, and blocks above the diagonal are not
    computed: a causal block of queries reads only the keys up to its end.
    """
    return _ungrouped(_blockwise(_grouped(q, k.shape[1]), k, v, mask, scale))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(q, k, v, mask, scale):
    return _blockwise_forward(q, k, v, mask, scale)[0]


def _query_blocks(num_queries: int, num_keys: int, mask: AttentionMask):
    """(queries, number of keys they may need) of each block; static, so that nothing masked is computed."""
    size = max(MIN_QUERY_BLOCK, -(-num_queries // MAX_QUERY_BLOCKS))
    for start in range(0, num_queries, size):
        stop = min(start + size, num_queries)
        yield slice(start, stop), stop if mask.causal and mask.q_index is None else num_keys


def _over_keys(step, carry, num_keys: int):
    """`step(carry, start, size)` over key blocks: a scan over the full ones, then the rest; ys joined over keys."""
    full = num_keys // KEY_BLOCK if num_keys > KEY_BLOCK else 0
    ys = []
    if full:
        carry, y = jax.lax.scan(lambda c, i: step(c, i * KEY_BLOCK, KEY_BLOCK), carry, jnp.arange(full))
        ys.append(jax.tree.map(lambda a: jnp.moveaxis(a, 0, 2).reshape(*a.shape[1:3], -1, a.shape[-1]), y))
    if rest := num_keys - full * KEY_BLOCK:
        carry, y = step(carry, full * KEY_BLOCK, rest)
        ys.append(y)
    return carry, jax.tree.map(lambda *a: jnp.concatenate(a, axis=2), *ys)


def _block(x, start, size: int):
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=2)


def _blockwise_forward(q, k, v, mask, scale):
    outs, logsumexps = [], []
    for queries, num_keys in _query_blocks(q.shape[3], k.shape[2], mask):
        q_i = q[:, :, :, queries]

        def step(carry, start, size, q_i=q_i, queries=queries):
            top, total, out = carry
            s = _scores(q_i, _block(k, start, size), mask, queries, start, scale)
            new_top = jnp.maximum(top, s.max(-1))
            p = jnp.exp(s - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            part = jnp.einsum("bkgts,bksh->bkgth", p.astype(v.dtype), _block(v, start, size))
            return (new_top, total * shrink + p.sum(-1), out * shrink[..., None] + part), ()

        shape = q_i.shape[:-1]
        init = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros(q_i.shape, jnp.float32))
        (top, total, out), _ = _over_keys(step, init, num_keys)
        outs.append((out / total[..., None]).astype(q.dtype))
        logsumexps.append(top + jnp.log(total))
    out, logsumexp = jnp.concatenate(outs, axis=3), jnp.concatenate(logsumexps, axis=3)
    return out, (q, k, v, mask, out, logsumexp)


def _blockwise_backward(scale, residuals, d_out):
    q, k, v, mask, out, logsumexp = residuals
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    d_q = []
    d_k, d_v = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for queries, num_keys in _query_blocks(q.shape[3], k.shape[2], mask):
        q_i, d_out_i = q[:, :, :, queries], d_out[:, :, :, queries]
        lse_i, delta_i = logsumexp[:, :, :, queries, None], delta[:, :, :, queries, None]

        def step(d_q_i, start, size, q_i=q_i, d_out_i=d_out_i, lse_i=lse_i, delta_i=delta_i, queries=queries):
            k_j, v_j = _block(k, start, size), _block(v, start, size)
            p = jnp.exp(_scores(q_i, k_j, mask, queries, start, scale) - lse_i)
            d_p = jnp.einsum("bkgth,bksh->bkgts", d_out_i, v_j, preferred_element_type=jnp.float32)
            d_s = (p * (d_p - delta_i) * scale).astype(q.dtype)
            d_v_j = jnp.einsum("bkgts,bkgth->bksh", p.astype(q.dtype), d_out_i)
            d_k_j = jnp.einsum("bkgts,bkgth->bksh", d_s, q_i)
            return d_q_i + jnp.einsum("bkgts,bksh->bkgth", d_s, k_j), (d_k_j, d_v_j)

        d_q_i, (d_k_i, d_v_i) = _over_keys(step, jnp.zeros(q_i.shape, jnp.float32), num_keys)
        d_q.append(d_q_i.astype(q.dtype))
        d_k, d_v = d_k.at[:, :, :num_keys].add(d_k_i), d_v.at[:, :, :num_keys].add(d_v_i)
    return jnp.concatenate(d_q, axis=3), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)

KERNELS = {"reference": reference, "blockwise": blockwise}
