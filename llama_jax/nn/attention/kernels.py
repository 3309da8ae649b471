"""Attention by the kernel that the run names, on whatever mesh.

q [B, T, N, H], k [B, K, S, H], v [B, K, S, V]; query head n reads kv head n // (N/K). Softmax in float32, result
[B, T, N, V] in the dtype of q; a query that may see nothing gets zeros, and passes no gradient. Kernels see the local
part of the arrays only: `attend` splits batch, heads and sequence over the mesh. A kernel does everything that the mask
says or refuses by name. A new one is a function and a line in `KERNELS`.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from llama_jax.config import UserError
from llama_jax.nn.attention import accelerated, blockwise, context
from llama_jax.nn.dropout import random_key
from llama_jax.nn.masks import AttentionMask
from llama_jax.parallel import fitting, mesh_axis_sizes, platform, shard, spec

Queries = Float[Array, "b t n h"]
Keys = Float[Array, "b k s h"]
Values = Float[Array, "b k s v"]
Results = Float[Array, "b t n v"]


def reference(
    q: Queries,
    k: Keys,
    v: Values,
    mask: AttentionMask,
    bias: Float[Array, "#b n t s"] | None = None,
    keep: Bool[Array, "b n t s"] | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Results:
    """The plain formula, all scores at once: what every other kernel is compared with, and the one that does all."""
    allowed = mask.allowed(0, q.shape[1], 0, k.shape[2])[:, None, None]
    scores = blockwise.scores(_grouped(q, k.shape[1]), k, AttentionMask(causal=False), 0, 0, scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores += _per_group(bias, k.shape[1])
    weights = jax.nn.softmax(jnp.where(allowed, scores, blockwise.MASKED), axis=-1)
    weights = jnp.where(allowed, weights, 0)  # of a query that sees nothing the softmax has made 1/S each
    if keep is not None:
        weights = jnp.where(_per_group(keep, k.shape[1]), weights / (1 - dropout), 0)
    return _ungrouped(jnp.einsum("bkgts,bksh->bkgth", weights.astype(v.dtype), v))


def blockwise_attention(q: Queries, k: Keys, v: Values, mask: AttentionMask, *, scale: float) -> Results:
    """By blocks with an online softmax: memory linear in the sequence, on every platform."""
    return _ungrouped(blockwise.blockwise(_grouped(q, k.shape[1]), k, v, mask, scale))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """`run(q, k, v, mask, scale=)`; `refuses(q, k, mask)` says what about these it cannot do, or None."""

    run: Callable[..., jax.Array]
    refuses: Callable[[jax.Array, jax.Array, AttentionMask], str | None] = lambda q, k, mask: None


KERNELS = {
    "reference": Kernel(reference),
    "blockwise": Kernel(blockwise_attention),
    "splash": Kernel(accelerated.splash, accelerated.splash_refuses),
    "cudnn": Kernel(accelerated.cudnn, accelerated.cudnn_refuses),
}
FASTEST = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}


def choose(q: Any, k: Any, mask: AttentionMask, *, softcap: float | None = None, dropout: float = 0.0) -> str:
    """The name of the kernel that `attend` takes: the mask's, or for `auto` the fastest that does all of it.

    q and k may be abstract. Raises UserError for an unknown kernel, and for one that cannot do what is asked.
    """
    name, split = mask.kernel, _splits_sequence(q, k, mask)
    if name in ("auto", "reference") and _only_reference(q, k, mask, softcap, dropout):
        return "reference"
    if name == "auto":
        name = FASTEST.get(platform(), "blockwise")
        if split or KERNELS[name].refuses(q, k, mask):
            name = "blockwise"
        if split:
            return "reference" if mask.prefix is not None else name
        return name if q.shape[1] > blockwise.MIN_QUERY_BLOCK else "reference"
    if name not in KERNELS:
        raise UserError(f"attention_kernel={name!r} does not exist: the kernels are auto, {', '.join(KERNELS)}")
    reason = KERNELS[name].refuses(q, k, mask)
    if split and name not in ("blockwise", "reference"):
        reason = "a sequence split over mesh.context"
    able = "blockwise"
    if split and mask.prefix is not None and name != "reference":
        # A device's keys would be needed by queries before them: the zigzag order balances the causal work only.
        reason, able = "a prefix that is seen whole on a sequence split over mesh.context", "reference"
    if name != "reference" and (beyond := _only_reference(q, k, mask, softcap, dropout)):
        reason, able = beyond, "reference"
    if reason:
        raise UserError(f"attention_kernel={name!r} cannot do {reason}: take {able}, or auto")
    return name


def _only_reference(q: Any, k: Any, mask: AttentionMask, softcap: float | None, dropout: float) -> str | None:
    """What of this no other kernel can do, or None."""
    if mask.bias is not None:
        return "a bias of the scores"
    if softcap is not None:
        return "a soft cap of the scores"
    if dropout and mask.dropout_key is not None:
        return "dropout of the attention weights"
    if _splits_sequence(q, k, mask) and (mask.key_segment_ids is not None or q.shape[1] != k.shape[2]):
        return "keys of another sequence on mesh.context"
    return None


@dataclasses.dataclass(frozen=True)
class Call:
    """What `attend` was called with: the avals of its arrays, and everything else."""

    q: Any
    k: Any
    v: Any
    mask: AttentionMask
    scale: float
    softcap: float | None
    dropout: float


_calls: contextvars.ContextVar[list[Call] | None] = contextvars.ContextVar("calls", default=None)


@contextlib.contextmanager
def calls_of_attend() -> Iterator[list[Call]]:
    """Collects the calls of `attend` while something is traced."""
    calls: list[Call] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


def attend(
    q: Queries,
    k: Keys,
    v: Values,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Results:
    """softmax(scale q k^T + bias) v over the keys that `mask` allows, by the kernel that it names.

    `softcap` c squashes the scaled scores s to c tanh(s / c); `dropout` zeroes attention weights at this rate, in
    training. A sequence that a context axis splits is in zigzag order; there may be more queries than keys, or fewer.
    """
    if (calls := _calls.get()) is not None:
        aval = jax.typeof
        calls.append(Call(aval(q), aval(k), aval(v), jax.tree.map(aval, mask), scale, softcap, dropout))
    name = choose(q, k, mask, softcap=softcap, dropout=dropout)
    kernel = functools.partial(KERNELS[name].run, scale=scale)
    if mask.segment_ids is not None and mask.key_segment_ids is None and q.shape[1] != k.shape[2]:
        raise ValueError("segment ids need as many queries as keys, or key_segment_ids")
    bias, keep = mask.bias, None
    if bias is not None and bias.shape[1] != q.shape[2]:
        raise UserError(
            f"the position bias is for {bias.shape[1]} heads and the attention has {q.shape[2]}: make them equal"
        )
    if name == "reference":
        kernel = functools.partial(kernel, softcap=softcap, dropout=dropout)
        if dropout and mask.dropout_key is not None:
            shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[2])
            partition = spec("batch", "heads", None, None, shape=shape)
            key = random_key(mask, "attention weights")
            keep = jax.random.bernoulli(key, 1 - dropout, shape, out_sharding=partition)
    # What else the mask says is not for kernels.
    mask = dataclasses.replace(mask, bias=None, valid=None, dropout_key=None)
    sizes = mesh_axis_sizes()
    if not sizes:
        return kernel(q, k, v, mask, **_given(bias=bias, keep=keep))
    tensor = sizes.get("tensor", 1)
    if not _splits_sequence(q, k, mask):
        return _sharded(kernel, q, k, v, mask, tensor, None, bias, keep)
    if name == "reference":  # knows one order only, that of the text
        q, k, v = context.unzigzag(q), *(context.unzigzag(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (k, v))
        mask = jax.tree.map(context.unzigzag, mask)
        return context.zigzag(_sharded(kernel, q, k, v, mask, tensor, None, bias, keep))

    def on_chunks(q, k, v, mask):
        return _ungrouped(context.context_attention(_grouped(q, k.shape[1]), k, v, mask, scale))

    return _sharded(on_chunks, q, k, v, mask, tensor, "sequence")


def _splits_sequence(q: Any, k: Any, mask: AttentionMask) -> bool:
    """Return whether queries or keys are split over mesh.context, in zigzag order; a cache is not."""
    return mask.q_index is None and (context.splits(q.shape[1]) or context.splits(k.shape[2]))


def _given(**arrays: jax.Array | None) -> dict[str, jax.Array]:
    return {name: x for name, x in arrays.items() if x is not None}


def _sharded(
    kernel,
    q: Queries,
    k: Keys,
    v: Values,
    mask: AttentionMask,
    tensor: int,
    sequence: str | None,
    bias: jax.Array | None = None,
    keep: jax.Array | None = None,
) -> Results:
    """The kernel under shard_map: batch and heads split, and the sequence where the kernel can."""
    num_heads, num_kv_heads = q.shape[2], k.shape[1]
    heads = fitting("heads", num_heads)
    if heads and num_kv_heads % tensor:  # fewer kv heads than devices: each device gets a copy of the one it needs
        copies = math.lcm(num_kv_heads, tensor) // num_kv_heads
        copies = copies if num_heads % (num_kv_heads * copies) == 0 else num_heads // num_kv_heads
        k, v = (jnp.repeat(x, copies, axis=1) for x in (k, v))
    k, v = (shard(x, "batch", heads and "kv_heads", sequence, None) for x in (k, v))
    q = shard(q, "batch", sequence, "heads", None)
    out = spec("batch", sequence, "heads", None, shape=(*q.shape[:3], v.shape[3]))
    mask = jax.tree.map(lambda x: shard(x, "batch", sequence), mask)
    tables = {name: shard(x, "batch", "heads", None, None) for name, x in _given(bias=bias, keep=keep).items()}
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
