"""Granite 3 (IBM 2024, "Granite 3.0 Language Models"): Llama's blocks with factors of embeddings, scores and results.

Sizes from the released configs; the counts they give are tested to the digit.
"""

import dataclasses
from typing import Any

from llama_jax.config import Json
from llama_jax.models import DecoderConfig
from llama_jax.nn import SwiGLU
from llama_jax.zoo import llama
from llama_jax.zoo.reading import ConfigReader, Key
from llama_jax.zoo.rope import read_rope


def granite(
    *,
    intermediate_size: int,
    mlp_bias: bool = False,
    scale: float = 1.0,
    divisor: float = 1.0,
    **fields: Any,
) -> DecoderConfig:
    """Return a Granite; `scale` is of the scores, `divisor` of the logits, `fields` are the others of `llama_like`."""
    feed_forward = SwiGLU(intermediate_size, bias=mlp_bias)
    config = llama.llama_like(feed_forward=feed_forward, logit_scale=1 / divisor, **fields)
    attention: Any = config.attention
    return dataclasses.replace(config, attention=dataclasses.replace(attention, scale=scale))


def _granite(width: int, ffn: int, scale: float, divisor: float) -> DecoderConfig:
    return granite(
        vocab_size=49_155,
        hidden_size=width,
        num_layers=40,
        num_heads=32,
        num_kv_heads=8,
        intermediate_size=ffn,
        max_positions=131_072,
        eps=1e-5,
        theta=5_000_000.0,
        scale=scale,
        divisor=divisor,
        embedding_scale=12.0,
        residual_scale=0.22,
        tie_embeddings=True,
    )


def _read(reader: ConfigReader, fields: Json) -> DecoderConfig:
    reader.activation("hidden_act", "silu", only="silu")
    divisor = reader.take("logits_scaling", float, 1.0)
    return granite(divisor=divisor, **fields, **read_rope(reader, fields["max_positions"]))


def _write(config: DecoderConfig, label: str) -> Json:
    return llama.LLAMA.write(config, label) | {"logits_scaling": round(1 / config.logit_scale, 9)}


GRANITE = dataclasses.replace(
    llama.LLAMA,
    name="granite",
    title="Granite 3",
    label="a Granite",
    presets={
        "granite3_1_2b": _granite(2048, 8192, scale=0.015625, divisor=8.0),
        "granite3_1_8b": _granite(4096, 12_800, scale=0.0078125, divisor=16.0),
    },
    architectures=("GraniteForCausalLM", "GraniteModel"),
    keys=(
        *llama.LLAMA.keys,
        Key("embedding_multiplier", "embedding_scale", float, 1.0),
        Key("attention_multiplier", "attention.scale", float, 1.0),
        Key("residual_multiplier", "residual_scale", float, 1.0),
    ),
    read=_read,
    write=_write,
    meta=None,
)
