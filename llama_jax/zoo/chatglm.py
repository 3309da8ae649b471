"""ChatGLM2-6B and its base (GLM Team 2024, arXiv 2406.12793, table 1), under the names of its own code: the model of
`zoo.glm`, queries, keys and values in one tensor, and gate and up projection in another."""

from collections.abc import Mapping
from typing import Any

from llama_jax.config import UserError
from llama_jax.models import DecoderConfig
from llama_jax.nn import GroupedQuery, RMSNorm, SwiGLU
from llama_jax.zoo import Weight
from llama_jax.zoo.glm import glm
from llama_jax.zoo.reading import CAUSAL, ConfigReader, checked, expect

OBJECTIVES = ("Prefix", "Chat")
PRESETS: dict[str, DecoderConfig] = {
    "chatglm2_6b": glm(
        vocab_size=65_024,
        hidden_size=4096,
        num_layers=28,
        num_heads=32,
        num_kv_heads=2,
        head_dim=128,
        intermediate_size=13_696,
        max_positions=32_768,
        norm=RMSNorm(eps=1e-5, cast_last=True),
    )
}

_LAYER = "transformer.encoder.layers.{layer}."
_QKV, _GATE_UP = _LAYER + "self_attention.query_key_value.", _LAYER + "mlp.dense_h_to_4h.weight"
# Queries and keys as in `zoo.glm`.
WEIGHTS = (
    Weight("embedding.weight", "transformer.embedding.word_embeddings.weight", "v d -> v d"),
    Weight("layers.input_layernorm.weight", _LAYER + "input_layernorm.weight", "d -> d"),
    Weight("layers.attention.q_proj.weight", _QKV + "weight", "(n half h two) d -> d n (half two h)"),
    Weight("layers.attention.k_proj.weight", _QKV + "weight", "(k half h two) d -> d k (half two h)"),
    Weight("layers.attention.v_proj.weight", _QKV + "weight", "(k h) d -> d k h"),
    Weight("layers.attention.q_proj.bias", _QKV + "bias", "(n half h two) -> n (half two h)"),
    Weight("layers.attention.k_proj.bias", _QKV + "bias", "(k half h two) -> k (half two h)"),
    Weight("layers.attention.v_proj.bias", _QKV + "bias", "(k h) -> k h"),
    Weight("layers.attention.o_proj.weight", _LAYER + "self_attention.dense.weight", "d (n h) -> n h d"),
    Weight("layers.post_attention_layernorm.weight", _LAYER + "post_attention_layernorm.weight", "d -> d"),
    Weight("layers.feed_forward.gate_proj.weight", _GATE_UP, "f d -> d f"),
    Weight("layers.feed_forward.up_proj.weight", _GATE_UP, "f d -> d f"),
    Weight("layers.feed_forward.down_proj.weight", _LAYER + "mlp.dense_4h_to_h.weight", "d f -> f d"),
    Weight("norm.weight", "transformer.encoder.final_layernorm.weight", "d -> d"),
    Weight("lm_head.weight", "transformer.output_layer.weight", "v d -> d v"),
)

_A_CHATGLM = "a ChatGLM2"
ARCHITECTURES = ("ChatGLMModel", "ChatGLMForConditionalGeneration")
# Ways of computing the same: the scaling by layer cancels out, and softmax is in float32 here anyway.
_HARMLESS = CAUSAL | {"apply_query_key_layer_scaling"}


def from_hf(data: Mapping[str, Any]) -> DecoderConfig:
    """The model that a `config.json` of model_type `chatglm` describes.

    Raises UserError for a key that is missing, not known, or asks for something the model cannot do: among these are
    quantized weights, and a rope_ratio other than 1, which divides positions in one release and multiplies the rotary
    base in the next.
    """
    reader = ConfigReader(data, _A_CHATGLM, ARCHITECTURES, harmless=_HARMLESS)
    take = reader.take
    reader.only(
        add_bias_linear=False,
        apply_residual_connection_post_layernorm=False,
        fp32_residual_connection=False,
        interleaved_qkv=False,
        original_rope=True,
        post_layer_norm=True,
        prefix_projection=False,
        quantization_bit=0,
        rmsnorm=True,
        rope_ratio=1,
        tie_word_embeddings=False,
    )
    # Without it, queries, keys and values would lie by heads in their tensor. Absent, it is off.
    if not take("multi_query_attention", bool, False):
        raise UserError(f"config.json has multi_query_attention=False, and {_A_CHATGLM} can only have True")
    vocab_size = take("padded_vocab_size", int)
    reader.only(vocab_size=vocab_size)
    config = glm(
        vocab_size=vocab_size,
        hidden_size=take("hidden_size", int),
        num_layers=take("num_layers", int),
        num_heads=take("num_attention_heads", int),
        num_kv_heads=take("multi_query_group_num", int, 1),
        head_dim=take("kv_channels", int),
        intermediate_size=take("ffn_hidden_size", int),
        max_positions=take("seq_length", int),
        norm=RMSNorm(eps=take("layernorm_epsilon", float), cast_last=True),
        qkv_bias=take("add_qkv_bias", bool, False),
        attention_dropout=take("attention_dropout", float, 0.0),
        dropout=take("hidden_dropout", float, 0.0),
    )
    reader.finish()
    return config


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a model, for ChatGLM2's own code.

    Raises UserError for a model that is no ChatGLM2, naming what it has that a ChatGLM2 cannot have.
    """
    attention = expect(config.attention, GroupedQuery, _A_CHATGLM)
    feed_forward, norm = expect(config.feed_forward, SwiGLU, _A_CHATGLM), expect(config.norm, RMSNorm, _A_CHATGLM)
    data = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "padded_vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "multi_query_attention": True,
        "multi_query_group_num": attention.num_kv_heads,
        "kv_channels": attention.head_dim,
        "ffn_hidden_size": feed_forward.intermediate_size,
        "seq_length": config.max_positions,
        "layernorm_epsilon": norm.eps,
        "rmsnorm": True,
        "post_layer_norm": True,
        "add_qkv_bias": attention.qkv_bias,
        "add_bias_linear": False,
        "attention_dropout": attention.dropout,
        "hidden_dropout": config.dropout,
        "original_rope": True,
        "tie_word_embeddings": False,
    }
    return checked(data, config, from_hf, _A_CHATGLM)
