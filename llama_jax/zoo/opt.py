"""OPT (Zhang et al. 2022, arXiv 2205.01068): GPT-3's shape with ReLU, and positions that begin at the third row.

Sizes from the paper (table 1). The 350M, whose embedding is narrower than its layers, is refused.
"""

import dataclasses
from typing import Any

from llama_jax.config import Json
from llama_jax.models import DecoderConfig
from llama_jax.nn import Activation, LearnedPositions
from llama_jax.zoo import llama
from llama_jax.zoo.gpt2 import gpt
from llama_jax.zoo.reading import CAUSAL, SIZES, ConfigReader, Key
from llama_jax.zoo.registry import Family
from llama_jax.zoo.weights import TensorNames, mappings


def _opt(*, norm_first: bool, max_positions: int, **sizes: Any) -> DecoderConfig:
    return dataclasses.replace(
        gpt(max_positions=max_positions, **sizes),
        positions=LearnedPositions(max_positions, offset=2),
        norm_placement="pre" if norm_first else "post",
    )


def _released(layers: int, width: int, heads: int) -> DecoderConfig:
    sizes = {"vocab_size": 50_272, "num_layers": layers, "hidden_size": width, "num_heads": heads}
    return _opt(norm_first=True, max_positions=2048, activation="relu", dropout=0.1, **sizes)


def _read(reader: ConfigReader, fields: Json) -> DecoderConfig:
    reader.only(
        _remove_final_layer_norm=False,
        enable_bias=True,
        layer_norm_elementwise_affine=True,
        word_embed_proj_dim=fields["hidden_size"],
    )
    return _opt(**fields, norm_first=reader.take("do_layer_norm_before", bool, True))


def _write(config: DecoderConfig, label: str) -> Json:
    return {"do_layer_norm_before": config.norm_placement == "pre", "word_embed_proj_dim": config.hidden_size}


def _names(config: DecoderConfig) -> TensorNames:
    norms = ("input_layernorm", "post_attention_layernorm")
    if config.norm_placement == "post":
        norms = ("attention_norm", "feed_forward_norm")
    norm, decoder = ("d -> d", "d -> d"), "model.decoder."
    layer = llama.ATTENTION | {
        norms[0]: ("self_attn_layer_norm", *norm),
        norms[1]: ("final_layer_norm", *norm),
        "attention.o_proj": ("self_attn.out_proj", *llama.ATTENTION["attention.o_proj"][1:]),
        "feed_forward.up_proj": ("fc1", "f d -> d f", "f -> f"),
        "feed_forward.down_proj": ("fc2", "d f -> f d", "d -> d"),
    }
    ends = {
        "embedding": ("embed_tokens", "v d -> v d"),
        "positions": ("embed_positions", "p d -> p d"),
        "norm": ("final_layer_norm", *norm),
    }
    weights = (*mappings(ends, theirs=decoder), *mappings(llama.HEAD))
    tied = {"lm_head.weight": f"{decoder}embed_tokens.weight"}
    return TensorNames((*weights, *mappings(layer, "layers.", f"{decoder}layers.{{layer}}.")), tied)


OPT = Family(
    name="opt",
    title="OPT",
    label="an OPT",
    presets={
        "opt_125m": _released(12, 768, 12),
        "opt_1_3b": _released(24, 2048, 32),
        "opt_2_7b": _released(32, 2560, 32),
        "opt_6_7b": _released(32, 4096, 32),
        "opt_13b": _released(40, 5120, 40),
        "opt_30b": _released(48, 7168, 56),
        "opt_66b": _released(64, 9216, 72),
        "opt_175b": _released(96, 12_288, 96),
    },
    architectures=("OPTForCausalLM", "OPTModel"),
    keys=(
        *SIZES,
        Key("ffn_dim", "feed_forward.intermediate_size", int),
        Key("max_position_embeddings", "max_positions", int, 2048),
        Key("activation_function", "feed_forward.activation", Activation, "relu"),
        # Here the embeddings' too.
        Key("dropout", "dropout", float, 0.1),
        Key("attention_dropout", "attention.dropout", float, 0.0, argument="attention_dropout"),
        Key("tie_word_embeddings", "tie_embeddings", bool, True),
    ),
    read=_read,
    write=_write,
    harmless=CAUSAL,
    names=_names,
)
