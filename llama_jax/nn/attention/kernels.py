"""Attention by the kernel that the run names, on whatever mesh.

q [B, T, N, H], k and v [B, K, S, H]; query head n reads kv head n // (N/K). Softmax in float32, result in the dtype of
q. Kernels see the local part of the arrays only: `attend` splits batch, heads and sequence over the mesh. A kernel does
everything that the mask says or refuses by name. A new one is a function and a line in `KERNELS`.
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
from jaxtyping import Array, Float

from llama_jax.config import UserError
from llama_jax.nn.attention import accelerated, blockwise, context
from llama_jax.nn.masks import AttentionMask
from llama_jax.parallel import fitting, mesh_axis_sizes, platform, shard, spec

Queries = Float[Array, "b t n h"]
Keys = Float[Array, "b k s h"]


def reference(q: Queries, k: Keys, v: Keys, mask: AttentionMask, *, scale: float) -> Queries:
    """The plain formula, all scores at once: what every other kernel is compared with."""
    scores = blockwise.scores(_grouped(q, k.shape[1]), k, mask, 0, 0, scale)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return _ungrouped(jnp.einsum("bkgts,bksh->bkgth", weights, v))


def online(q: Queries, k: Keys, v: Keys, mask: AttentionMask, *, scale: float) -> Queries:
    """By blocks with an online softmax: memory linear in the sequence, on every platform."""
    return _ungrouped(blockwise.blockwise(_grouped(q, k.shape[1]), k, v, mask, scale))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """`run(q, k, v, mask, scale=)`; `refuses(q, k, mask)` says what about these it cannot do, or None."""

    run: Callable[..., jax.Array]
    refuses: Callable[[jax.Array, jax.Array, AttentionMask], str | None] = lambda q, k, mask: None


KERNELS = {
    "reference": Kernel(reference),
    "blockwise": Kernel(online),
    "splash": Kernel(accelerated.splash, accelerated.splash_refuses),
    "cudnn": Kernel(accelerated.cudnn, accelerated.cudnn_refuses),
}
FASTEST = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}


def choose(q: Any, k: Any, mask: AttentionMask) -> str:
    """The name of the kernel that `attend` takes: the mask's, or for `auto` the fastest that does all of it.

    q and k may be abstract. Raises UserError for an unknown kernel, and for one that cannot do what is asked.
    """
    name, split = mask.kernel, _splits_sequence(q, mask)
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
    if reason:
        raise UserError(f"attention_kernel={name!r} cannot do {reason}: take {able}, or auto")
    return name


@dataclasses.dataclass(frozen=True)
class Call:
    """What `attend` was called with: the avals of its arrays, and everything else."""

    q: Any
    k: Any
    v: Any
    mask: AttentionMask
    scale: float


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


def attend(q: Queries, k: Keys, v: Keys, mask: AttentionMask, *, scale: float) -> Queries:
    """softmax(scale q k^T) v over the keys that `mask` allows, by the kernel that it names."""
    if (calls := _calls.get()) is not None:
        calls.append(Call(jax.typeof(q), jax.typeof(k), jax.typeof(v), jax.tree.map(jax.typeof, mask), scale))
    name = choose(q, k, mask)
    kernel = functools.partial(KERNELS[name].run, scale=scale)
    sizes = mesh_axis_sizes()
    if not sizes:
        return kernel(q, k, v, mask)
    tensor = sizes.get("tensor", 1)
    if not _splits_sequence(q, mask):
        return _sharded(kernel, q, k, v, mask, tensor, None)
    if name == "reference":  # knows one order only, that of the text
        q, k, v = context.unzigzag(q), *(context.unzigzag(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (k, v))
        mask = jax.tree.map(context.unzigzag, mask)
        return context.zigzag(_sharded(kernel, q, k, v, mask, tensor, None))

    def on_chunks(q, k, v, mask):
        return _ungrouped(context.context_attention(_grouped(q, k.shape[1]), k, v, mask, scale))

    return _sharded(on_chunks, q, k, v, mask, tensor, "sequence")


def _splits_sequence(q: Any, mask: AttentionMask) -> bool:
    return mask.q_index is None and context.splits(q.shape[1])


def _sharded(kernel, q: Queries, k: Keys, v: Keys, mask: AttentionMask, tensor: int, sequence: str | None) -> Queries:
    """The kernel under shard_map: batch and heads split, and the sequence where the kernel can."""
    num_heads, num_kv_heads = q.shape[2], k.shape[1]
    heads = fitting("heads", num_heads)
    if heads and num_kv_heads % tensor:  # fewer kv heads than devices: each device gets a copy of the one it needs
        copies = math.lcm(num_kv_heads, tensor) // num_kv_heads
        copies = copies if num_heads % (num_kv_heads * copies) == 0 else num_heads // num_kv_heads
        k, v = (jnp.repeat(x, copies, axis=1) for x in (k, v))
    k, v = (shard(x, "batch", heads and "kv_heads", sequence, None) for x in (k, v))
    if mask.segment_ids is not None and mask.key_segment_ids is None and q.shape[1] != k.shape[2]:
        raise ValueError("segment ids need as many queries as keys")
    q = shard(q, "batch", sequence, "heads", None)
    out = spec("batch", sequence, "heads", None, shape=q.shape)
    mask = jax.tree.map(lambda x: shard(x, "batch", sequence), mask)
    y = jax.shard_map(kernel, out_specs=out, check_vma=False)(q, k, v, mask)
    return shard(y, "batch", "sequence", "heads", None)


def _grouped(q: Queries, num_kv_heads: int) -> Float[Array, "b k g t h"]:
    b, t, n, h = q.shape
    return q.reshape(b, t, num_kv_heads, n // num_kv_heads, h).transpose(0, 2, 3, 1, 4)


def _ungrouped(y: Float[Array, "b k g t h"]) -> Queries:
    b, k, g, t, h = y.shape
    return y.transpose(0, 3, 1, 2, 4).reshape(b, t, k * g, h)
