"""Feed-forwards."""

import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llama_jax.config import UserError
from llama_jax.nn.dropout import check_rate, dropout
from llama_jax.nn.masks import AttentionMask
from llama_jax.nn.mixer import FeedForward, FeedForwardModule
from llama_jax.nn.parameters import Projection, child

Activation = Literal["relu", "relu_squared", "gelu", "gelu_tanh", "silu", "tanh"]
ACTIVATIONS = {
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, "Primer"
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}
_INSIDE = ("batch", "sequence", "mlp")


@dataclasses.dataclass(frozen=True)
class MLP(FeedForward):
    """down(activation(up(x))): the feed-forward of Vaswani et al. 2017, BERT, GPT and T5.

    intermediate_size: width inside.
    activation: relu, relu_squared, gelu (exact), gelu_tanh (its approximation), silu or tanh.
    bias: biases on both projections.
    dropout: rate after the activation.
    """

    intermediate_size: int
    activation: Activation
    bias: bool
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check(self.intermediate_size, self.dropout)

    def build(self, width: int, *, rngs: nnx.Rngs) -> "MLPModule":
        return MLPModule(self, width, rngs=rngs)


class MLPModule(FeedForwardModule):
    def __init__(self, config: MLP, width: int, *, rngs: nnx.Rngs):
        self.config = config
        outer, inner = {"embed": width}, {"mlp": config.intermediate_size}
        self.up_proj = Projection(outer, inner, bias=config.bias, rngs=child(rngs, "up_proj"))
        self.down_proj = Projection(inner, outer, bias=config.bias, rngs=child(rngs, "down_proj"))

    def __call__(
        self, x: Float[Array, "b t d"], *, mask: AttentionMask
    ) -> tuple[Float[Array, "b t d"], dict[str, jax.Array]]:
        h = ACTIVATIONS[self.config.activation](self.up_proj(x))
        return self.down_proj(dropout(h, self.config.dropout, mask, "feed_forward", _INSIDE)), {}


@dataclasses.dataclass(frozen=True)
class GatedLinearUnit(FeedForward):
    """down(activation(gate(x)) * up(x)): ReGLU, GEGLU and their like (Shazeer 2020, eqs. 5 and 6).

    intermediate_size: width inside.
    activation: relu, relu_squared, gelu (exact), gelu_tanh (its approximation), silu or tanh.
    bias: biases on all three projections.
    dropout: rate after the product.
    """

    intermediate_size: int
    activation: Activation
    bias: bool
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check(self.intermediate_size, self.dropout)

    def build(self, width: int, *, rngs: nnx.Rngs) -> "GatedLinearUnitModule":
        return GatedLinearUnitModule(self, width, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class SwiGLU(FeedForward):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, "GLU variants improve Transformer", eq. 6).

    intermediate_size: width inside.
    bias: biases on all three projections.
    """

    intermediate_size: int
    bias: bool
    activation: ClassVar[Activation] = "silu"
    dropout: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        _check(self.intermediate_size, self.dropout)

    def build(self, width: int, *, rngs: nnx.Rngs) -> "GatedLinearUnitModule":
        return GatedLinearUnitModule(self, width, rngs=rngs)


class GatedLinearUnitModule(FeedForwardModule):
    def __init__(self, config: GatedLinearUnit | SwiGLU, width: int, *, rngs: nnx.Rngs):
        self.config = config
        outer, inner = {"embed": width}, {"mlp": config.intermediate_size}
        self.gate_proj = Projection(outer, inner, bias=config.bias, rngs=child(rngs, "gate_proj"))
        self.up_proj = Projection(outer, inner, bias=config.bias, rngs=child(rngs, "up_proj"))
        self.down_proj = Projection(inner, outer, bias=config.bias, rngs=child(rngs, "down_proj"))

    def __call__(
        self, x: Float[Array, "b t d"], *, mask: AttentionMask
    ) -> tuple[Float[Array, "b t d"], dict[str, jax.Array]]:
        h = ACTIVATIONS[self.config.activation](self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(dropout(h, self.config.dropout, mask, "feed_forward", _INSIDE)), {}


def _check(intermediate_size: int, rate: float) -> None:
    if intermediate_size < 1:
        raise UserError(f"intermediate_size={intermediate_size} must be at least 1")
    check_rate("dropout", rate)
