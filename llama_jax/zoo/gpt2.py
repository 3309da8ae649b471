"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm before each sublayer, GELU, a tied head."""

from collections.abc import Mapping
from typing import Any

from llama_jax.config import UserError
from llama_jax.models import DecoderConfig
from llama_jax.nn import MLP, Activation, GroupedQuery, LayerNorm, LearnedPositions
from llama_jax.zoo import Weight
from llama_jax.zoo.reading import CAUSAL, ConfigReader, checked, expect, read_activation, write_activation


def gpt(
    *,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    max_positions: int,
    vocab_size: int = 50257,
    intermediate_size: int | None = None,
    activation: Activation = "gelu_tanh",
    eps: float = 1e-5,
    scale: float | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    tie_embeddings: bool = True,
) -> DecoderConfig:
    """A decoder of this shape, its attention as wide as itself and its feed-forward four times (by default)."""
    if num_heads < 1 or hidden_size % num_heads:
        raise UserError(f"hidden_size={hidden_size} is not divisible by num_heads={num_heads}")
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        max_positions=max_positions,
        attention=GroupedQuery(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=hidden_size // num_heads,
            rope=None,
            qkv_bias=True,
            out_bias=True,
            scale=scale,
            dropout=attention_dropout,
        ),
        feed_forward=MLP(intermediate_size=intermediate_size or 4 * hidden_size, activation=activation, bias=True),
        norm=LayerNorm(eps=eps, bias=True),
        tie_embeddings=tie_embeddings,
        positions=LearnedPositions(num_positions=max_positions),
        dropout=dropout,
    )


def _released(layers: int, width: int, heads: int) -> DecoderConfig:
    return gpt(
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        max_positions=1024,
        dropout=0.1,
        attention_dropout=0.1,
    )


PRESETS: dict[str, DecoderConfig] = {
    "gpt2": _released(12, 768, 12),
    "gpt2_medium": _released(24, 1024, 16),
    "gpt2_large": _released(36, 1280, 20),
    "gpt2_xl": _released(48, 1600, 25),
}

_LAYER = "transformer.h.{layer}."
# Its matrices are (in, out), and those of queries, keys and values one after another.
WEIGHTS = (
    Weight("embedding.weight", "transformer.wte.weight", "v d -> v d"),
    Weight("positions.weight", "transformer.wpe.weight", "p d -> p d"),
    Weight("layers.input_layernorm.weight", _LAYER + "ln_1.weight", "d -> d"),
    Weight("layers.input_layernorm.bias", _LAYER + "ln_1.bias", "d -> d"),
    Weight("layers.attention.q_proj.weight", _LAYER + "attn.c_attn.weight", "d (n h) -> d n h", joined=1),
    Weight("layers.attention.k_proj.weight", _LAYER + "attn.c_attn.weight", "d (n h) -> d n h", joined=1),
    Weight("layers.attention.v_proj.weight", _LAYER + "attn.c_attn.weight", "d (n h) -> d n h", joined=1),
    Weight("layers.attention.q_proj.bias", _LAYER + "attn.c_attn.bias", "(n h) -> n h"),
    Weight("layers.attention.k_proj.bias", _LAYER + "attn.c_attn.bias", "(n h) -> n h"),
    Weight("layers.attention.v_proj.bias", _LAYER + "attn.c_attn.bias", "(n h) -> n h"),
    Weight("layers.attention.o_proj.weight", _LAYER + "attn.c_proj.weight", "(n h) d -> n h d"),
    Weight("layers.attention.o_proj.bias", _LAYER + "attn.c_proj.bias", "d -> d"),
    Weight("layers.post_attention_layernorm.weight", _LAYER + "ln_2.weight", "d -> d"),
    Weight("layers.post_attention_layernorm.bias", _LAYER + "ln_2.bias", "d -> d"),
    Weight("layers.feed_forward.up_proj.weight", _LAYER + "mlp.c_fc.weight", "d f -> d f"),
    Weight("layers.feed_forward.up_proj.bias", _LAYER + "mlp.c_fc.bias", "f -> f"),
    Weight("layers.feed_forward.down_proj.weight", _LAYER + "mlp.c_proj.weight", "f d -> f d"),
    Weight("layers.feed_forward.down_proj.bias", _LAYER + "mlp.c_proj.bias", "d -> d"),
    Weight("norm.weight", "transformer.ln_f.weight", "d -> d"),
    Weight("norm.bias", "transformer.ln_f.bias", "d -> d"),
    Weight("lm_head.weight", "lm_head.weight", "v d -> d v"),
)
TIED = {"lm_head.weight": "transformer.wte.weight"}
# Computed, not trained: the causal mask, and what it puts in place of a score.
IGNORED = (r"transformer\.h\.\d+\.attn\.(masked_)?bias",)

_A_GPT2 = "a GPT-2"
ARCHITECTURES = ("GPT2LMHeadModel", "GPT2Model")
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "n_vocab": "vocab_size",
}
# n_ctx was the size of the mask, which needs none; in float32, where the softmax is here anyway, order is rounding.
_HARMLESS = CAUSAL | {"embd_pdrop", "n_ctx", "reorder_and_upcast_attn"}


def from_hf(data: Mapping[str, Any]) -> DecoderConfig:
    """The model that a `config.json` of model_type `gpt2` describes.

    Raises UserError for a key that is missing, not known, or asks for something the model cannot do.
    """
    reader = ConfigReader(data, _A_GPT2, ARCHITECTURES, aliases=_ALIASES, harmless=_HARMLESS)
    take = reader.take
    reader.only(scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    max_positions = take("n_positions", int, 1024)
    config = gpt(
        vocab_size=take("vocab_size", int, 50257),
        hidden_size=take("n_embd", int),
        num_layers=take("n_layer", int),
        num_heads=take("n_head", int),
        intermediate_size=take("n_inner", int, None),
        max_positions=max_positions,
        activation=read_activation(reader, "activation_function", "gelu_new"),
        eps=take("layer_norm_epsilon", float, 1e-5),
        scale=None if take("scale_attn_weights", bool, True) else 1.0,
        dropout=take("resid_pdrop", float, 0.1),  # here the embeddings' too, whatever embd_pdrop is
        attention_dropout=take("attn_pdrop", float, 0.1),
        tie_embeddings=take("tie_word_embeddings", bool, True),
    )
    reader.finish()
    return config


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a model, for Hugging Face's `GPT2LMHeadModel`.

    Raises UserError for a model that is no GPT-2, naming what it has that a GPT-2 cannot have.
    """
    attention = expect(config.attention, GroupedQuery, _A_GPT2)
    feed_forward = expect(config.feed_forward, MLP, _A_GPT2)
    norm = expect(config.norm, LayerNorm, _A_GPT2)
    data = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.max_positions,
        "n_ctx": config.max_positions,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": attention.num_heads,
        "n_inner": feed_forward.intermediate_size,
        "activation_function": write_activation(feed_forward.activation, _A_GPT2),
        "layer_norm_epsilon": norm.eps,
        "scale_attn_weights": attention.scale is None,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": attention.dropout,
        "tie_word_embeddings": config.tie_embeddings,
    }
    return checked(data, config, from_hf, _A_GPT2)
