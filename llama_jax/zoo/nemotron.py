"""NVIDIA's Nemotron-4 (arXiv 2402.16819, 2406.11704) and Minitron (arXiv 2407.14679), which is pruned of it.

Llama's blocks with squared ReLU, half of each head rotated, and LayerNorm whose factor is 1 plus the weight. Sizes from
the papers.
"""

import dataclasses
from typing import Any

from llama_jax.config import Json
from llama_jax.models import DecoderConfig
from llama_jax.nn import MLP, Activation, LayerNorm
from llama_jax.zoo import llama
from llama_jax.zoo.gpt_neox import write_rotary
from llama_jax.zoo.reading import CAUSAL, ConfigReader, Key
from llama_jax.zoo.registry import Family
from llama_jax.zoo.rope import read_rope
from llama_jax.zoo.stablelm import NAMES


def _nemotron(
    *,
    intermediate_size: int,
    eps: float,
    activation: Activation = "relu_squared",
    mlp_bias: bool = False,
    **fields: Any,
) -> DecoderConfig:
    config = llama.llama_like(eps=eps, feed_forward=MLP(intermediate_size, activation, bias=mlp_bias), **fields)
    return dataclasses.replace(config, norm=LayerNorm(eps, bias=True, zero_centered=True))


def _released(*row: int, head_dim: int = 128) -> DecoderConfig:
    usual: Json = {"vocab_size": 256_000, "max_positions": 4096, "eps": 1e-5, "theta": 10_000.0, "partial": 0.5}
    return _nemotron(**usual, **llama.sizes(*row), head_dim=head_dim)


def _read(reader: ConfigReader, fields: Json) -> DecoderConfig:
    return _nemotron(**fields, **read_rope(reader, fields["max_positions"], partial=0.5, other_partials=True))


NEMOTRON = Family(
    name="nemotron",
    title="Nemotron-4 and Minitron",
    label="a Nemotron",
    presets={
        "minitron_4b": _released(32, 3072, 24, 8, 9216),
        "minitron_8b": _released(32, 4096, 48, 8, 16_384),
        "nemotron4_15b": _released(32, 6144, 48, 8, 24_576),
        "nemotron4_340b": _released(96, 18_432, 96, 8, 73_728, head_dim=192),
    },
    architectures=("NemotronForCausalLM", "NemotronModel"),
    keys=llama.keys(
        llama.ATTENTION_BIAS,
        llama.MLP_BIAS,
        Key("hidden_act", "feed_forward.activation", Activation, "relu2"),
        max_positions=4096,
        eps=1e-5,
        eps_key="norm_eps",
    ),
    read=_read,
    write=write_rotary,
    harmless=CAUSAL,
    names=NAMES,
)
