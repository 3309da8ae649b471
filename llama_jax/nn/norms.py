"""Normalisation."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llama_jax.config import Component, UserError
from llama_jax.nn.parameters import parameter, use


class Norm(Component):
    """Config of a normalisation over the model dimension."""

    def build(self, width: int, *, rngs: nnx.Rngs) -> nnx.Module:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class RMSNorm(Norm):
    """x / rms(x) * weight, with no bias (Zhang and Sennrich 2019; every released Llama).

    eps: added to the mean square.
    """

    eps: float

    def __post_init__(self) -> None:
        if self.eps <= 0:
            raise UserError(f"eps={self.eps} must be above 0")

    def build(self, width: int, *, rngs: nnx.Rngs) -> "RMSNormModule":
        return RMSNormModule(self, width, rngs=rngs)


class RMSNormModule(nnx.Module):
    def __init__(self, config: RMSNorm, width: int, *, rngs: nnx.Rngs):
        self.eps = config.eps
        self.weight = parameter(rngs, "weight", (width,), (None,), std=None)

    def __call__(self, x: Float[Array, "*lead d"]) -> Float[Array, "*lead d"]:
        x_32 = x.astype(jnp.float32)
        normal = x_32 * jax.lax.rsqrt(jnp.mean(x_32 * x_32, axis=-1, keepdims=True) + self.eps)
        # Cast down first, then scale: the order of Meta's and Hugging Face's code.
        return normal.astype(x.dtype) * use(self.weight, x.dtype)
