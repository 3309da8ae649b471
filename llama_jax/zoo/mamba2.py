"""Mamba-2 (arXiv 2405.21060): blocks of a norm and a state-space mixer, without attention and feed-forward.

Sizes of the released models `state-spaces/mamba2-*`; the counts they give are tested to the digit.
"""

from typing import Any

from llama_jax.config import Json, UserError
from llama_jax.models import DecoderConfig
from llama_jax.nn import Mamba2, RMSNorm
from llama_jax.zoo.reading import ConfigReader, Key
from llama_jax.zoo.registry import Family
from llama_jax.zoo.weights import TensorNames, WeightMapping, mappings


def _mamba2(
    *, vocab_size: int, hidden_size: int, num_layers: int, eps: float, tie_embeddings: bool, **mixer: Any
) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        max_positions=2**20,  # it has no limit: only the length of sampled texts
        attention=Mamba2(eps=eps, **mixer),
        feed_forward=None,
        norm=RMSNorm(eps),
        tie_embeddings=tie_embeddings,
    )


def _preset(num_layers: int, width: int) -> DecoderConfig:
    sizes: Json = {"vocab_size": 50_288, "hidden_size": width, "num_layers": num_layers, "num_heads": width // 32}
    return _mamba2(**sizes, head_dim=64, eps=1e-5, tie_embeddings=True)


def _read(reader: ConfigReader, fields: Json) -> DecoderConfig:
    reader.activation("hidden_act", "silu", only="silu")
    inner = fields["num_heads"] * fields["head_dim"]
    if reader.take("expand", int, 2) * fields["hidden_size"] != inner:
        raise UserError(f"config.json has num_heads * head_dim = {inner}, which is not expand * hidden_size")
    limits = reader.take("time_step_limit", list, [0.0, float("inf")])
    numbers = [float("inf") if limit == {"__float__": "Infinity"} else limit for limit in limits]
    if len(numbers) != 2 or not all(isinstance(number, int | float) for number in numbers):
        raise UserError(f"config.json has time_step_limit={limits}: it must be the least and the largest step")
    low, high = (float(number) for number in numbers)
    return _mamba2(**fields, min_step=low, max_step=None if high == float("inf") else high)


def _write(config: DecoderConfig, label: str) -> Json:
    mixer: Any = config.attention
    high = float("inf") if mixer.max_step is None else mixer.max_step
    return {
        "expand": mixer.num_heads * mixer.head_dim // config.hidden_size,
        "hidden_act": "silu",
        "time_step_limit": [mixer.min_step, high],
    }


def _parts(source: str, patterns: Json, kind: str = "weight") -> tuple[WeightMapping, ...]:
    return tuple(
        WeightMapping(f"layers.attention.{name}.{kind}", f"backbone.layers.{{layer}}.mixer.{source}.{kind}", pattern)
        for name, pattern in patterns.items()
    )


_SIDES = {"z_proj": "n h", "x_proj": "n h", "b_proj": "g s", "c_proj": "g s", "dt_proj": "n"}
_CONVOLVED = {f"{name}_conv": _SIDES[f"{name}_proj"] for name in "xbc"}
_MIXER = "backbone.layers.{layer}.mixer."

MAMBA2 = Family(
    name="mamba2",
    title="Mamba-2",
    label="a Mamba-2",
    presets={
        "mamba2_130m": _preset(24, 768),
        "mamba2_370m": _preset(48, 1024),
        "mamba2_780m": _preset(48, 1536),
        "mamba2_1_3b": _preset(48, 2048),
        "mamba2_2_7b": _preset(64, 2560),
    },
    architectures=("Mamba2ForCausalLM",),
    keys=(
        Key("vocab_size", "vocab_size", int, 32_768),
        Key("hidden_size", "hidden_size", int, 4096),
        Key("num_hidden_layers", "num_layers", int, 64),
        Key("num_heads", "attention.num_heads", int, 128),
        Key("head_dim", "attention.head_dim", int, 64),
        Key("state_size", "attention.state_size", int, 128),
        Key("n_groups", "attention.num_groups", int, 8),
        Key("conv_kernel", "attention.conv_kernel", int, 4),
        Key("use_conv_bias", "attention.conv_bias", bool, True),
        Key("use_bias", "attention.bias", bool, False),
        Key("layer_norm_epsilon", "norm.eps", float, 1e-5),
        Key("tie_word_embeddings", "tie_embeddings", bool, False),
    ),
    read=_read,
    write=_write,
    # Of first values, and how many tokens their code computes at once.
    harmless={
        "chunk_size",
        "rescale_prenorm_residual",
        *(f"time_step_{name}" for name in ("floor", "max", "min", "rank")),
    },
    names=TensorNames(
        mappings(
            {
                "embedding": ("backbone.embeddings", "v d -> v d"),
                "norm": ("backbone.norm_f", "d -> d"),
                "lm_head": ("lm_head", "v d -> d v"),
                "layers.input_layernorm": ("backbone.layers.{layer}.norm", "d -> d"),
                "layers.attention.o_proj": (f"{_MIXER}out_proj", "d (n h) -> n h d", "d -> d"),
            }
        )
        + _parts("in_proj", {name: f"({side}) d -> d {side}" for name, side in _SIDES.items()})
        + _parts("in_proj", {name: f"({side}) -> {side}" for name, side in _SIDES.items()}, "bias")
        + _parts("conv1d", {name: f"({side}) 1 k -> {side} k" for name, side in _CONVOLVED.items()})
        + _parts("conv1d", {name: f"({side}) -> {side}" for name, side in _CONVOLVED.items()}, "bias")
        + (
            WeightMapping("layers.attention.a_log", f"{_MIXER}A_log", "n -> n"),
            WeightMapping("layers.attention.dt_bias", f"{_MIXER}dt_bias", "n -> n"),
            WeightMapping("layers.attention.skip", f"{_MIXER}D", "n -> n"),
            WeightMapping("layers.attention.gated_norm", f"{_MIXER}norm.weight", "(n h) -> n h"),
        ),
        {"lm_head.weight": "backbone.embeddings.weight"},
    ),
)
