"""Dropout whose bits are a function of the step's key and of a name, on every mesh the same."""

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama_jax.config import UserError
from llama_jax.nn.masks import AttentionMask
from llama_jax.parallel import spec


def check_rate(name: str, rate: float) -> None:
    """Raises UserError where the option `name` is no share that can be dropped."""
    if not 0 <= rate < 1:
        raise UserError(f"{name}={rate} must be at least 0 and below 1")


def random_key(mask: AttentionMask, name: str) -> jax.Array:
    """The key of what is called `name` in this layer and step."""
    return jax.random.fold_in(mask.dropout_key, zlib.crc32(name.encode()))


def dropout(
    x: Float[Array, "b *rest"],
    rate: float,
    mask: AttentionMask,
    name: str,
    axes: tuple[str | None, ...] = ("batch", "sequence", None),
) -> Float[Array, "b *rest"]:
    """x with each number zeroed at this rate and the others grown to make up for it (Srivastava et al. 2014).

    Does nothing outside of training. `name` tells it from the layer's other dropouts; `axes` name x's dimensions.
    """
    if rate == 0 or mask.dropout_key is None:
        return x
    keep = jax.random.bernoulli(random_key(mask, name), 1 - rate, x.shape, out_sharding=spec(*axes, shape=x.shape))
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
