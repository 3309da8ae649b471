"""Attention by the kernel that the run names, on whatever mesh.

q [B, T, N, H], k [B, K, S, H], v [B, K, S, V]; query head n reads kv head n // (N/K). Softmax in float32, result
[B, T, N, V] in the dtype of q; a query without any key to attend to gets zeros, and passes no gradient. Kernels get
the local part of the arrays only: `attend` splits batch, heads and sequence over the mesh. A kernel does everything
that the mask has or refuses by name. A new kernel is a function and a line in `KERNELS`.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from llama_jax.config import UserError
from llama_jax.nn.attention import blockwise, context
from llama_jax.nn.attention.accelerated import (
    Queries,
    Results,
    cudnn,
    cudnn_refuses,
    splash,
    splash_refuses,
)
from llama_jax.nn.attention.blockwise import Keys, Sinks, Values
from llama_jax.nn.base import ForwardContext, Mask, record, recording
from llama_jax.nn.draws import kept
from llama_jax.parallel import fitting, mesh_axis_sizes, platform, replicate, shard, spec

PART_BYTES = 1 << 19  # of keys: reading fewer costs less than choosing them


def reference(
    q: Queries,
    k: Keys,
    v: Values,
    mask: Mask,
    bias: Float[Array, "#b n t s"] | None = None,
    keep: Bool[Array, "b n t s"] | None = None,
    sinks: Sinks | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Results:
    """Compute attention by the plain formula, all scores at once: the kernel that does everything.

    `bias` is added to the scaled scores; `keep` is false at probabilities that `dropout` zeroes. `sinks` are scores
    in the softmax's denominator, without a key or value.
    """

    def over(size: int) -> Results:
        keys, values = k[:, :, :size], v[:, :, :size]
        allowed = mask.allowed(0, q.shape[1], 0, size)[:, None, None]
        own = None if bias is None else bias[..., :size]
        probs = _probabilities(q, keys, allowed, own, sinks, scale=scale, softcap=softcap)
        if keep is not None:
            probs = jnp.where(_per_group(keep[..., :size], k.shape[1]), probs / (1 - dropout), 0)
        return _ungrouped(jnp.einsum("bkgts,bksh->bkgth", probs.astype(v.dtype), values))

    sizes = _sizes(k, mask)
    if len(sizes) == 1:
        return over(k.shape[2])
    # No query is behind the last place, so no key after it is read.
    which = (np.array(sizes) <= mask.query_places.max()).sum()
    return jax.lax.switch(which, [functools.partial(over, size) for size in sizes])


def _sizes(k: Keys, mask: Mask) -> list[int]:
    """Return numbers of first keys, of which the smallest that reaches the last query is read of a cache on a CPU."""
    length = k.shape[2]
    whole = mask.query_places is None or mask.key_places is not None or not mask.causal or mask.prefix is not None
    if platform() != "cpu" or whole:
        return [length]
    parts = max(1, (k.size * k.dtype.itemsize // PART_BYTES).bit_length())
    return [length >> i for i in reversed(range(parts)) if length >> i]


def _probabilities(
    q: Queries, k: Keys, allowed: jax.Array, bias: Any, sinks: Any, *, scale: float, softcap: float | None
) -> Float[Array, "b kv g t s"]:
    """Return the float32 attention weights, 0 where nothing is `allowed`."""
    scores = blockwise.scores(_grouped(q, k.shape[1]), k, Mask(causal=False), 0, 0, scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores += _per_group(bias, k.shape[1])
    scores = jnp.where(allowed, scores, blockwise.MASKED)
    probs = jax.nn.softmax(scores, axis=-1)
    if sinks is not None:  # the share of the keys, beside the sink's
        total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        probs *= jax.nn.sigmoid(total - _per_group(sinks, k.shape[1]))
    return jnp.where(allowed, probs, 0)  # where nothing is allowed the softmax has made 1/S of each


def blockwise_attention(
    q: Queries, k: Keys, v: Values, mask: Mask, sinks: Sinks | None = None, *, scale: float
) -> Results:
    """Compute attention by blocks with an online softmax: memory linear in the sequence, on every platform."""
    return _ungrouped(blockwise.blockwise(_grouped(q, k.shape[1]), k, v, mask, sinks, scale))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An attention kernel: `run(q, k, v, mask, scale=)`, and `refuses(q, k, mask)`, what it cannot do or None."""

    run: Callable[..., jax.Array]
    refuses: Callable[[jax.Array, jax.Array, Mask], str | None] = lambda q, k, mask: None


KERNELS = {
    "reference": Kernel(reference),
    "blockwise": Kernel(blockwise_attention),
    "splash": Kernel(splash, splash_refuses),
    "cudnn": Kernel(cudnn, cudnn_refuses),
}
FASTEST = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}


def choose(
    q: Any, k: Any, ctx: ForwardContext, *, softcap: float | None = None, dropout: float = 0.0, sinks: bool = False
) -> str:
    """Return the name of the kernel that `attend` takes: the context's, or for `auto` the fastest that does all of it.

    q and k may be abstract. Raises UserError for an unknown kernel, and for one that cannot do what is asked.
    """
    name = ctx.kernel
    if name != "auto" and name not in KERNELS:
        raise UserError(f"attention_kernel={name!r} does not exist: the kernels are auto, {', '.join(KERNELS)}")
    refusal = functools.partial(_refusal, q=q, k=k, ctx=ctx, softcap=softcap, dropout=dropout, sinks=sinks)
    if name == "auto":
        if q.shape[1] <= blockwise.MIN_QUERY_BLOCK and not _is_split(q, k, ctx.mask):
            return "reference"
        able = (FASTEST.get(platform(), "blockwise"), "blockwise", "reference")
        return next(kernel for kernel in able if refusal(kernel) is None)
    if (reason := refusal(name)) is not None:
        able = "blockwise" if refusal("blockwise") is None else "reference"
        raise UserError(f"attention_kernel={name!r} cannot do {reason}: take {able}, or auto")
    return name


def _refusal(
    kernel: str, q: Any, k: Any, ctx: ForwardContext, softcap: float | None, dropout: float, sinks: bool
) -> str | None:
    """Return what of this attention the kernel cannot do, or None."""
    if kernel == "reference":
        return None
    if ctx.position_bias is not None:
        return "a bias of the scores"
    if softcap is not None and kernel != "splash":
        return "a soft cap of the scores"
    if dropout and ctx.dropout_key is not None:
        return "dropout of the attention weights"
    if sinks and kernel == "cudnn":
        return "attention sinks"
    if _is_split(q, k, ctx.mask):
        if ctx.mask.key_segment_ids is not None or q.shape[1] != k.shape[2]:
            return "keys of another sequence on mesh.context"
        if ctx.mask.prefix is not None:
            # A device's keys would be needed by queries before them: the zigzag order balances the causal work only.
            return "a prefix that is seen whole on a sequence split over mesh.context"
        if kernel == "cudnn":
            return "a sequence split over mesh.context"
        if kernel == "splash" and ctx.context_strategy != "all_gather":
            return "a ring over mesh.context (with compute.context='all_gather' it can)"
    return KERNELS[kernel].refuses(q, k, ctx.mask)


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call of `attend`, or the abstract values of its arrays.

    `chosen` [B, T, S], of sparse attention, is true at the keys that a query may attend to, mask included.
    """

    q: Any
    k: Any
    v: Any
    ctx: ForwardContext
    scale: float
    softcap: float | None
    dropout: float
    chosen: Any = None
    sinks: Any = None


@contextlib.contextmanager
def calls_of_attend() -> Iterator[list[Call]]:
    """Collect the calls of `attend`, abstract, while something is traced."""
    calls: list[Call] = []

    def keep(name: str, value: Any) -> None:
        if name == "attend" and value.chosen is None:
            q, k, v, ctx, sinks = jax.tree.map(jax.typeof, (value.q, value.k, value.v, value.ctx, value.sinks))
            calls.append(dataclasses.replace(value, q=q, k=k, v=v, ctx=ctx, sinks=sinks))

    with recording(keep):
        yield calls


def attention_weights(call: Call) -> Float[Array, "b n t s"]:
    """Return the float32 weights of a recorded call of `attend`, without dropout, in the order of the text.

    They are whole on every device. Queries that see no key have weights of 0.
    """
    q, k, mask = call.q, call.k, call.ctx.mask
    if _is_split(q, k, mask):
        q, k = context.unzigzag(q), context.unzigzag(k.swapaxes(1, 2)).swapaxes(1, 2)
        mask = jax.tree.map(context.unzigzag, mask)
    own = call.ctx.position_bias, call.chosen, call.sinks
    q, k, mask, bias, chosen, sinks = jax.tree.map(replicate, (q, k, mask, *own))
    allowed = mask.allowed(0, q.shape[1], 0, k.shape[2]) if chosen is None else chosen
    probs = _probabilities(q, k, allowed[:, None, None], bias, sinks, scale=call.scale, softcap=call.softcap)
    return probs.reshape(q.shape[0], q.shape[2], q.shape[1], k.shape[2])


def attend(
    q: Queries,
    k: Keys,
    v: Values,
    ctx: ForwardContext,
    *,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
    sinks: Sinks | None = None,
) -> Results:
    """Compute softmax(scale q k^T + bias) v over the keys that the mask allows, by the kernel that the context names.

    `softcap` c squashes the scaled scores s to c tanh(s / c); `dropout` zeroes attention weights at this rate, in
    training; `sinks` are a score of each head that is in the softmax's denominator alone. A sequence that a context
    axis splits is in zigzag order; there may be more queries than keys, or fewer.
    """
    record("attend", lambda: Call(q, k, v, ctx, scale, softcap, dropout, sinks=sinks))
    name = choose(q, k, ctx, softcap=softcap, dropout=dropout, sinks=sinks is not None)
    mask, bias = ctx.mask, ctx.position_bias
    kernel = functools.partial(KERNELS[name].run, scale=scale)
    if mask.segment_ids is not None and mask.key_segment_ids is None and q.shape[1] != k.shape[2]:
        raise ValueError("segment ids need as many queries as keys, or key_segment_ids")
    if bias is not None and bias.shape[1] != q.shape[2]:
        raise UserError(
            f"the position bias is for {bias.shape[1]} heads and the attention has {q.shape[2]}: make them equal"
        )
    # [B, N, T, S] each; all but the sinks are for the reference only.
    tables = {key: x for key, x in (("bias", bias), ("sinks", sinks)) if x is not None}
    if name in ("reference", "splash"):
        kernel = functools.partial(kernel, softcap=softcap)
    if name == "reference":
        kernel = functools.partial(kernel, dropout=dropout)
        if dropout and ctx.dropout_key is not None:
            shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[2])
            tables["keep"] = kept(dropout, ctx, "attention weights", shape, ("batch", "heads", None, None))
    if not mesh_axis_sizes():
        return kernel(q, k, v, mask, **tables)
    if not _is_split(q, k, mask):
        return _sharded(kernel, q, k, v, mask, tables)
    if name == "reference":  # works in the order of the text only
        q, k, v = context.unzigzag(q), *(context.unzigzag(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (k, v))
        return context.zigzag(_sharded(kernel, q, k, v, jax.tree.map(context.unzigzag, mask), tables))
    if name == "splash":
        kernel = functools.partial(kernel, parts=mesh_axis_sizes()[context.AXIS])
    else:
        kernel = functools.partial(_split_attention, scale=scale, strategy=ctx.context_strategy)
    return _sharded(kernel, q, k, v, mask, tables, sequence="sequence")


def _split_attention(
    q: Queries, k: Keys, v: Values, mask: Mask, sinks: Sinks | None = None, *, scale: float, strategy: str
) -> Results:
    return _ungrouped(context.context_attention(_grouped(q, k.shape[1]), k, v, mask, sinks, scale, strategy))


def _is_split(q: Any, k: Any, mask: Mask) -> bool:
    """Return whether queries or keys are split over mesh.context, in zigzag order; a cache is not."""
    return mask.query_places is None and (context.splits(q.shape[1]) or context.splits(k.shape[2]))


def _sharded(
    kernel: Callable[..., jax.Array],
    q: Queries,
    k: Keys,
    v: Values,
    mask: Mask,
    tables: dict[str, jax.Array],
    sequence: str | None = None,
) -> Results:
    """Run the kernel under shard_map, with batch and heads split, and the sequence where the kernel can."""
    num_heads, num_kv_heads, tensor = q.shape[2], k.shape[1], mesh_axis_sizes().get("tensor", 1)
    heads = fitting("heads", num_heads)
    if heads and num_kv_heads % tensor:  # fewer kv heads than devices: each device gets a copy of the one it needs
        copies = math.lcm(num_kv_heads, tensor) // num_kv_heads
        copies = copies if num_heads % (num_kv_heads * copies) == 0 else num_heads // num_kv_heads
        k, v = (jnp.repeat(x, copies, axis=1) for x in (k, v))
    k, v = (shard(x, "batch", heads and "kv_heads", sequence, None) for x in (k, v))
    q = shard(q, "batch", sequence, "heads", None)
    out = spec("batch", sequence, "heads", None, shape=(*q.shape[:3], v.shape[3]))
    mask = jax.tree.map(lambda x: shard(x, "batch", sequence), mask)
    tables = {name: shard(x, "batch", "heads", None, None) for name, x in tables.items()}
    local = lambda q, k, v, mask, tables: kernel(q, k, v, mask, **tables)  # noqa: E731
    y = jax.shard_map(local, out_specs=out, check_vma=False)(q, k, v, mask, tables)
    return shard(y, "batch", "sequence", "heads", None)


def _grouped(q: Queries, num_kv_heads: int) -> Float[Array, "b k g t h"]:
    b, t, n, h = q.shape
    return q.reshape(b, t, num_kv_heads, n // num_kv_heads, h).transpose(0, 2, 3, 1, 4)


def _per_group(x: Shaped[Array, "b n t s"], num_kv_heads: int) -> Shaped[Array, "b k g t s"]:
    return x.reshape(x.shape[0], num_kv_heads, -1, *x.shape[2:])


def _ungrouped(y: Float[Array, "b k g t v"]) -> Results:
    b, k, g, t, h = y.shape
    return y.transpose(0, 3, 1, 2, 4).reshape(b, t, k * g, h)
