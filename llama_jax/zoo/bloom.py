"""BLOOM (arXiv 2211.05100): ALiBi, a norm after the embeddings, and GPT-2's blocks otherwise."""

import dataclasses
from typing import Any

from llama_jax.config import Json
from llama_jax.models import DecoderConfig
from llama_jax.nn import Alibi
from llama_jax.zoo.gpt_neox import ends, fused_layers, layer_norm_decoder
from llama_jax.zoo.reading import CAUSAL, ConfigReader, Key
from llama_jax.zoo.registry import Family
from llama_jax.zoo.weights import TensorNames, mappings


def _bloom(*, num_heads: int, **fields: Any) -> DecoderConfig:
    config = layer_norm_decoder(num_heads=num_heads, rope=None, activation="gelu_tanh", **fields)
    return dataclasses.replace(config, position_bias=Alibi(num_heads), embedding_norm=config.norm)


def _released(layers: int, width: int, heads: int) -> DecoderConfig:
    sizes: Json = {"num_layers": layers, "hidden_size": width, "num_heads": heads}
    return _bloom(**sizes, vocab_size=250_880, max_positions=2048, tie_embeddings=True)


def _read(reader: ConfigReader, fields: Json) -> DecoderConfig:
    reader.only(apply_residual_connection_post_layernorm=False, n_inner=4 * fields["hidden_size"])
    return _bloom(**fields)


BLOOM = Family(
    name="bloom",
    title="BLOOM",
    label="a BLOOM",
    presets={
        "bloom_560m": _released(24, 1024, 16),
        "bloom_1b1": _released(24, 1536, 16),
        "bloom_1b7": _released(24, 2048, 16),
        "bloom_3b": _released(30, 2560, 32),
        "bloom_7b1": _released(30, 4096, 32),
        "bloom_176b": _released(70, 14_336, 112),
    },
    architectures=("BloomForCausalLM", "BloomModel"),
    keys=(
        Key("vocab_size", "vocab_size", int, 250_880),
        Key("hidden_size", "hidden_size", int),
        Key("n_layer", "num_layers", int),
        Key("n_head", "attention.num_heads", int),
        Key("seq_length", "max_positions", int, 2048),
        Key("layer_norm_epsilon", "norm.eps", float, 1e-5),
        # Here the embeddings' too.
        Key("hidden_dropout", "dropout", float, 0.0),
        Key("attention_dropout", "attention.dropout", float, 0.0, argument="attention_dropout"),
        Key("tie_word_embeddings", "tie_embeddings", bool, True),
    ),
    read=_read,
    write=lambda config, label: {},
    aliases={"n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
    # Ways of computing the same.
    harmless=CAUSAL | {"masked_softmax_fusion", "offset_alibi", "skip_bias_add", "slow_but_exact"},
    names=TensorNames(
        ends("transformer.word_embeddings", "transformer.ln_f")
        + mappings({"embedding_norm": ("transformer.word_embeddings_layernorm", "d -> d", "d -> d")})
        + fused_layers("transformer.h.{layer}.", "self_attention"),
        {"lm_head.weight": "transformer.word_embeddings.weight"},
    ),
)
