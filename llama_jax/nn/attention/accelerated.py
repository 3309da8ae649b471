"""Attention by the kernels of others: splash attention on TPU, cuDNN's on NVIDIA GPUs; arrays as in `attend`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llama_jax.nn.attention import context
from llama_jax.nn.attention.blockwise import Keys, Sinks, Values
from llama_jax.nn.base import Mask
from llama_jax.parallel import mesh_axis_sizes, platform

LANES = 128  # numbers in the last dimension of a TPU's vector registers
SPLASH_BLOCK = 512

Queries = Float[Array, "b t n h"]
Results = Float[Array, "b t n v"]


def _refuse_cross(q: Any, k: Any, mask: Mask) -> str | None:
    """Return what neither splash nor cuDNN can do: both are for a sequence that attends to itself, or None."""
    if mask.query_places is not None or mask.key_places is not None:
        return "queries at places of a cache"
    if mask.key_segment_ids is not None:
        return "keys of another sequence"
    if q.shape[1] != k.shape[2]:
        return f"{q.shape[1]} queries of {k.shape[2]} keys"
    return "a prefix that is seen whole" if mask.prefix is not None else None


def splash_refuses(q: Any, k: Any, mask: Mask) -> str | None:
    """Return what of this splash attention cannot do, or None."""
    size = mesh_axis_sizes().get(context.AXIS, 1) if context.splits(q.shape[1]) else 1
    part = f" in {size} parts" if size > 1 else ""
    misfit = f"a sequence of {q.shape[1]}{part}, no multiple of {LANES * size}" if q.shape[1] % (LANES * size) else None
    return _refuse_cross(q, k, mask) or misfit


def splash(
    q: Queries,
    k: Keys,
    v: Values,
    mask: Mask,
    sinks: Sinks | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    parts: int = 1,
) -> Results:
    """Compute attention by splash attention (Pallas, part of JAX); it is interpreted where there is no TPU, for tests.

    With `parts`, those of the context axis around, inside `shard_map`: the local part of the result, of keys gathered
    from all devices. Queries stay in zigzag order: the mask has their places in the text.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as sa  # imports Pallas, which takes a while

    kernel, of_queries = _splash_kernel(q, mask, softcap, parts), mask.segment_ids
    of_keys: Any = of_queries
    if parts > 1:
        if mask.causal or mask.window is not None:
            infos, options = kernel.tree_flatten()
            kernel = kernel.tree_unflatten(options, [_own_tables(info, parts) for info in infos])
        k, v = (context.gathered(x, 2) for x in (k, v))
        of_keys = None if of_queries is None else context.gathered(of_queries, 1)
    q = (q * scale).astype(q.dtype).swapaxes(1, 2)
    segments = None if of_queries is None else sa.SegmentIds(of_queries, of_keys)
    sinks = None if sinks is None else sinks.reshape(-1)
    y: Any = jax.vmap(lambda q, k, v, segments: kernel(q, k, v, segments, sinks))(q, k, v, segments)
    return y.swapaxes(1, 2)


def _own_tables(info: Any, parts: int) -> Any:
    """Return the tables of this device's queries, which are among those of all devices."""
    me = jax.lax.axis_index(context.AXIS)

    def part(x: jax.Array | None, axis: int) -> jax.Array | None:
        length = 0 if x is None else x.shape[axis] // parts
        return None if x is None else jax.lax.dynamic_slice_in_dim(x, me * length, length, axis)

    of_blocks = {name: part(getattr(info, name), 1) for name in ("data_next", "mask_next", "block_mask")}
    return info._replace(**of_blocks, q_sequence=part(info.q_sequence, 0))


def _splash_kernel(q: Queries, mask: Mask, softcap: float | None, parts: int) -> Any:
    """Return the kernel of a sequence of which q has one of `parts`, with the tables of all parts."""
    from jax.experimental.pallas.ops.tpu import splash_attention as sa

    length, shape = q.shape[1], (parts * q.shape[1], parts * q.shape[1])
    if mask.window is not None:
        head = sa.LocalMask(shape, (mask.window - 1, 0 if mask.causal else mask.window - 1), 0)
    elif mask.causal:
        head = sa.CausalMask(shape)
    else:  # the same for each part
        head, parts = sa.FullMask((length, shape[1])), 1
    if not isinstance(head, sa.FullMask):
        chunks = np.split(head.q_sequence, 2 * parts)
        head.q_sequence = np.concatenate([chunks[i] for i in context.chunk_order(parts)])
    block = max(size for size in range(LANES, SPLASH_BLOCK + 1, LANES) if length % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    # Made anew in every trace: its tables are arrays of the trace, since the devices may not be here.
    return sa.make_splash_mha(
        sa.MultiHeadMask([head] * q.shape[2]),
        block_sizes=sa.BlockSizes(**dict.fromkeys(names, block)),
        head_shards=1,
        q_seq_shards=parts,
        attn_logits_soft_cap=softcap,
        interpret=platform() != "tpu",
    )


def cudnn_refuses(q: Any, k: Any, mask: Mask) -> str | None:
    """Return what of this cuDNN's attention cannot do, or None."""
    if reason := _refuse_cross(q, k, mask):
        return reason
    if mask.window is not None and not mask.causal:
        return "a window that reaches beyond the query"
    if mask.segment_ids is not None and q.shape[1] % 2:
        return f"documents in a sequence of {q.shape[1]}, an odd length"
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"{np.dtype(q.dtype).name}"
    return f"a head_dim of {q.shape[-1]}" if q.shape[-1] % 8 or q.shape[-1] > 256 else None


def cudnn(q: Queries, k: Keys, v: Values, mask: Mask, *, scale: float) -> Results:
    """Compute attention by cuDNN's flash attention, on an NVIDIA GPU.

    Documents are kept apart by a dense mask [B, 1, T, T], since the kernel takes no segment ids; values of another
    size than the keys are padded.
    """
    v_head_dim, head_dim = v.shape[-1], max(q.shape[-1], v.shape[-1])
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, head_dim - x.shape[-1]))) for x in (q, k, v))
    allowed = None
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
