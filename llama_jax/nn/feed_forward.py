"""Feed-forwards that act on every token alone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from llama_jax.nn.base import FeedForward, FeedForwardModule, ForwardContext, check_at_least, check_rate
from llama_jax.nn.draws import dropout
from llama_jax.nn.parameters import Projection, child, joined_products

Activation = Literal["relu", "relu_squared", "gelu", "gelu_tanh", "quick_gelu", "silu", "tanh"]
ACTIVATIONS = {
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, "Primer"
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # Hendrycks and Gimpel 2016, section 2
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def activated(activation: Callable[[jax.Array], jax.Array], x: jax.Array, up: jax.Array | None = None) -> jax.Array:
    """Return activation(x), times `up` where there is one; the backward pass computes it again from both."""
    return activation(x) if up is None else activation(x) * up


def _activated_backward(
    activation: Callable[[jax.Array], jax.Array], inputs: tuple[jax.Array, jax.Array | None], d_y: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    x, up = inputs
    x = jnp.where(d_y > jnp.inf, 0, x)  # as `products.never`, for each value: they may be split over devices
    return jax.vjp(functools.partial(activated.fun, activation), x, up)[1](d_y)


activated.defvjp(lambda activation, x, up=None: (activated(activation, x, up), (x, up)), _activated_backward)


def _check(config: "MLP | GatedLinearUnit | SwiGLU") -> None:
    check_at_least(config, 1, "intermediate_size")
    check_rate("dropout", config.dropout)


@dataclasses.dataclass(frozen=True)
class MLP(FeedForward):
    """down(activation(up(x))): the feed-forward of Vaswani et al. 2017, BERT, GPT and T5.

    intermediate_size: width inside.
    activation: relu, relu_squared, gelu (exact), gelu_tanh and quick_gelu (approximations), silu or tanh.
    bias: biases on both projections.
    dropout: rate after the activation.
    """

    intermediate_size: int
    activation: Activation
    bias: bool
    dropout: float = 0.0

    __post_init__ = _check

    def build(self, width: int, *, rngs: nnx.Rngs) -> "FeedForwardProjections":
        return FeedForwardProjections(self, width, gated=False, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class GatedLinearUnit(FeedForward):
    """down(activation(gate(x)) * up(x)): ReGLU, GEGLU and their like (Shazeer 2020, eqs. 5 and 6).

    intermediate_size: width inside.
    activation: relu, relu_squared, gelu (exact), gelu_tanh and quick_gelu (approximations), silu or tanh.
    bias: biases on all three projections.
    dropout: rate after the product.
    """

    intermediate_size: int
    activation: Activation
    bias: bool
    dropout: float = 0.0

    __post_init__ = _check

    def build(self, width: int, *, rngs: nnx.Rngs) -> "FeedForwardProjections":
        return FeedForwardProjections(self, width, gated=True, rngs=rngs)


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

    __post_init__ = _check

    def build(self, width: int, *, rngs: nnx.Rngs) -> "FeedForwardProjections":
        return FeedForwardProjections(self, width, gated=True, rngs=rngs)


class FeedForwardProjections(FeedForwardModule):
    """The projections of a feed-forward, with or without a gate."""

    def __init__(self, config: MLP | GatedLinearUnit | SwiGLU, width: int, *, gated: bool, rngs: nnx.Rngs):
        self.config = config
        outer, inner = {"embed": width}, {"mlp": config.intermediate_size}
        projection = functools.partial(Projection, bias=config.bias)
        self.gate_proj = projection(outer, inner, rngs=child(rngs, "gate_proj")) if gated else None
        self.up_proj = projection(outer, inner, rngs=child(rngs, "up_proj"))
        self.down_proj = projection(inner, outer, rngs=child(rngs, "down_proj"))

    @property
    def same_inputs(self) -> tuple[Projection, ...]:
        """The projections whose inputs are the same."""
        return (self.up_proj,) if self.gate_proj is None else (self.gate_proj, self.up_proj)

    def __call__(
        self, x: Float[Array, "b t d"], *, ctx: ForwardContext
    ) -> tuple[Float[Array, "b t d"], dict[str, jax.Array]]:
        activation = ACTIVATIONS[self.config.activation]
        *gate, up = joined_products(x, *self.same_inputs) or [projection(x) for projection in self.same_inputs]
        up = checkpoint_name(up, "up")
        h = activated(activation, *gate, up)
        return self.down_proj(dropout(h, self.config.dropout, ctx, "feed_forward", ("batch", "sequence", "mlp"))), {}
