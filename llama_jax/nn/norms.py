"""Normalisation; a new norm is a config that derives from `Norm`, and its module."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llama_jax.config import Component, Known
from llama_jax.nn.base import check_above_zero
from llama_jax.nn.parameters import cast_and_gather, parameter
from llama_jax.nn.products import scaled


class Norm(Component):
    """Config of a normalisation over the last dimension: the model's, or a head's."""

    def build(self, width: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """Return the module, which maps [..., width] to the same shape and dtype."""
        raise NotImplementedError

    @classmethod
    def follow(cls, known: Known) -> dict[str, Any]:
        return {"eps": 1e-5, "bias": True}


@dataclasses.dataclass(frozen=True)
class RMSNorm(Norm):
    """x / rms(x) * weight, with no bias (Zhang and Sennrich 2019; every released Llama).

    eps: added to the mean square.
    cast_last: multiply by the weight in float32 and round after it, as ChatGLM does; Llama and T5 round first.
    zero_centered: the factor is 1 plus the weight, as in Gemma.
    """

    eps: float
    cast_last: bool = False
    zero_centered: bool = False

    def __post_init__(self) -> None:
        check_above_zero(self, "eps")

    def build(self, width: int, *, rngs: nnx.Rngs) -> "RMSNormModule":
        return RMSNormModule(self, width, rngs=rngs)


class RMSNormModule(nnx.Module):
    """Root-mean-square normalisation; the mean square is of float32 values."""

    def __init__(self, config: RMSNorm, width: int, *, rngs: nnx.Rngs):
        self.config = config
        self.weight = parameter(rngs, "weight", (width,), (None,), std=0.0 if config.zero_centered else None)

    def __call__(self, x: Float[Array, "*lead d"]) -> Float[Array, "*lead d"]:
        x_32 = x.astype(jnp.float32)
        normed = x_32 * jax.lax.rsqrt(jnp.mean(x_32 * x_32, axis=-1, keepdims=True) + self.config.eps)
        if self.config.cast_last:
            return scaled(normed, _factor(self, jnp.float32)).astype(x.dtype)
        # Cast down first, then scale: the order of Meta's and Hugging Face's code.
        return scaled(normed.astype(x.dtype), _factor(self, x.dtype))


@dataclasses.dataclass(frozen=True)
class LayerNorm(Norm):
    """(x - mean(x)) / std(x) * weight + bias (Ba et al. 2016), in float32 whatever the dtype of x.

    eps: added to the variance.
    bias: add a bias.
    zero_centered: the factor is 1 plus the weight, as in Nemotron.
    """

    eps: float
    bias: bool
    zero_centered: bool = False

    def __post_init__(self) -> None:
        check_above_zero(self, "eps")

    def build(self, width: int, *, rngs: nnx.Rngs) -> "LayerNormModule":
        return LayerNormModule(self, width, rngs=rngs)


class LayerNormModule(nnx.Module):
    """Layer normalisation, computed in float32."""

    def __init__(self, config: LayerNorm, width: int, *, rngs: nnx.Rngs):
        self.config = config
        self.weight = parameter(rngs, "weight", (width,), (None,), std=0.0 if config.zero_centered else None)
        self.bias = parameter(rngs, "bias", (width,), (None,), std=0.0) if config.bias else None

    def __call__(self, x: Float[Array, "*lead d"]) -> Float[Array, "*lead d"]:
        x_32 = x.astype(jnp.float32)
        # The variance is of centred values: the mean of squares less the squared mean would cancel.
        centred = x_32 - jnp.mean(x_32, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.config.eps)
        y = scaled(y, _factor(self, jnp.float32))
        return (y if self.bias is None else y + cast_and_gather(self.bias, jnp.float32)).astype(x.dtype)


def _factor(norm: RMSNormModule | LayerNormModule, dtype: DTypeLike) -> jax.Array:
    weight = cast_and_gather(norm.weight, dtype)
    return 1 + weight if norm.config.zero_centered else weight
