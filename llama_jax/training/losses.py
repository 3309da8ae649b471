"""Cross-entropy in chunks, so that never all logits exist at once."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.models import loss_chunks
from llama_jax.nn import PyTree
from llama_jax.parallel import axes_of, mesh_axis_sizes, platform, shard

Head = Callable[[jax.Array, PyTree], jax.Array]


def cross_entropy(
    head: Head,
    weight: PyTree,
    hidden: Float[Array, "b t d"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    *,
    z_loss: float | jax.Array = 0.0,
    label_smoothing: float | jax.Array = 0.0,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return (weighted sum of smoothed ce + z_loss * logsumexp^2, weighted sum of ce), in nats.

    `head(hidden, weight)` gives logits; `weight` is the head's as it is stored on the mesh. Logits exist for `chunk`
    positions of each row at a time (`loss_chunks`), split over the vocabulary where the head is. Where a gradient is
    wanted, the forward pass computes it in the same walk: three products a chunk and nothing computed twice. z-loss:
    Chowdhery et al. 2022 (PaLM), section 5. Label smoothing e takes 1 - e of the target and e of the vocabulary's mean
    (Szegedy et al. 2016, section 7).
    """
    hidden = shard(hidden, "batch", "sequence", None)
    targets, weights = (shard(x, "batch", "sequence") for x in (targets, weights))
    options = jnp.float32(z_loss), jnp.float32(label_smoothing)
    return _chunked(head, chunk, weight, hidden, targets, weights, options)


def token_cross_entropy(
    head: Head, weight: PyTree, hidden: Float[Array, "b t d"], targets: Int[Array, "b t"], *, chunk: int | None = None
) -> Float[Array, "b t"]:
    """Return the cross-entropy of every target in nats, computed as by `cross_entropy`; it is never differentiated."""
    hidden, targets = shard(hidden, "batch", "sequence", None), shard(targets, "batch", "sequence")
    layout = _layout(head, weight, hidden)

    def local(weight: PyTree, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        weight = jax.tree.map(lambda w, axes: _gather(w, axes, layout.vocab), weight, layout.stored)
        length = hidden.shape[1]
        num_chunks = loss_chunks(chunk, len(targets), length, platform())

        def values(xs: tuple[jax.Array, jax.Array]) -> jax.Array:
            lse, own, _ = _target_logits(head(xs[0], weight), xs[1], layout.vocab)
            return lse - own

        return _join(jax.lax.map(values, (_split(hidden, num_chunks), _split(targets, num_chunks))))[:, :length]

    if not mesh_axis_sizes():
        return local(weight, hidden, targets)
    out_specs = jax.typeof(targets).sharding.spec
    return jax.shard_map(local, out_specs=out_specs, check_vma=False)(weight, hidden, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(head: Head, chunk: int | None, *arrays: PyTree) -> PyTree:
    return _walk(head, chunk, False, *arrays)[0]


def _chunked_forward(head: Head, chunk: int | None, *arrays: PyTree) -> PyTree:
    return _walk(head, chunk, True, *arrays)


def _chunked_backward(head: Head, chunk: int | None, residuals: PyTree, cotangents: PyTree) -> PyTree:
    d_weight, d_hidden = residuals
    d_total = cotangents[0]  # the second output is a metric that is never differentiated
    scale = lambda d: (d * d_total).astype(d.dtype)  # noqa: E731
    return jax.tree.map(scale, d_weight), scale(d_hidden), None, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


class _Layout(NamedTuple):
    """Mesh axes of the positions, of the vocabulary, and of each dimension of the stored weight (a tree of tuples)."""

    batch: tuple[str, ...]
    vocab: tuple[str, ...]
    stored: PyTree


def _layout(head: Head, weight: PyTree, hidden: jax.Array) -> _Layout:
    """Return the layout of these arrays on the current mesh."""
    stored = jax.tree.map(axes_of, weight)
    if not mesh_axis_sizes():
        return _Layout((), (), stored)
    vocab_axes = axes_of(jax.eval_shape(head, hidden, weight))[-1]
    if not any(vocab_axes in axes_of(w) for w in jax.tree.leaves(weight)):
        vocab_axes = ()  # stored whole: every device has all of the vocabulary
    return _Layout(tuple(axis for entry in axes_of(hidden)[:2] for axis in entry), vocab_axes, stored)


def _walk(
    head: Head, chunk: int | None, with_gradient: bool, weight: PyTree, hidden: jax.Array, *others: PyTree
) -> PyTree:
    """Return ((loss, ce), (d_weight, d_hidden)); None for the gradients where they are not wanted.

    `others` are targets, weights and (z_loss, label_smoothing).
    """
    layout = _layout(head, weight, hidden)
    if not mesh_axis_sizes():
        return _local_walk(head, chunk, with_gradient, layout, weight, hidden, *others)
    # Every device walks over its own positions with its own part of the vocabulary, and only sums travel: maxima and
    # sums of exponentials over the vocabulary, and once, at the end, the gradient of the weight.
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (weight, hidden))
    none = jax.sharding.PartitionSpec()
    local = functools.partial(_local_walk, head, chunk, with_gradient, layout)
    out_specs = ((none, none), specs if with_gradient else None)
    return jax.shard_map(local, out_specs=out_specs, check_vma=False)(weight, hidden, *others)


def _local_walk(
    head: Head,
    chunk: int | None,
    with_gradient: bool,
    layout: _Layout,
    weight: PyTree,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    options: tuple[jax.Array, jax.Array],
) -> PyTree:
    """Return what `_walk` does, from a device's part of the arrays, in chunks of positions."""
    weight = jax.tree.map(lambda w, axes: _gather(w, axes, layout.vocab), weight, layout.stored)
    length = hidden.shape[1]
    num_chunks = loss_chunks(chunk, len(targets), length, platform())
    z_loss, smoothing = options

    def step(carry: PyTree, xs: tuple[jax.Array, ...]) -> PyTree:
        totals, d_weight = carry
        hidden, targets, weights = xs
        logits, pullback = jax.vjp(head, hidden, weight)
        loss, ce, lse, is_target, size = _chunk_loss(logits, targets, weights, options, layout.vocab)
        totals = totals[0] + loss, totals[1] + ce
        if not with_gradient:
            return (totals, None), None
        # Derivatives by the logits: softmax - wanted of the cross-entropy, 2 * z_loss * lse * softmax of the z-loss.
        softmax = jnp.exp(logits - lse[..., None])
        wanted = jnp.where(is_target, 1 - smoothing, 0) + smoothing / size
        d_logits = weights[..., None] * (softmax * (1 + 2 * z_loss * lse)[..., None] - wanted)
        d_logits = jnp.where(weights[..., None] != 0, d_logits, 0)
        d_hidden, d_weight_chunk = pullback(d_logits)
        # Summed in float32, whatever the weight's type.
        d_weight = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), d_weight, d_weight_chunk)
        return (totals, d_weight), _psum(d_hidden, layout.vocab)

    zero = jnp.float32(0)
    d_weight = jax.tree.map(lambda w: jnp.zeros_like(w, jnp.float32), weight) if with_gradient else None
    chunks = tuple(_split(x, num_chunks) for x in (hidden, targets, weights))
    d_hidden: Any
    (totals, d_weight), d_hidden = jax.lax.scan(step, ((zero, zero), d_weight), chunks)
    totals = tuple(_psum(total, layout.batch) for total in totals)
    if not with_gradient:
        return totals, None
    d_weight = jax.tree.map(lambda d, w: d.astype(w.dtype), d_weight, weight)
    d_weight = jax.tree.map(lambda d, axes: _reduce(d, axes, layout), d_weight, layout.stored)
    return totals, (d_weight, _join(d_hidden)[:, :length])


def _split(x: jax.Array, num_chunks: int) -> jax.Array:
    """Return [B, T, ...] as [chunks, B, T / chunks, ...], padded with zeros."""
    padding = -x.shape[1] % num_chunks
    if padding:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, x.shape[1] // num_chunks, *x.shape[2:]), 1, 0)


def _join(x: jax.Array) -> jax.Array:
    """Return the inverse of `_split`, still padded."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _chunk_loss(
    logits: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    options: tuple[jax.Array, jax.Array],
    vocab_axes: tuple[str, ...],
) -> tuple[Any, ...]:
    """Return (loss, ce, logsumexp [B, T], which logit is the target's [B, T, V], size of the vocabulary) of a chunk.

    `vocab_axes` are those that split the vocabulary.
    """
    z_loss, smoothing = options
    lse, own, is_target = _target_logits(logits, targets, vocab_axes)
    size = _psum(logits.shape[-1], vocab_axes)
    used = smoothing != 0
    mean = jax.lax.cond(used, lambda: jnp.sum(logits, axis=-1), lambda: jnp.zeros_like(lse))
    mean = _psum(mean, vocab_axes) / size

    def total(of_target: jax.Array, used: jax.Array | bool = True) -> jax.Array:
        # Values without weight, and terms that are not used, may be infinite: 0 times inf would be NaN.
        return jnp.sum(jnp.where((weights != 0) & used, weights * of_target, 0))

    ce = total(lse - own)
    loss = ce + total(smoothing * (own - mean), used) + total(z_loss * lse**2, z_loss != 0)
    return loss, ce, lse, is_target, size


def _target_logits(
    logits: jax.Array, targets: jax.Array, vocab_axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (logsumexp [B, T], the targets' logits [B, T], which logit is the target's [B, T, V])."""
    if vocab_axes:
        # Targets in another device's part of the vocabulary fall outside of 0 ... V here, and match no logit.
        targets = targets - jax.lax.axis_index(vocab_axes) * logits.shape[-1]
        top = jax.lax.pmax(jnp.max(logits, axis=-1), vocab_axes)
        lse = top + jnp.log(_psum(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1), vocab_axes))
    else:
        lse = jax.nn.logsumexp(logits, axis=-1)
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    if platform() == "cpu" and not vocab_axes:  # a masked sum, as TPUs want it, is two passes over all logits here
        own = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]
    else:
        own = _psum(jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1), vocab_axes)
    return lse, own, is_target


def _psum[T](x: T, axes: tuple[str, ...]) -> T:
    return jax.lax.psum(x, axes) if axes else x


def _gather(x: jax.Array, stored: tuple[tuple[str, ...], ...], kept: tuple[str, ...]) -> jax.Array:
    """Return a stored weight, whole along all axes but those that are `kept`."""
    for dimension, axes in enumerate(stored):
        if axes and axes != kept:
            x = jax.lax.all_gather(x, axes, axis=dimension, tiled=True)
    return x


def _reduce(x: jax.Array, stored: tuple[tuple[str, ...], ...], layout: _Layout) -> jax.Array:
    """Return the sum of all devices' gradients of a gathered weight, on each device the part that it stores."""
    left = list(layout.batch)
    for dimension, axes in enumerate(stored):
        if not axes or axes == layout.vocab:
            continue
        if all(axis in left for axis in axes):
            x = jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True)
            left = [axis for axis in left if axis not in axes]
        else:  # the batch is whole along them: every device has it all and keeps its part
            size = x.shape[dimension] // jax.lax.axis_size(axes)
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * size, size, axis=dimension)
    return _psum(x, tuple(left))
