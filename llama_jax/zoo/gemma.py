"""Gemma 1 to 3 (arXiv 2403.08295, 2408.00118, 2503.19786), of Gemma 3 the text model.

Sizes from the reports and from the released configs; the counts they give are tested to the digit.
"""

import dataclasses
from typing import Any

from llama_jax.config import Json
from llama_jax.models import DecoderConfig
from llama_jax.nn import GatedLinearUnit, LinearScaling, RMSNorm, Rope
from llama_jax.zoo import llama
from llama_jax.zoo.layers import FULL, SLIDING, every, in_turns, mixers_by_type, read_layer_types, write_turns
from llama_jax.zoo.reading import CAUSAL, SIZES, ConfigReader, Key
from llama_jax.zoo.registry import Family
from llama_jax.zoo.rope import read_rope, read_ropes, write_rope, write_ropes
from llama_jax.zoo.weights import TensorNames, mappings

_TANH = "gelu_pytorch_tanh"
_ACTIVATIONS: Json = {"hidden_act": _TANH, "hidden_activation": _TANH}


def gemma(
    *,
    hidden_size: int,
    intermediate_size: int,
    eps: float = 1e-6,
    softcap: float | None = None,
    tie_embeddings: bool = True,
    **fields: Any,
) -> DecoderConfig:
    """Return a Gemma; `fields` are the others of `llama_like`."""
    config = llama.llama_like(
        hidden_size=hidden_size,
        feed_forward=GatedLinearUnit(intermediate_size, activation="gelu_tanh", bias=False),
        embedding_scale=hidden_size**0.5,
        tie_embeddings=tie_embeddings,
        eps=eps,
        **fields,
    )
    attention: Any = config.attention
    return dataclasses.replace(
        config,
        attention=dataclasses.replace(attention, softcap=softcap),
        norm=RMSNorm(eps, cast_last=True, zero_centered=True),
    )


def gemma2(
    *,
    types: tuple[str, ...],
    window: int | None,
    scalar: float = 256.0,
    local: Rope | None = None,
    qk_norm: bool = False,
    **fields: Any,
) -> DecoderConfig:
    """Return a Gemma 2, or with `qk_norm` a Gemma 3: layers of two `types`, sandwich norms.

    Scores are divided by the root of `scalar`. `local` is of the layers with a window, by default that of the others.
    """
    config = gemma(norm_placement="sandwich", **fields)
    attention: Any = config.attention
    full = dataclasses.replace(attention, scale=scalar**-0.5, qk_norm=config.norm if qk_norm else None)
    sliding = dataclasses.replace(full, window=window, rope=local or full.rope)
    return in_turns(config, types, {FULL: full, SLIDING: sliding})


def _sizes(layers: int, width: int, heads: int, kv_heads: int, ffn: int, head_dim: int = 256) -> Json:
    sizes = {"num_layers": layers, "hidden_size": width, "num_heads": heads, "num_kv_heads": kv_heads}
    return sizes | {"intermediate_size": ffn, "head_dim": head_dim}


def _gemma1(*sizes: int) -> DecoderConfig:
    return gemma(vocab_size=256_000, max_positions=8192, theta=10_000.0, **_sizes(*sizes))


def _gemma2(*sizes: int, **fields: Any) -> DecoderConfig:
    usual = {"vocab_size": 256_000, "max_positions": 8192, "theta": 10_000.0, "window": 4096}
    caps = {"softcap": 50.0, "logit_softcap": 30.0}
    return gemma2(types=every(2, sizes[0]), **usual, **caps, **_sizes(*sizes), **fields)


def _gemma3(*sizes: int, long: bool = True, **fields: Any) -> DecoderConfig:
    usual: Json = {"vocab_size": 262_144, "max_positions": 32_768, "window": 512}
    if long:
        usual = {"vocab_size": 262_208, "max_positions": 131_072, "window": 1024, "scaling": LinearScaling(8.0)}
    ropes = {"theta": 1_000_000.0, "local": Rope(10_000.0, scaling=None)}
    return gemma2(types=every(6, sizes[0]), qk_norm=True, **ropes, **usual, **_sizes(*sizes), **fields)


def _keys(kv_heads: int, max_positions: int) -> tuple[Key, ...]:
    """Return the keys of all Gemmas, with what stands for those that a file lacks."""
    return (
        Key("num_key_value_heads", "attention.num_kv_heads", int, absent=kv_heads),
        Key("head_dim", "attention.head_dim", int, absent=256),
        Key("intermediate_size", "feed_forward.intermediate_size", int, absent=24_576 if kv_heads == 16 else 9216),
        Key("max_position_embeddings", "max_positions", int, absent=max_positions),
        Key("rms_norm_eps", "norm.eps", float, 1e-6),
        Key("attention_bias", "attention.qkv_bias", bool, False, argument="attention_bias"),
        Key("attention_dropout", "attention.dropout", float, 0.0, argument="attention_dropout"),
        Key("tie_word_embeddings", "tie_embeddings", bool, True),
    )


def _caps(scores: float | None, logits: float | None) -> tuple[Key, ...]:
    return (
        Key("attn_logit_softcapping", "attention.softcap", float, None, absent=scores),
        Key("final_logit_softcapping", "logit_softcap", float, None, absent=logits),
    )


def _check_activation(reader: ConfigReader) -> None:
    """Raise UserError for another activation than all have; in the first releases "gelu" stood for it."""
    if reader.take("hidden_act", str, "gelu") != "gelu":
        reader.activation("hidden_act", _TANH, only="gelu_tanh")
    reader.activation("hidden_activation", _TANH, only="gelu_tanh")


def _read(reader: ConfigReader, fields: Json) -> DecoderConfig:
    _check_activation(reader)
    return gemma(**fields, **read_rope(reader, fields["max_positions"]))


def _write(config: DecoderConfig, label: str) -> Json:
    return _ACTIVATIONS | write_rope(config.attention, label)


def _read_turns(reader: ConfigReader, fields: Json, period: int) -> Json:
    """Return what Gemma 2 and 3 have beside their keys and positions."""
    _check_activation(reader)
    layers = fields["num_layers"]
    return fields | {
        "types": read_layer_types(reader, layers, every(period, layers)),
        "window": reader.take("sliding_window", int, None, absent=4096),
        "scalar": reader.take("query_pre_attn_scalar", float, 256.0),
    }


def _write_turns(config: DecoderConfig) -> Json:
    attention: Any = config.attention
    scalar = round(1 / attention.scale**2) if attention.scale else attention.head_dim
    return {**_ACTIVATIONS, **write_turns(config), "query_pre_attn_scalar": scalar}


def _read_gemma2(reader: ConfigReader, fields: Json) -> DecoderConfig:
    return gemma2(**_read_turns(reader, fields, 2), **read_rope(reader, fields["max_positions"]))


def _write_gemma2(config: DecoderConfig, label: str) -> Json:
    return _write_turns(config) | write_rope(config.attention, label)


def _read_gemma3(reader: ConfigReader, fields: Json) -> DecoderConfig:
    found = _read_turns(reader, fields, reader.take("sliding_window_pattern", int, 6))
    ropes = read_ropes(reader, fields["max_positions"], 1_000_000.0, "rope_local_base_freq", 10_000.0)
    return gemma2(**found, **ropes[FULL], local=Rope(**ropes[SLIDING]), qk_norm=True)


def _write_gemma3(config: DecoderConfig, label: str) -> Json:
    mixers = mixers_by_type(config)
    local = {"rope_local_base_freq": mixers[SLIDING].rope.theta} if SLIDING in mixers else {}
    return _write_turns(config) | local | write_ropes(mixers, label)


def _read_wrapped(reader: ConfigReader, fields: Json) -> DecoderConfig:
    """Return the text model of a Gemma 3 that reads images too; its own config.json stands for itself."""
    if "hidden_size" in reader.data:
        reader.taken |= reader.data.keys()
        return GEMMA3_TEXT.from_hf(reader.data | {"architectures": None})
    config = GEMMA3_TEXT.from_hf(reader.take("text_config", dict) | {"architectures": None})
    reader.only(tie_word_embeddings=config.tie_embeddings)
    return config


_SANDWICH = {
    "input_layernorm": ("input_layernorm", "d -> d"),
    "attention_norm": ("post_attention_layernorm", "d -> d"),
    "post_attention_layernorm": ("pre_feedforward_layernorm", "d -> d"),
    "feed_forward_norm": ("post_feedforward_layernorm", "d -> d"),
}
_LAYER = {**_SANDWICH, **llama.ATTENTION, **llama.FEED_FORWARD}
_ENDS = mappings(llama.ENDS | llama.HEAD)
_GEMMA3_NAMES = TensorNames(_ENDS + mappings(_LAYER | llama.QK_NORMS, "layers.", llama.LAYER), llama.TIED)

GEMMA = Family(
    name="gemma",
    title="Gemma",
    label="a Gemma",
    objectives=("Causal", "Chat"),
    presets={"gemma_2b": _gemma1(18, 2048, 8, 1, 16_384), "gemma_7b": _gemma1(28, 3072, 16, 16, 24_576)},
    architectures=("GemmaForCausalLM", "GemmaModel"),
    keys=(
        *SIZES,
        *_keys(kv_heads=16, max_positions=8192),
    ),
    read=_read,
    write=_write,
    harmless=CAUSAL,
    names=llama.LLAMA.names,
)
GEMMA2 = dataclasses.replace(
    GEMMA,
    name="gemma2",
    title="Gemma 2",
    label="a Gemma 2",
    presets={
        "gemma2_2b": _gemma2(26, 2304, 8, 4, 9216),
        "gemma2_9b": _gemma2(42, 3584, 16, 8, 14_336),
        "gemma2_27b": _gemma2(46, 4608, 32, 16, 36_864, 128, scalar=144.0),
    },
    architectures=("Gemma2ForCausalLM", "Gemma2Model"),
    keys=(
        *SIZES,
        *_keys(kv_heads=4, max_positions=8192),
        *_caps(50.0, 30.0),
    ),
    read=_read_gemma2,
    write=_write_gemma2,
    aliases={"sliding_window_size": "sliding_window"},
    names=TensorNames(_ENDS + mappings(_LAYER, "layers.", llama.LAYER), llama.TIED),
)
GEMMA3_TEXT = dataclasses.replace(
    GEMMA,
    name="gemma3_text",
    title="Gemma 3, text alone",
    label="a Gemma 3",
    presets={
        "gemma3_270m": _gemma3(18, 640, 4, 1, 2048, long=False),
        "gemma3_1b": _gemma3(26, 1152, 4, 1, 6912, long=False),
    },
    architectures=("Gemma3ForCausalLM", "Gemma3TextModel"),
    keys=(
        Key("vocab_size", "vocab_size", int, absent=262_208),
        Key("hidden_size", "hidden_size", int, absent=2304),
        Key("num_hidden_layers", "num_layers", int, absent=26),
        Key("num_attention_heads", "attention.num_heads", int, absent=8),
        *_keys(kv_heads=4, max_positions=131_072),
        *_caps(None, None),
    ),
    read=_read_gemma3,
    write=_write_gemma3,
    aliases={"_sliding_window_pattern": "sliding_window_pattern"},
    names=_GEMMA3_NAMES,
)
# Read from the files of the whole; what is written is the text model.
GEMMA3 = dataclasses.replace(
    GEMMA3_TEXT,
    name="gemma3",
    title="Gemma 3, the text model of the whole",
    presets={
        "gemma3_4b": _gemma3(34, 2560, 8, 4, 10_240),
        "gemma3_12b": _gemma3(48, 3840, 16, 8, 15_360),
        "gemma3_27b": _gemma3(62, 5376, 32, 16, 21_504, 128, scalar=168.0),
    },
    architectures=("Gemma3ForConditionalGeneration", "Gemma3Model", "Gemma3ForCausalLM"),
    keys=(),
    read=_read_wrapped,
    write=lambda config, label: GEMMA3_TEXT.to_hf(config),
    harmless={"vision_config", "mm_tokens_per_image"},
    names=dataclasses.replace(
        _GEMMA3_NAMES,
        renames=((r"^(model\.)?language_model\.", ""),),
        ignored=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",),
    ),
)
