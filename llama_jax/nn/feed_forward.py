"""Feed-forwards."""

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Float

from llama_jax.config import UserError
from llama_jax.nn.masks import AttentionMask
from llama_jax.nn.mixer import FeedForward, FeedForwardModule
from llama_jax.nn.parameters import Projection, child


@dataclasses.dataclass(frozen=True)
class SwiGLU(FeedForward):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, "GLU variants improve Transformer", eq. 6).

    intermediate_size: width inside.
    bias: biases on all three projections.
    """

    intermediate_size: int
    bias: bool

    def __post_init__(self) -> None:
        if self.intermediate_size < 1:
            raise UserError(f"intermediate_size={self.intermediate_size} must be at least 1")

    def build(self, width: int, *, rngs: nnx.Rngs) -> "SwiGLUModule":
        return SwiGLUModule(self, width, rngs=rngs)


class SwiGLUModule(FeedForwardModule):
    def __init__(self, config: SwiGLU, width: int, *, rngs: nnx.Rngs):
        outer, inner = {"embed": width}, {"mlp": config.intermediate_size}
        self.gate_proj = Projection(outer, inner, bias=config.bias, rngs=child(rngs, "gate_proj"))
        self.up_proj = Projection(outer, inner, bias=config.bias, rngs=child(rngs, "up_proj"))
        self.down_proj = Projection(inner, outer, bias=config.bias, rngs=child(rngs, "down_proj"))

    def __call__(
        self, x: Float[Array, "b t d"], *, mask: AttentionMask
    ) -> tuple[Float[Array, "b t d"], dict[str, jax.Array]]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)), {}
