"""GLM-4 and GLM-4-0414 in Hugging Face's format, and ChatGLM2-6B and ChatGLM3-6B under the names of their own code.

GLM Team 2024, arXiv 2406.12793 (table 1): few key/value heads, rotary positions on the first half of every head, biases
on queries, keys and values alone.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from llama_jax.config import Json, UserError
from llama_jax.models import DecoderConfig
from llama_jax.nn import GroupedQuery, RMSNorm, Rope, RopeScaling, SwiGLU
from llama_jax.zoo import llama
from llama_jax.zoo.reading import CAUSAL, ConfigReader, Key
from llama_jax.zoo.registry import Family
from llama_jax.zoo.rope import read_rope, write_rope
from llama_jax.zoo.weights import TensorNames, mappings


def glm(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    theta: float = 10_000.0,
    scaling: RopeScaling | None = None,
    qkv_bias: bool = True,
    tie_embeddings: bool = False,
    attention_dropout: float = 0.0,
    **fields: Any,
) -> DecoderConfig:
    """Return the model that GLM-4 and ChatGLM2 have in common; `fields` are the others of `DecoderConfig`."""
    return DecoderConfig(
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
        tie_embeddings=tie_embeddings,
        **fields,
    )


def _rows(qkv: Sequence[str], o: str, gate_up: str, down: str) -> dict[str, tuple[str, ...]]:
    """Return the rows of a layer's weights, by their names in the file."""
    # Of queries and keys the first half of a head turns, in pairs that lie side by side. The other half is reordered
    # like it: scores do not depend on the order, if it is the same for both.
    q, k, v = qkv
    return {
        **llama.NORMS,
        "attention.q_proj": (q, "(n half h two) d -> d n (half two h)", "(n half h two) -> n (half two h)"),
        "attention.k_proj": (k, "(k half h two) d -> d k (half two h)", "(k half h two) -> k (half two h)"),
        "attention.v_proj": (v, "(k h) d -> d k h", "(k h) -> k h"),
        "attention.o_proj": (o, "d (n h) -> n h d"),
        "feed_forward.gate_proj": (gate_up, "f d -> d f"),
        "feed_forward.up_proj": (gate_up, "f d -> d f"),
        "feed_forward.down_proj": (down, "d f -> f d"),
    }


_GLM_ROWS = _rows([f"self_attn.{name}_proj" for name in "qkv"], "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_CHATGLM_ROWS = _rows(
    ["self_attention.query_key_value"] * 3, "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
)


_GLM4_NORMS = {
    "attention_norm": ("post_self_attn_layernorm", "d -> d"),
    "feed_forward_norm": ("post_mlp_layernorm", "d -> d"),
}


def _names(rows: dict[str, tuple[str, ...]]) -> TensorNames:
    return TensorNames(mappings(llama.ENDS | llama.HEAD) + mappings(rows, "layers.", llama.LAYER), llama.TIED)


def _read_glm(reader: ConfigReader, fields: Json) -> DecoderConfig:
    reader.activation("hidden_act", "silu", only="silu")
    if fields["num_kv_heads"] is None:
        fields["num_kv_heads"] = fields["num_heads"]
    if fields["head_dim"] is None:
        fields["head_dim"] = fields["hidden_size"] // max(fields["num_heads"], 1)
    rope = read_rope(reader, fields["max_positions"], partial=0.5)
    return glm(norm=RMSNorm(fields.pop("eps")), **fields, **rope)


def _write_glm(config: DecoderConfig, label: str) -> Json:
    return {"hidden_act": "silu", "partial_rotary_factor": 0.5, **write_rope(config.attention, label)}


GLM = Family(
    name="glm",
    title="GLM-4 in Hugging Face's format",
    label="a GLM",
    objectives=("Causal", "Chat"),
    presets={
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
    },
    architectures=("GlmForCausalLM", "GlmModel"),
    keys=llama.keys(
        Key("attention_bias", "attention.qkv_bias", bool, True),
        kv_heads=2,
        head_dim=128,
        max_positions=131_072,
        eps=1.5625e-07,
    ),
    read=_read_glm,
    write=_write_glm,
    harmless=CAUSAL,
    names=_names(_GLM_ROWS),
)


def _glm4(layers: int, width: int, heads: int, ffn: int, *, qkv_bias: bool) -> DecoderConfig:
    return glm(
        vocab_size=151_552,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=2,
        head_dim=128,
        intermediate_size=ffn,
        max_positions=32_768,
        norm=RMSNorm(eps=1e-5),
        norm_placement="sandwich",
        qkv_bias=qkv_bias,
    )


def _read_glm4(reader: ConfigReader, fields: Json) -> DecoderConfig:
    return _read_glm(reader, fields | {"norm_placement": "sandwich"})


GLM4 = dataclasses.replace(
    GLM,
    name="glm4",
    title="GLM-4-0414",
    label="a GLM-4-0414",
    presets={
        "glm4_9b_0414": _glm4(40, 4096, 32, 13_696, qkv_bias=True),
        "glm4_32b_0414": _glm4(61, 6144, 48, 23_040, qkv_bias=False),
    },
    architectures=("Glm4ForCausalLM", "Glm4Model"),
    read=_read_glm4,
    names=_names(_GLM_ROWS | _GLM4_NORMS),
)


def _read_chatglm(reader: ConfigReader, fields: Json) -> DecoderConfig:
    # rope_ratio divides positions in ChatGLM2-6B-32K, and multiplies the rotary base in what followed.
    ratio = reader.take("rope_ratio", float, 1.0)
    if ratio != 1 and "chatglm2" in str(reader.data.get("_name_or_path")).lower():
        raise UserError(f"config.json has rope_ratio={ratio}, which is not supported for a ChatGLM2")
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
        tie_word_embeddings=False,
        vocab_size=fields["vocab_size"],
    )
    # Without it, queries, keys and values would lie by heads in their tensor. Absent, it is off.
    if not reader.take("multi_query_attention", bool, False):
        raise UserError(f"config.json has multi_query_attention=False, and {reader.label} can only have True")
    return glm(norm=RMSNorm(fields.pop("eps"), cast_last=True), theta=10_000.0 * ratio, **fields)


def _write_chatglm(config: DecoderConfig, label: str) -> Json:
    attention: Any = config.attention
    return {
        "rope_ratio": write_rope(attention, label)["rope_theta"] / 10_000.0,
        "multi_query_attention": True,
        "rmsnorm": True,
        "post_layer_norm": True,
        "add_bias_linear": False,
        "original_rope": True,
        "tie_word_embeddings": False,
    }


CHATGLM = Family(
    name="chatglm",
    title="ChatGLM2-6B and ChatGLM3-6B",
    label="a ChatGLM2",
    objectives=("Prefix", "Chat"),
    presets={
        name: glm(
            vocab_size=65_024,
            hidden_size=4096,
            num_layers=28,
            num_heads=32,
            num_kv_heads=2,
            head_dim=128,
            intermediate_size=13_696,
            max_positions=positions,
            norm=RMSNorm(eps=1e-5, cast_last=True),
            theta=theta,
        )
        for name, positions, theta in (
            ("chatglm2_6b", 32_768, 10_000.0),
            ("chatglm3_6b", 8192, 10_000.0),
            ("chatglm3_6b_32k", 32_768, 500_000.0),
        )
    },
    architectures=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    keys=(
        Key("padded_vocab_size", "vocab_size", int),
        Key("hidden_size", "hidden_size", int),
        Key("num_layers", "num_layers", int),
        Key("num_attention_heads", "attention.num_heads", int),
        Key("multi_query_group_num", "attention.num_kv_heads", int, 1),
        Key("kv_channels", "attention.head_dim", int),
        Key("ffn_hidden_size", "feed_forward.intermediate_size", int),
        Key("seq_length", "max_positions", int),
        Key("layernorm_epsilon", "norm.eps", float),
        Key("add_qkv_bias", "attention.qkv_bias", bool, False),
        Key("attention_dropout", "attention.dropout", float, 0.0, argument="attention_dropout"),
        Key("hidden_dropout", "dropout", float, 0.0),
    ),
    read=_read_chatglm,
    write=_write_chatglm,
    # Ways of computing the same: the scaling by layer cancels out, and softmax is in float32 here anyway.
    harmless=CAUSAL | {"apply_query_key_layer_scaling"},
    names=TensorNames(
        (
            *mappings(
                {
                    "embedding": ("embedding.word_embeddings", "v d -> v d"),
                    "norm": ("encoder.final_layernorm", "d -> d"),
                    "lm_head": ("output_layer", "v d -> d v"),
                },
                theirs="transformer.",
            ),
            *mappings(_CHATGLM_ROWS, "layers.", "transformer.encoder.layers.{layer}."),
        )
    ),
)
