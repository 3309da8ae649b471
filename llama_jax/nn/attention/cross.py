"""Attention from one sequence to another, as decoders attend to what the encoder made of the source."""

import dataclasses

from flax import nnx
from jaxtyping import Array, Float

from llama_jax.config import Component, UserError
from llama_jax.nn.attention.grouped_query import check_heads, projections
from llama_jax.nn.attention.kernels import attend
from llama_jax.nn.dropout import check_rate, random_key
from llama_jax.nn.masks import AttentionMask

Keys = dict[str, Float[Array, "b k s h"]]


@dataclasses.dataclass(frozen=True)
class CrossAttention(Component):
    """Attention to a source (Vaswani et al. 2017, section 3.2.3; Bahdanau et al. 2015), without positions.

    num_heads: query heads.
    num_kv_heads: key/value heads; divides num_heads.
    head_dim: size of a head.
    qkv_bias: biases on the query, key and value projections.
    out_bias: a bias on the output projection.
    scale: of the scores; none for 1/sqrt(head_dim).
    dropout: rate on the attention weights.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool
    out_bias: bool
    scale: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_heads(self.num_heads, self.num_kv_heads)
        if self.head_dim < 1:
            raise UserError(f"head_dim={self.head_dim} must be at least 1")
        if self.scale is not None and self.scale <= 0:
            raise UserError(f"scale={self.scale} must be above 0")
        check_rate("dropout", self.dropout)

    @property
    def needs_rng(self) -> bool:
        """Whether training draws random numbers in it."""
        return self.dropout > 0

    def build(self, width: int, *, rngs: nnx.Rngs) -> "CrossAttentionModule":
        return CrossAttentionModule(self, width, rngs=rngs)

    def score_flops(self, context: float) -> float:
        """FLOPs of one target token beyond its parameters' products, with a source of `context` tokens."""
        return 4 * self.num_heads * self.head_dim * context


class CrossAttentionModule(nnx.Module):
    def __init__(self, config: CrossAttention, width: int, *, rngs: nnx.Rngs):
        self.config = config
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = projections(config, width, rngs=rngs)

    def keys(self, source: Float[Array, "b s d"]) -> Keys:
        """Keys and values of the source, `k` and `v` [B, K, S, H]: the same for every target token, so made once."""
        return {"k": self.k_proj(source).swapaxes(1, 2), "v": self.v_proj(source).swapaxes(1, 2)}

    def __call__(self, x: Float[Array, "b t d"], keys: Keys, *, mask: AttentionMask) -> Float[Array, "b t d"]:
        """[B, T, D] and what `keys` made -> [B, T, D].

        `mask` is not causal; its `segment_ids` [B, T] are those of the targets, its `key_segment_ids` [B, S] those of
        the source.
        """
        if mask.causal or mask.bias is not None:
            raise ValueError("a target token sees all of its source, and has no position among its tokens")
        config = self.config
        scale = config.head_dim**-0.5 if config.scale is None else config.scale
        if mask.dropout_key is not None:  # else it would drop what the layer's other attention drops
            mask = dataclasses.replace(mask, dropout_key=random_key(mask, "cross attention"))
        k, v = (keys[name].astype(x.dtype) for name in ("k", "v"))
        return self.o_proj(attend(self.q_proj(x), k, v, mask, scale=scale, dropout=config.dropout))
