"""GLM-4 in Hugging Face's format (GLM Team 2024, arXiv 2406.12793): few key/value heads, rotary positions on the first
half of every head, biases on queries, keys and values alone."""

from collections.abc import Mapping
from typing import Any

from llama_jax.config import UserError
from llama_jax.models import DecoderConfig
from llama_jax.nn import GroupedQuery, RMSNorm, Rope, RopeScaling, SwiGLU
from llama_jax.zoo import Weight
from llama_jax.zoo.reading import CAUSAL, ConfigReader, checked, expect, read_activation, read_rope, write_rope


def glm(
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    max_positions: int,
    norm: RMSNorm,
    theta: float = 10_000.0,
    scaling: RopeScaling | None = None,
    qkv_bias: bool = True,
    tie_embeddings: bool = False,
    attention_dropout: float = 0.0,
    dropout: float = 0.0,
) -> DecoderConfig:
    """The model that GLM-4 and ChatGLM2 have in common."""
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        max_positions=max_positions,
        attention=GroupedQuery(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=Rope(theta=theta, scaling=scaling, rotary_dim=head_dim // 2),
            qkv_bias=qkv_bias,
            out_bias=False,
            dropout=attention_dropout,
        ),
        feed_forward=SwiGLU(intermediate_size=intermediate_size, bias=False),
        norm=norm,
        tie_embeddings=tie_embeddings,
        dropout=dropout,
    )


OBJECTIVES = ("Causal", "Chat")
PRESETS: dict[str, DecoderConfig] = {
    "glm4_9b": glm(
        vocab_size=151_552,
        hidden_size=4096,
        num_layers=40,
        num_heads=32,
        num_kv_heads=2,
        head_dim=128,
        intermediate_size=13_696,
        max_positions=8192,
        norm=RMSNorm(eps=1.5625e-07),
    )
}

_LAYER = "model.layers.{layer}."
# Of queries and keys the first half of a head turns, in pairs that lie side by side. The other half is reordered like
# it: scores do not depend on the order, if it is the same for both.
WEIGHTS = (
    Weight("embedding.weight", "model.embed_tokens.weight", "v d -> v d"),
    Weight("layers.input_layernorm.weight", _LAYER + "input_layernorm.weight", "d -> d"),
    Weight(
        "layers.attention.q_proj.weight",
        _LAYER + "self_attn.q_proj.weight",
        "(n half h two) d -> d n (half two h)",
    ),
    Weight(
        "layers.attention.k_proj.weight",
        _LAYER + "self_attn.k_proj.weight",
        "(k half h two) d -> d k (half two h)",
    ),
    Weight("layers.attention.v_proj.weight", _LAYER + "self_attn.v_proj.weight", "(k h) d -> d k h"),
    Weight("layers.attention.o_proj.weight", _LAYER + "self_attn.o_proj.weight", "d (n h) -> n h d"),
    Weight("layers.attention.q_proj.bias", _LAYER + "self_attn.q_proj.bias", "(n half h two) -> n (half two h)"),
    Weight("layers.attention.k_proj.bias", _LAYER + "self_attn.k_proj.bias", "(k half h two) -> k (half two h)"),
    Weight("layers.attention.v_proj.bias", _LAYER + "self_attn.v_proj.bias", "(k h) -> k h"),
    Weight("layers.post_attention_layernorm.weight", _LAYER + "post_attention_layernorm.weight", "d -> d"),
    Weight("layers.feed_forward.gate_proj.weight", _LAYER + "mlp.gate_up_proj.weight", "f d -> d f"),
    Weight("layers.feed_forward.up_proj.weight", _LAYER + "mlp.gate_up_proj.weight", "f d -> d f"),
    Weight("layers.feed_forward.down_proj.weight", _LAYER + "mlp.down_proj.weight", "d f -> f d"),
    Weight("norm.weight", "model.norm.weight", "d -> d"),
    Weight("lm_head.weight", "lm_head.weight", "v d -> d v"),
)
TIED = {"lm_head.weight": "model.embed_tokens.weight"}

_A_GLM = "a GLM"
ARCHITECTURES = ("GlmForCausalLM", "GlmModel")


def from_hf(data: Mapping[str, Any]) -> DecoderConfig:
    """The model that a `config.json` of model_type `glm` describes.

    Raises UserError for a key that is missing, not known, or asks for something the model cannot do.
    """
    reader = ConfigReader(data, _A_GLM, ARCHITECTURES, harmless=CAUSAL)
    take = reader.take
    read_activation(reader, "hidden_act", "silu", only="silu")
    max_positions = take("max_position_embeddings", int, 131_072)
    theta, scaling = read_rope(reader, max_positions, partial=0.5)
    hidden_size, num_heads = take("hidden_size", int), take("num_attention_heads", int)
    config = glm(
        vocab_size=take("vocab_size", int),
        hidden_size=hidden_size,
        num_layers=take("num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=take("num_key_value_heads", int, num_heads, absent=2),
        head_dim=take("head_dim", int, hidden_size // max(num_heads, 1), absent=128),
        intermediate_size=take("intermediate_size", int),
        max_positions=max_positions,
        norm=RMSNorm(eps=take("rms_norm_eps", float, 1.5625e-07)),
        qkv_bias=take("attention_bias", bool, True),
        tie_embeddings=take("tie_word_embeddings", bool, False),
        theta=theta,
        scaling=scaling,
        attention_dropout=take("attention_dropout", float, 0.0),
    )
    reader.finish()
    return config


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a model, for Hugging Face's `GlmForCausalLM`.

    Raises UserError for a model that is no GLM, naming what it has that a GLM cannot have.
    """
    attention = expect(config.attention, GroupedQuery, _A_GLM)
    feed_forward, norm = expect(config.feed_forward, SwiGLU, _A_GLM), expect(config.norm, RMSNorm, _A_GLM)
    if attention.rope is None:
        raise UserError(f"rope=None has no place in {_A_GLM}")
    data = {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": feed_forward.intermediate_size,
        "hidden_act": "silu",
        "attention_dropout": attention.dropout,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": norm.eps,
        "attention_bias": attention.qkv_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "partial_rotary_factor": 0.5,
        "rope_theta": attention.rope.theta,
        "rope_scaling": write_rope(attention.rope.scaling, _A_GLM),
    }
    return checked(data, config, from_hf, _A_GLM)
