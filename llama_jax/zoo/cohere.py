"""Cohere's Command R and Aya (one norm for both sublayers, rotary pairs side by side), and Command R7B and A.

The second generation has windows in three of four layers, and no positions at all in the fourth.
"""

import dataclasses
from typing import Any

from llama_jax.config import Json
from llama_jax.models import DecoderConfig
from llama_jax.nn import LayerNorm, SwiGLU
from llama_jax.zoo import llama
from llama_jax.zoo.layers import FULL, SLIDING, every, in_turns, read_layer_types, write_turns
from llama_jax.zoo.reading import CAUSAL, SIZES, ConfigReader, Key
from llama_jax.zoo.registry import Family
from llama_jax.zoo.rope import read_rope, write_rope
from llama_jax.zoo.weights import TensorNames, mappings


def _cohere(*, eps: float, intermediate_size: int, qk_norm: bool = False, **fields: Any) -> DecoderConfig:
    feed_forward = SwiGLU(intermediate_size, bias=False)
    config = llama.llama_like(eps=eps, feed_forward=feed_forward, parallel="one_norm", **fields)
    attention: Any = config.attention
    norm = LayerNorm(eps, bias=False)
    if qk_norm:
        attention = dataclasses.replace(attention, qk_norm=norm, qk_norm_over="own_weights")
    return dataclasses.replace(config, norm=norm, attention=attention)


def _windows(config: DecoderConfig, window: int, types: tuple[str, ...]) -> DecoderConfig:
    """Return the model with windows in the sliding layers and no positions in the others."""
    attention: Any = config.attention
    pieces = {
        SLIDING: dataclasses.replace(attention, window=window),
        FULL: dataclasses.replace(attention, rope=None),
    }
    return in_turns(config, types, pieces)


def _released(layers: int, width: int, kv_heads: int, ffn: int, theta: float, scale: float, **fields: Any) -> Json:
    usual: Json = {"vocab_size": 256_000, "max_positions": 8192, "tie_embeddings": True, "eps": 1e-5}
    sizes = {"num_layers": layers, "hidden_size": width, "num_heads": width // 128, "num_kv_heads": kv_heads}
    return usual | sizes | {"intermediate_size": ffn, "theta": theta, "logit_scale": scale} | fields


def _command2(window: int = 4096, **fields: Any) -> DecoderConfig:
    return _windows(_cohere(**fields), window, every(4, fields["num_layers"]))


def _read(reader: ConfigReader, fields: Json, theta: float = 500_000.0) -> DecoderConfig:
    reader.activation("hidden_act", "silu", only="silu")
    reader.only(head_dim=fields["hidden_size"] // max(fields["num_heads"], 1))
    qk_norm = reader.take("use_qk_norm", bool, False)
    return _cohere(**fields, **read_rope(reader, fields["max_positions"], theta), qk_norm=qk_norm)


def _write(config: DecoderConfig, label: str) -> Json:
    attention: Any = config.attention
    return {"hidden_act": "silu", "use_qk_norm": attention.qk_norm is not None, **write_rope(attention, label)}


# Rotary pairs lie side by side in the file; the norms' weights are of the same entries.
_PAIRS = ("(n h two) d -> d n (two h)", "(n h two) -> n (two h)")
_SIDE_BY_SIDE = {f"attention.{name}_proj": (f"self_attn.{name}_proj", *_PAIRS) for name in "qk"}
_NORMS = {f"attention.{name}_norm": (f"self_attn.{name}_norm", "n (h two) -> n (two h)") for name in "qk"}
COHERE = Family(
    name="cohere",
    title="Command R and Aya",
    label="a Cohere",
    objectives=("Causal", "Chat"),
    presets={
        "command_r": _cohere(**_released(40, 8192, 64, 22_528, 8e6, 0.0625)),
        "command_r_plus": _cohere(**_released(64, 12_288, 8, 33_792, 75e6, 0.8333333333333334), qk_norm=True),
        "command_r_08_2024": _cohere(**_released(40, 8192, 8, 24_576, 4e6, 0.0625, max_positions=131_072)),
        "aya_23_8b": _cohere(**_released(32, 4096, 8, 14_336, 10_000.0, 0.0625)),
        "aya_expanse_8b": _cohere(**_released(32, 4096, 8, 14_336, 10_000.0, 0.125)),
    },
    architectures=("CohereForCausalLM", "CohereModel"),
    keys=(
        *SIZES,
        Key("num_key_value_heads", "attention.num_kv_heads", int, None),
        Key("intermediate_size", "feed_forward.intermediate_size", int),
        Key("max_position_embeddings", "max_positions", int, 8192),
        Key("layer_norm_eps", "norm.eps", float, 1e-5),
        Key("logit_scale", "logit_scale", float, 0.0625),
        Key("attention_bias", "attention.qkv_bias", bool, False, argument="attention_bias"),
        Key("attention_dropout", "attention.dropout", float, 0.0, argument="attention_dropout"),
        Key("tie_word_embeddings", "tie_embeddings", bool, True),
    ),
    read=_read,
    write=_write,
    harmless=CAUSAL,
    names=TensorNames(
        mappings(llama.ENDS | llama.HEAD)
        + mappings(llama.NORMS | llama.ATTENTION | llama.FEED_FORWARD | _SIDE_BY_SIDE | _NORMS, "layers.", llama.LAYER),
        llama.TIED,
    ),
)


def _read_2(reader: ConfigReader, fields: Json) -> DecoderConfig:
    # Keys of Cohere's own code.
    reader.only(
        order_of_interleaved_layers="local_attn_first",
        position_embedding_type="rope_gptj",
        rotary_pct=1.0,
        use_embedding_sharing=True,
        use_gated_activation=True,
        use_parallel_block=True,
        use_qk_norm=False,
    )
    window = reader.take("sliding_window", int, absent=4096)
    period = reader.take("sliding_window_pattern", int, 4)
    types = read_layer_types(reader, layers := fields["num_layers"], every(max(period, 1), layers))
    return _windows(_read(reader, fields, 10_000.0), window, types)


def _write_2(config: DecoderConfig, label: str) -> Json:
    rotary = next((mixer for mixer, _ in config.layer_pieces() if getattr(mixer, "rope", None)), config.attention)
    return {
        "hidden_act": "silu",
        **write_turns(config),
        **write_rope(rotary, label),
    }


COHERE2 = dataclasses.replace(
    COHERE,
    name="cohere2",
    title="Command R7B and Command A",
    label="a Cohere 2",
    presets={
        "command_r7b": _command2(**_released(32, 4096, 8, 14_336, 50_000.0, 0.25)),
        "command_a": _command2(**_released(64, 12_288, 8, 36_864, 50_000.0, 0.25, max_positions=131_072)),
    },
    architectures=("Cohere2ForCausalLM", "Cohere2Model"),
    read=_read_2,
    write=_write_2,
    aliases={"_sliding_window_pattern": "sliding_window_pattern", "layer_switch": "sliding_window_pattern"},
    harmless=CAUSAL | {"use_parallel_embedding"},
)
