"""Cross-entropy that never holds all logits."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.parallel import reshape

Head = Callable[[jax.Array, Any], jax.Array]


def cross_entropy(
    head: Head,
    weight: Any,
    hidden: Float[Array, "b t d"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    *,
    z_loss: float | jax.Array = 0.0,
    chunk: int = 128,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(weighted sum of ce + z_loss * logsumexp^2, weighted sum of ce), in nats; `head(hidden, weight)` gives logits.

    Logits exist for `chunk` positions of each row at a time. Where a gradient is wanted, the forward pass takes it in
    the same walk: three products a chunk and nothing computed twice. z-loss: Chowdhery et al. 2022 (PaLM), section 5.
    """
    num_chunks = -(-hidden.shape[1] // chunk)
    size = -(-hidden.shape[1] // num_chunks)
    padding = num_chunks * size - hidden.shape[1]
    if padding:
        hidden, targets, weights = (
            jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)) for x in (hidden, targets, weights)
        )
    return _chunked(head, num_chunks, weight, hidden, targets, weights, jnp.float32(z_loss))


def _split(x: jax.Array, num_chunks: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, T / chunks, ...]; a chunk takes every n-th position, so a part from every device."""
    shape = (x.shape[0], x.shape[1] // num_chunks, num_chunks, *x.shape[2:])
    return jnp.moveaxis(reshape(x, shape, "batch", "sequence", *(None,) * (x.ndim - 1)), 2, 0)


def _join(x: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x, 0, 2)
    shape = (x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])
    return reshape(x, shape, "batch", "sequence", *(None,) * (len(shape) - 2))


def _chunk_loss(logits: jax.Array, targets: jax.Array, weights: jax.Array, z_loss: jax.Array) -> tuple[Any, ...]:
    lse = jax.nn.logsumexp(logits, axis=-1)
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]  # not a gather: the vocabulary may be split
    ce = jnp.sum(weights * (lse - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)))
    return ce + jnp.sum(weights * z_loss * lse**2), ce, lse, is_target


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(head: Head, num_chunks: int, weight, hidden, targets, weights, z_loss):
    def step(total, xs):
        hidden, targets, weights = xs
        loss, ce, _, _ = _chunk_loss(head(hidden, weight), targets, weights, z_loss)
        return (total[0] + loss, total[1] + ce), None

    xs = tuple(_split(x, num_chunks) for x in (hidden, targets, weights))
    return jax.lax.scan(step, (jnp.float32(0), jnp.float32(0)), xs)[0]


def _chunked_forward(head: Head, num_chunks: int, weight, hidden, targets, weights, z_loss):
    def step(carry, xs):
        total, total_ce, d_weight = carry
        hidden, targets, weights = xs
        logits, pullback = jax.vjp(head, hidden, weight)
        loss, ce, lse, is_target = _chunk_loss(logits, targets, weights, z_loss)
        softmax = jnp.exp(logits - lse[..., None])
        d_logits = softmax * (weights * (1 + 2 * z_loss * lse))[..., None] - jnp.where(is_target, weights[..., None], 0)
        d_hidden, d_weight_chunk = pullback(d_logits)
        d_weight = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), d_weight, d_weight_chunk)
        return (total + loss, total_ce + ce, d_weight), d_hidden

    xs = tuple(_split(x, num_chunks) for x in (hidden, targets, weights))
    d_weight = jax.tree.map(lambda w: jnp.zeros_like(w, jnp.float32), weight)
    (total, ce, d_weight), d_hidden = jax.lax.scan(step, (jnp.float32(0), jnp.float32(0), d_weight), xs)
    d_hidden = _join(d_hidden)
    d_weight = jax.tree.map(lambda d, w: d.astype(w.dtype), d_weight, weight)
    return (total, ce), (d_weight, d_hidden)


def _chunked_backward(head: Head, num_chunks: int, residuals, cotangents):
    d_weight, d_hidden = residuals
    d_total = cotangents[0]  # the second output is a metric: nobody differentiates it
    scale = lambda d: (d * d_total).astype(d.dtype)  # noqa: E731
    return jax.tree.map(scale, d_weight), scale(d_hidden), None, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)
