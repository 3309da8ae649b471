"""The Transformer (Vaswani et al. 2017, arXiv 1706.03762), from which BART and Marian are made too.

Its weights were not released. The paper's table 3 rounds: with a vocabulary of 37,000 the sizes below have 63 and 214
million parameters, where it says 65 and 213.
"""

from typing import Any, Literal

from llama_jax.config import UserError
from llama_jax.models import EncoderDecoderConfig, LayerOverride
from llama_jax.nn import (
    MLP,
    Activation,
    CrossAttention,
    FeedForward,
    GroupedQuery,
    LayerNorm,
    Mixer,
    Positions,
    SinusoidalPositions,
)


def transformer(
    *,
    vocab_size: int,
    hidden_size: int,
    num_encoder_layers: int,
    num_layers: int,
    encoder_heads: int,
    num_heads: int,
    encoder_intermediate_size: int,
    intermediate_size: int,
    max_positions: int,
    positions: Positions,
    decoder_start_id: int,
    scale_embedding: bool,
    activation: Activation = "relu",
    embedding_norm: bool = False,
    head_bias: Literal["none", "trained", "fixed"] = "none",
    eps: float = 1e-5,
    dropout: float = 0.1,
    attention_dropout: float = 0.0,
    activation_dropout: float = 0.0,
    never_written: tuple[int, ...] = (),
) -> EncoderDecoderConfig:
    """A model of these sizes, made as the paper has it: norms after the sums, biases everywhere, one embedding."""
    norm = LayerNorm(eps=eps, bias=True)

    def heads(count: int, name: str) -> dict[str, Any]:
        if count < 1 or hidden_size % count:
            raise UserError(f"hidden_size={hidden_size} is not divisible by {name}={count}")
        return {
            "num_heads": count,
            "num_kv_heads": count,
            "head_dim": hidden_size // count,
            "qkv_bias": True,
            "out_bias": True,
            "dropout": attention_dropout,
        }

    def pieces(count: int, name: str, size: int) -> tuple[Mixer, FeedForward]:
        feed_forward = MLP(size, activation, bias=True, dropout=activation_dropout)
        return GroupedQuery(rope=None, **heads(count, name)), feed_forward

    own = pieces(num_heads, "num_heads", intermediate_size)
    of_encoder = pieces(encoder_heads, "encoder_heads", encoder_intermediate_size)
    everywhere = tuple(range(num_encoder_layers))
    return EncoderDecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_encoder_layers=num_encoder_layers,
        max_positions=max_positions,
        attention=own[0],
        cross_attention=CrossAttention(**heads(num_heads, "num_heads")),
        feed_forward=own[1],
        norm=norm,
        norm_placement="post",
        positions=positions,
        embedding_norm=norm if embedding_norm else None,
        embedding_scale=hidden_size**0.5 if scale_embedding else 1.0,
        tie_embeddings=True,
        head_bias=head_bias,
        decoder_start_id=decoder_start_id,
        dropout=dropout,
        never_written=never_written,
        encoder_overrides=tuple(
            LayerOverride(everywhere, piece) for piece, same in zip(of_encoder, own, strict=True) if piece != same
        ),
    )


def _preset(hidden_size: int, num_heads: int, intermediate_size: int, dropout: float) -> EncoderDecoderConfig:
    # Token 1 is BOS in the package's tokenizers, and the paper speaks of no limit to the positions.
    return transformer(
        vocab_size=37_000,
        hidden_size=hidden_size,
        num_encoder_layers=6,
        num_layers=6,
        encoder_heads=num_heads,
        num_heads=num_heads,
        encoder_intermediate_size=intermediate_size,
        intermediate_size=intermediate_size,
        max_positions=512,
        positions=SinusoidalPositions(),
        decoder_start_id=1,
        scale_embedding=True,
        dropout=dropout,
    )


OBJECTIVES = ("ParallelText",)
# The big one dropped 0.3 for English to German, and 0.1 for French.
PRESETS = {
    "transformer_base": _preset(512, 8, 2048, dropout=0.1),
    "transformer_big": _preset(1024, 16, 4096, dropout=0.3),
}
