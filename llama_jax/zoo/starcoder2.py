"""Starcoder2 (arXiv 2402.19173): rotary positions and grouped queries with GPT-2's norms, biases and feed-forward.

Sizes from the paper and from the released configs.
"""

import dataclasses
from typing import Any

from llama_jax.config import Json
from llama_jax.models import DecoderConfig
from llama_jax.nn import MLP, Activation, LayerNorm
from llama_jax.zoo import llama
from llama_jax.zoo.reading import CAUSAL, ConfigReader, Key
from llama_jax.zoo.registry import Family
from llama_jax.zoo.rope import read_rope, write_rope
from llama_jax.zoo.weights import TensorNames, mappings


def _starcoder2(
    *, intermediate_size: int, attention_bias: bool = True, activation: Activation = "gelu_tanh", **others: Any
) -> DecoderConfig:
    feed_forward = MLP(intermediate_size, activation, bias=attention_bias)
    config = llama.llama_like(feed_forward=feed_forward, attention_bias=attention_bias, **others)
    return dataclasses.replace(config, norm=LayerNorm(eps=others["eps"], bias=True))


def _released(theta: float, *row: int, tied: bool = True) -> DecoderConfig:
    return _starcoder2(
        **llama.sizes(*row),
        vocab_size=49_152,
        max_positions=16_384,
        eps=1e-5,
        theta=theta,
        window=4096,
        dropout=0.1,
        attention_dropout=0.1,
        tie_embeddings=tied,
    )


def _read(reader: ConfigReader, fields: Json) -> DecoderConfig:
    reader.only(norm_type="layer_norm", mlp_type="default")
    return _starcoder2(**fields, **read_rope(reader, fields["max_positions"]))


def _write(config: DecoderConfig, label: str) -> Json:
    return {"embedding_dropout": config.dropout, **write_rope(config.attention, label)}


_NORM = ("d -> d", "d -> d")
_ROWS = llama.ATTENTION | {
    **{name: (name, *_NORM) for name in llama.NORMS},
    "feed_forward.up_proj": ("mlp.c_fc", "f d -> d f", "f -> f"),
    "feed_forward.down_proj": ("mlp.c_proj", "d f -> f d", "d -> d"),
}
STARCODER2 = Family(
    name="starcoder2",
    title="Starcoder2",
    label="a Starcoder2",
    presets={
        "starcoder2_3b": _released(999_999.4420358813, 30, 3072, 24, 2, 12_288),
        "starcoder2_7b": _released(1_000_000.0, 32, 4608, 36, 4, 18_432),
        "starcoder2_15b": _released(100_000.0, 40, 6144, 48, 4, 24_576, tied=False),
    },
    architectures=("Starcoder2ForCausalLM", "Starcoder2Model"),
    keys=llama.keys(
        Key("hidden_act", "feed_forward.activation", Activation, "gelu_pytorch_tanh"),
        # Here the embeddings' too, whatever embedding_dropout is.
        Key("residual_dropout", "dropout", float, 0.0),
        Key("sliding_window", "attention.window", int, None),
        Key("use_bias", "attention.qkv_bias", bool, True, argument="attention_bias"),
        kv_heads=2,
        max_positions=4096,
        eps=1e-5,
        tied=True,
        eps_key="norm_epsilon",
    ),
    read=_read,
    write=_write,
    aliases={"layer_norm_epsilon": "norm_epsilon"},
    harmless=CAUSAL,
    names=TensorNames(
        (
            *mappings(llama.ENDS | llama.HEAD | {"norm": ("model.norm", *_NORM)}),
            *mappings(_ROWS, "layers.", llama.LAYER),
        ),
        llama.TIED,
    ),
)
