"""OLMo 2 and 3 (arXiv 2501.00656, 2512.13961): norms of results alone, and of all heads' queries and keys at once.

Sizes from the reports and from the released configs; the counts they give are tested to the digit.
"""

import dataclasses
from typing import Any

from llama_jax.config import Json
from llama_jax.models import DecoderConfig
from llama_jax.nn import RMSNorm, Rope, SwiGLU, YarnScaling
from llama_jax.zoo import llama
from llama_jax.zoo.layers import FULL, SLIDING, every, in_turns, mixers_by_type, read_layer_types, write_turns
from llama_jax.zoo.reading import CAUSAL, ConfigReader, Key
from llama_jax.zoo.registry import Family
from llama_jax.zoo.rope import read_rope, read_ropes, write_ropes
from llama_jax.zoo.weights import TensorNames, mappings

_THETA = 500_000.0


def olmo(*, intermediate_size: int, eps: float = 1e-6, **fields: Any) -> DecoderConfig:
    """Return an OLMo 2; `fields` are the others of `llama_like`."""
    feed_forward = SwiGLU(intermediate_size, bias=False)
    config = llama.llama_like(feed_forward=feed_forward, norm_placement="output", eps=eps, **fields)
    attention: Any = config.attention
    norm = RMSNorm(eps, cast_last=True)
    attention = dataclasses.replace(attention, qk_norm=norm, qk_norm_over="width")
    return dataclasses.replace(config, attention=attention, norm=norm)


def olmo3(*, types: tuple[str, ...], window: int | None, local: Rope, **fields: Any) -> DecoderConfig:
    """Return an OLMo 3: layers of two `types`; those with a window have the positions `local`."""
    config = olmo(**fields)
    full: Any = config.attention
    return in_turns(config, types, {FULL: full, SLIDING: dataclasses.replace(full, window=window, rope=local)})


def _sizes(layers: int, width: int, heads: int, kv_heads: int, ffn: int) -> Json:
    sizes = {"num_layers": layers, "hidden_size": width, "num_heads": heads, "num_kv_heads": kv_heads}
    return sizes | {"intermediate_size": ffn, "theta": _THETA}


def _olmo2(*sizes: int) -> DecoderConfig:
    return olmo(vocab_size=100_352, max_positions=4096, **_sizes(*sizes))


def _olmo3(*sizes: int) -> DecoderConfig:
    yarn = YarnScaling(8.0, 8192, beta_fast=32.0, beta_slow=1.0, mscale=0.0, mscale_all_dim=0.0)
    turns: Json = {"types": every(4, sizes[0]), "window": 4096, "local": Rope(_THETA, scaling=None)}
    return olmo3(vocab_size=100_278, max_positions=65_536, scaling=yarn, **turns, **_sizes(*sizes))


def _read_olmo2(reader: ConfigReader, fields: Json) -> DecoderConfig:
    reader.activation("hidden_act", "silu", only="silu")
    return olmo(**fields, **read_rope(reader, fields["max_positions"]))


def _read_olmo3(reader: ConfigReader, fields: Json) -> DecoderConfig:
    reader.activation("hidden_act", "silu", only="silu")
    layers, ropes = fields["num_layers"], read_ropes(reader, fields["max_positions"], _THETA)
    return olmo3(
        types=read_layer_types(reader, layers, every(4, layers)),
        window=reader.take("sliding_window", int, None, absent=4096),
        local=Rope(**ropes[SLIDING]),
        **ropes[FULL],
        **fields,
    )


def _write_olmo3(config: DecoderConfig, label: str) -> Json:
    return {"hidden_act": "silu", **write_turns(config), **write_ropes(mixers_by_type(config), label)}


_NORMS = {
    "attention_norm": ("post_attention_layernorm", "d -> d"),
    "feed_forward_norm": ("post_feedforward_layernorm", "d -> d"),
    "attention.q_norm": ("self_attn.q_norm", "d -> d"),
    "attention.k_norm": ("self_attn.k_norm", "d -> d"),
}

OLMO2 = Family(
    name="olmo2",
    title="OLMo 2",
    label="an OLMo 2",
    presets={
        "olmo2_1b": _olmo2(16, 2048, 16, 16, 8192),
        "olmo2_7b": _olmo2(32, 4096, 32, 32, 11_008),
        "olmo2_13b": _olmo2(40, 5120, 40, 40, 13_824),
        "olmo2_32b": _olmo2(64, 5120, 40, 8, 27_648),
    },
    architectures=("Olmo2ForCausalLM", "Olmo2Model"),
    keys=(
        *(key for key in llama.LLAMA.keys if key.key not in ("rms_norm_eps", "mlp_bias")),
        Key("rms_norm_eps", "norm.eps", float, 1e-5),
    ),
    read=_read_olmo2,
    write=llama.LLAMA.write,
    harmless=CAUSAL,
    names=TensorNames(
        mappings(llama.ENDS | llama.HEAD)
        + mappings({**_NORMS, **llama.ATTENTION, **llama.FEED_FORWARD}, "layers.", llama.LAYER),
        llama.TIED,
    ),
)
OLMO3 = dataclasses.replace(
    OLMO2,
    name="olmo3",
    title="OLMo 3",
    label="an OLMo 3",
    presets={
        "olmo3_7b": _olmo3(32, 4096, 32, 32, 11_008),
        "olmo3_32b": _olmo3(64, 5120, 40, 8, 27_648),
    },
    architectures=("Olmo3ForCausalLM", "Olmo3Model"),
    read=_read_olmo3,
    write=_write_olmo3,
)
