"""Kernels of others: splash attention on TPU (Pallas, part of JAX) and cuDNN's flash attention on GPU.

Both are for a sequence that attends to itself, where every query sees at least its own key.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.nn.masks import AttentionMask
from llama_jax.parallel import platform

LANES = 128  # what a TPU's vector registers hold in their last dimension
SPLASH_BLOCK = 512


def _refuse(q: Any, k: Any, mask: AttentionMask) -> str | None:
    """What neither can do, or None."""
    if mask.q_index is not None or mask.key_index is not None:
        return "queries at places of a cache"
    if mask.key_segment_ids is not None:
        return "keys of another sequence"
    if q.shape[1] != k.shape[2]:
        return f"{q.shape[1]} queries of {k.shape[2]} keys"
    if mask.prefix is not None:
        return "a prefix that is seen whole"
    return None


def splash_refuses(q: Any, k: Any, mask: AttentionMask) -> str | None:
    """Why splash attention cannot do this, or None."""
    if reason := _refuse(q, k, mask):
        return reason
    if q.shape[1] % LANES:
        return f"a sequence of {q.shape[1]}, no multiple of {LANES}"
    return None


def splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask, *, scale: float) -> jax.Array:
    """q [B, T, N, H], k [B, K, T, H], v [B, K, T, V] -> [B, T, N, V].

    Interpreted where there is no TPU: slow, for tests.
    """
    num_heads, length = q.shape[2], q.shape[1]
    from jax.experimental.pallas.ops.tpu import splash_attention as sa  # imports Pallas, which takes a while

    kernel = _splash_kernel(num_heads, length, mask.causal, mask.window, platform() != "tpu")
    q = (q * scale).astype(q.dtype).swapaxes(1, 2)
    segments = None if mask.segment_ids is None else sa.SegmentIds(mask.segment_ids, mask.segment_ids)
    y: Any = jax.vmap(kernel)(q, k, v, segments)
    return y.swapaxes(1, 2)


def _splash_kernel(num_heads: int, length: int, causal: bool, window: int | None, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as sa

    shape = (length, length)
    if window is not None:
        one = sa.LocalMask(shape, (window - 1, 0 if causal else window - 1), 0)
    else:
        one = sa.CausalMask(shape) if causal else sa.FullMask(shape)
    block = max(size for size in range(LANES, SPLASH_BLOCK + 1, LANES) if length % size == 0)
    sizes = sa.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    # Made anew in every trace: its tables are arrays of the trace, since the devices may not be here.
    return sa.make_splash_mha(
        sa.MultiHeadMask([one] * num_heads), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )


def cudnn_refuses(q: Any, k: Any, mask: AttentionMask) -> str | None:
    """Why cuDNN's attention cannot do this, or None."""
    if reason := _refuse(q, k, mask):
        return reason
    if mask.window is not None and not mask.causal:
        return "a window that reaches beyond the query"
    if mask.segment_ids is not None and q.shape[1] % 2:
        return f"documents in a sequence of {q.shape[1]}, an odd length"
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"{np.dtype(q.dtype).name}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"a head_dim of {q.shape[-1]}"
    return None


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask, *, scale: float) -> jax.Array:
    """q [B, T, N, H], k [B, K, T, H], v [B, K, T, V] -> [B, T, N, V], on an NVIDIA GPU.

    Documents are kept apart by a dense mask [B, 1, T, T]: the kernel takes no segment ids, nor values of another size
    than the keys.
    """
    allowed, v_head_dim = None, v.shape[-1]
    head_dim = max(q.shape[-1], v_head_dim)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, head_dim - x.shape[-1]))) for x in (q, k, v))
    if mask.segment_ids is not None:
        allowed = (mask.segment_ids[:, :, None] == mask.segment_ids[:, None])[:, None]
    window = None
    if mask.window is not None:
        window = (mask.window - 1, 0 if mask.causal else mask.window - 1)
    y = jax.nn.dot_product_attention(
        q,
        k.swapaxes(1, 2),
        v.swapaxes(1, 2),
        mask=allowed,
        scale=scale,
        is_causal=mask.causal,
        local_window_size=window,
        implementation="cudnn",
    )
    return y[..., :v_head_dim]
