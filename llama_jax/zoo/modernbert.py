"""ModernBERT (Warner et al. 2024, arXiv 2412.13663): an encoder of rotary positions, GEGLU and windows.

Every third layer, the first included, attends to the whole text, the others to 64 tokens on each side. The first layer
reads the normalised embeddings as they are. The presets are the encoder; the head of masked tokens is an option.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.config import Json, UserError
from llama_jax.models import EncoderConfig
from llama_jax.nn import Activation, GatedLinearUnit, GroupedQuery, LayerNorm, Rope
from llama_jax.zoo.layers import FULL, SLIDING, in_turns, mixers_by_type, read_layer_types, write_turns
from llama_jax.zoo.reading import SIZES, ConfigReader, Key, write_activation
from llama_jax.zoo.registry import Family
from llama_jax.zoo.transformer import full_heads
from llama_jax.zoo.weights import TensorNames, WeightMapping, mappings

_THETAS = {FULL: 160_000.0, SLIDING: 10_000.0}


def _usual_types(num_layers: int, period: int = 3) -> tuple[str, ...]:
    return tuple(SLIDING if i % period else FULL for i in range(num_layers))


def _encoder(
    types: Sequence[str],
    *,
    hidden_size: int,
    num_heads: int,
    intermediate_size: int,
    activation: Activation = "gelu",
    max_positions: int = 8192,
    reach: int = 64,
    thetas: Mapping[str, float] = _THETAS,
    eps: float = 1e-5,
    norm_bias: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    attention_dropout: float = 0.0,
    mlp_dropout: float = 0.0,
    **fields: Any,
) -> EncoderConfig:
    """Return a model whose layers are of these `types`; those in turns see `reach` tokens to each side."""
    heads = full_heads(hidden_size, num_heads, "num_attention_heads", dropout=attention_dropout)
    heads |= {"qkv_bias": attention_bias, "out_bias": attention_bias}
    pieces: Any = {
        kind: GroupedQuery(rope=Rope(thetas[kind], scaling=None), window=window, **heads)
        for kind, window in ((FULL, None), (SLIDING, reach + 1))
    }
    pieces["first"] = dataclasses.replace(pieces[types[0]], pre_norm=False)
    norm = LayerNorm(eps=eps, bias=norm_bias)
    config = EncoderConfig(
        hidden_size=hidden_size,
        num_layers=len(types),
        max_positions=max_positions,
        attention=pieces["first"],
        feed_forward=GatedLinearUnit(intermediate_size, activation, bias=mlp_bias, dropout=mlp_dropout),
        norm=norm,
        embedding_norm=norm,
        tie_embeddings=True,
        **fields,
    )
    return in_turns(config, ("first", *types[1:]), pieces)


def _read_thetas(reader: ConfigReader) -> dict[str, float]:
    """Return theta by type of layer, of either spelling. Raises UserError for a scaled rope."""
    given, found = reader.take("rope_parameters", dict, {}), {}
    for kind, name in ((FULL, "global"), (SLIDING, "local")):
        rope = {"rope_theta": reader.take(f"{name}_rope_theta", float, _THETAS[kind])} | (given.get(kind) or {})
        found[kind] = float(rope.pop("rope_theta"))
        if rope.pop("rope_type", "default") != "default" or rope:
            raise UserError(
                f"config.json has rope_parameters.{kind}={given[kind]!r}: only rope_type 'default' is known"
            )
    return found


def _read(reader: ConfigReader, fields: Json) -> EncoderConfig:
    take = reader.take
    reader.only(tie_word_embeddings=True)
    usual = _usual_types(layers := fields.pop("num_layers"), take("global_attn_every_n_layers", int, 3))
    bias, head_bias = take("classifier_bias", bool, False), take("decoder_bias", bool, True)
    transform = reader.activation("classifier_activation", "gelu")
    if reader.architecture.endswith("ForMaskedLM"):
        fields |= {"head_transform": transform, "head_transform_bias": bias}
        fields["head_bias"] = "trained" if head_bias else "none"
    reach, thetas = take("local_attention", int, 128) // 2, _read_thetas(reader)
    return _encoder(read_layer_types(reader, layers, usual), reach=reach, thetas=thetas, **fields)


def _write(config: EncoderConfig, label: str) -> Json:
    turns, transform = write_turns(config), config.head_transform
    window = turns["sliding_window"]
    ropes = {kind: getattr(mixer, "rope", None) for kind, mixer in mixers_by_type(config).items()}
    thetas = _THETAS | {kind: rope.theta for kind, rope in ropes.items() if rope is not None}
    return {
        "architectures": ["ModernBertModel" if transform is None else "ModernBertForMaskedLM"],
        "classifier_activation": write_activation(transform or "gelu", label),
        "classifier_bias": transform is not None and config.head_transform_bias,
        "decoder_bias": config.head_bias == "trained",
        "layer_types": turns["layer_types"],
        "pad_token_id": None,  # transformers' own may be beyond the vocabulary
        "local_attention": 128 if window is None else 2 * (window - 1),
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()},
    }


_NORM = ("d -> d", "d -> d")
_BLOCK = {
    "input_layernorm": ("attn_norm", *_NORM),
    **{f"attention.{name}_proj": ("attn.Wqkv", "(n h) d -> d n h", "(n h) -> n h") for name in "qkv"},
    "attention.o_proj": ("attn.Wo", "d (n h) -> n h d", "d -> d"),
    "post_attention_layernorm": ("mlp_norm", *_NORM),
    **{f"feed_forward.{name}_proj": ("mlp.Wi", "f d -> d f", "f -> f") for name in ("gate", "up")},
    "feed_forward.down_proj": ("mlp.Wo", "d f -> f d", "d -> d"),
}
_OUTSIDE = {
    "embedding": ("model.embeddings.tok_embeddings", "v d -> v d"),
    "embedding_norm": ("model.embeddings.norm", *_NORM),
    "norm": ("model.final_norm", *_NORM),
    "head_transform.dense": ("head.dense", "f d -> d f", "f -> f"),
    "head_transform.norm": ("head.norm", *_NORM),
}

MODERNBERT = Family(
    name="modernbert",
    title="ModernBERT",
    label="a ModernBERT",
    objectives=("MaskedLM",),
    presets={
        f"modernbert_{name}": _encoder(
            _usual_types(layers), vocab_size=50_368, hidden_size=width, num_heads=width // 64, intermediate_size=size
        )
        for name, layers, width, size in (("base", 22, 768, 1152), ("large", 28, 1024, 2624))
    },
    architectures=("ModernBertForMaskedLM", "ModernBertModel"),
    keys=(
        *SIZES,
        Key("intermediate_size", "feed_forward.intermediate_size", int),
        Key("hidden_activation", "feed_forward.activation", Activation, "gelu"),
        Key("max_position_embeddings", "max_positions", int, 8192),
        Key("norm_eps", "norm.eps", float, 1e-5),
        Key("norm_bias", "norm.bias", bool, False, argument="norm_bias"),
        Key("attention_bias", "attention.qkv_bias", bool, False, argument="attention_bias"),
        Key("attention_dropout", "attention.dropout", float, 0.0, argument="attention_dropout"),
        Key("mlp_bias", "feed_forward.bias", bool, False, argument="mlp_bias"),
        Key("mlp_dropout", "feed_forward.dropout", float, 0.0, argument="mlp_dropout"),
    ),
    read=_read,
    write=_write,
    # Of classifiers, losses and training; the last two the original code does not read.
    harmless={
        "embedding_dropout",
        *("classifier_pooling", "deterministic_flash_attn", "reference_compile", "repad_logits_with_grad"),
        *("sparse_prediction", "sparse_pred_ignore_index", "layer_norm_eps", "position_embedding_type"),
    },
    names=TensorNames(
        (
            *mappings(_OUTSIDE),
            *mappings(_BLOCK, "layers.", "model.layers.{layer}."),
            WeightMapping("head_bias.bias", "decoder.bias", "d -> d"),
        ),
        tied={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    ),
)
