"""Stability AI's StableLM 3B and StableLM 2 (arXiv 2402.17834): Llama's blocks with LayerNorm and partial rotation."""

import dataclasses
from typing import Any

from llama_jax.config import Json
from llama_jax.models import DecoderConfig
from llama_jax.nn import LayerNorm
from llama_jax.zoo import llama
from llama_jax.zoo.gpt_neox import write_rotary
from llama_jax.zoo.reading import CAUSAL, ConfigReader, Key
from llama_jax.zoo.registry import Family
from llama_jax.zoo.rope import read_rope
from llama_jax.zoo.weights import TensorNames, mappings


def _stablelm(*, eps: float = 1e-5, theta: float = 10_000.0, qk_norm: bool = False, **fields: Any) -> DecoderConfig:
    norm = LayerNorm(eps, bias=False) if qk_norm else None
    config = llama.llama(eps=eps, theta=theta, qk_norm=norm, **fields)
    attention: Any = config.attention
    if qk_norm:
        attention = dataclasses.replace(attention, qk_norm_over="own_weights")
    return dataclasses.replace(config, attention=attention, norm=LayerNorm(eps, bias=True))


def _released(vocab: int, *row: int, max_positions: int = 4096, **fields: Any) -> DecoderConfig:
    sizes = llama.sizes(*row) | {"vocab_size": vocab, "max_positions": max_positions}
    return _stablelm(**sizes, partial=0.25, **fields)


def _read(reader: ConfigReader, fields: Json) -> DecoderConfig:
    reader.activation("hidden_act", "silu", only="silu")
    rope = read_rope(reader, fields["max_positions"], partial=0.25, other_partials=True)
    parallel = "one_norm" if reader.take("use_parallel_residual", bool, False) else "none"
    return _stablelm(**fields, **rope, parallel=parallel, qk_norm=reader.take("qk_layernorm", bool, False))


def _write(config: DecoderConfig, label: str) -> Json:
    attention: Any = config.attention
    found = {"use_parallel_residual": config.parallel != "none", "qk_layernorm": attention.qk_norm is not None}
    return {"hidden_act": "silu", **found, **write_rotary(config, label)}


_NORM = ("d -> d", "d -> d")
# Each head's norm is a tensor of its own.
_QK = {f"attention.{name}_norm": (f"self_attn.{name}_layernorm.norms.{{expert}}", "e h -> e h") for name in "qk"}
_ROWS = llama.ATTENTION | llama.FEED_FORWARD | {name: (name, *_NORM) for name in llama.NORMS} | _QK
_ENDS = llama.ENDS | llama.HEAD | {"norm": ("model.norm", *_NORM)}
NAMES = TensorNames(mappings(_ENDS) + mappings(_ROWS, "layers.", llama.LAYER), llama.TIED)
STABLELM = Family(
    name="stablelm",
    title="StableLM 3B and StableLM 2",
    label="a StableLM",
    presets={
        "stablelm_3b_4e1t": _released(50_304, 32, 2560, 32, 32, 6912),
        "stable_code_3b": _released(50_304, 32, 2560, 32, 32, 6912, max_positions=16_384, theta=1_000_000.0),
        "stablelm_2_1_6b": _released(100_352, 24, 2048, 32, 32, 5632, qkv_bias=True),
        "stablelm_2_12b": _released(100_352, 40, 5120, 32, 8, 13_824, parallel="one_norm", qk_norm=True),
    },
    architectures=("StableLmForCausalLM", "StableLmModel"),
    keys=llama.keys(
        Key("use_qkv_bias", "attention.qkv_bias", bool, False, argument="qkv_bias"),
        Key("hidden_dropout", "dropout", float, 0.0),
        kv_heads=32,
        max_positions=4096,
        eps=1e-5,
        eps_key="layer_norm_eps",
    ),
    read=_read,
    write=_write,
    aliases={"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"},
    harmless=CAUSAL,
    names=NAMES,
)
