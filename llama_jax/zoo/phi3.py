"""Phi-3, Phi-3.5, Phi-4 (arXiv 2404.14219, 2412.08905) and Phi-4-mini (2503.01743): Llama's blocks, LongRoPE.

Sizes from the reports and from the released configs; the counts they give are tested to the digit.
"""

import dataclasses
from typing import Any

from llama_jax.config import Json
from llama_jax.models import DecoderConfig
from llama_jax.nn import LongRopeScaling, Rope, RopeScaling, SwiGLU
from llama_jax.zoo import llama
from llama_jax.zoo.reading import CAUSAL, SIZES, ConfigReader, Key
from llama_jax.zoo.registry import Family
from llama_jax.zoo.rope import long_magnitude, read_rope, write_rope
from llama_jax.zoo.weights import TensorNames, mappings

_LENGTH = "original_max_position_embeddings"


def phi3(
    *, intermediate_size: int, theta: float, scaling: RopeScaling | None = None, partial: float = 1.0, **fields: Any
) -> DecoderConfig:
    """Return a Phi-3 that rotates this part of a head; `fields` are the others of `llama_like`."""
    config = llama.llama_like(feed_forward=SwiGLU(intermediate_size, bias=False), theta=theta, **fields)
    attention: Any = config.attention
    rope = Rope(theta, scaling, rotary_dim=None if partial == 1 else int(attention.head_dim * partial))
    return dataclasses.replace(config, attention=dataclasses.replace(attention, rope=rope))


def _phi3(*, layers: int, width: int, heads: int, kv_heads: int, ffn: int, **fields: Any) -> DecoderConfig:
    sizes: Json = {"num_layers": layers, "hidden_size": width, "num_heads": heads, "num_kv_heads": kv_heads}
    usual: Json = {"vocab_size": 32_064, "max_positions": 4096, "theta": 10_000.0, "eps": 1e-5}
    return phi3(intermediate_size=ffn, **(usual | sizes | fields))


_MINI: Json = {"layers": 32, "width": 3072, "heads": 32, "kv_heads": 32, "ffn": 8192}
_MEDIUM: Json = {"layers": 40, "width": 5120, "heads": 40, "kv_heads": 10, "ffn": 17_920}


_SHORT_MINI = (
    1.05, 1.05, 1.05, 1.1, 1.1, 1.1, 1.2500000000000002, 1.2500000000000002, 1.4000000000000004, 1.4500000000000004,
    1.5500000000000005, 1.8500000000000008, 1.9000000000000008, *(2.000000000000001,) * 19, 2.1000000000000005,
    2.1000000000000005, 2.2, *(2.3499999999999996,) * 4, 2.3999999999999995, 2.3999999999999995, 2.6499999999999986,
    2.6999999999999984, 2.8999999999999977, 2.9499999999999975, *(3.049999999999997,) * 3,
)  # fmt: skip
_LONG_MINI = (
    1.0299999713897705, 1.0499999523162842, 1.0499999523162842, 1.0799999237060547, 1.2299998998641968,
    1.2299998998641968, 1.2999999523162842, 1.4499999284744263, 1.5999999046325684, 1.6499998569488525,
    1.8999998569488525, 2.859999895095825, 3.68999981880188, 5.419999599456787, 5.489999771118164, 5.489999771118164,
    9.09000015258789, 11.579999923706055, 15.65999984741211, 15.769999504089355, 15.789999961853027,
    18.360000610351562, 21.989999771118164, 23.079999923706055, 30.009998321533203, 32.35000228881836,
    32.590003967285156, 35.56000518798828, 39.95000457763672, 53.840003967285156, 56.20000457763672, 57.95000457763672,
    59.29000473022461, 59.77000427246094, 59.920005798339844, 61.190006256103516, 61.96000671386719, 62.50000762939453,
    63.3700065612793, 63.48000717163086, 63.48000717163086, 63.66000747680664, 63.850006103515625, 64.08000946044922,
    64.760009765625, 64.80001068115234, 64.81001281738281, 64.81001281738281,
)  # fmt: skip
_LONG_4_MINI = (
    1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555,
    7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283,
    20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7,
    32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
)  # fmt: skip


def _long(short: tuple[float, ...], long: tuple[float, ...]) -> Json:
    """Return what differs with a context of 131,072, pretrained with 4096; the released window is longer than it."""
    scaling = LongRopeScaling(short, long, 4096, long_magnitude(32.0, 4096))
    return {"max_positions": 131_072, "scaling": scaling, "window": 262_144}


def _read(reader: ConfigReader, fields: Json) -> DecoderConfig:
    reader.activation("hidden_act", "silu", only="silu")
    reader.only(full_attn_mod=1, interpolate_factor=1)  # of the code that was released with Phi-4-mini
    reader.data = {_LENGTH: 4096} | reader.data  # what stands for it where it is absent
    return phi3(**fields, **read_rope(reader, fields["max_positions"], other_partials=True))


def _write(config: DecoderConfig, label: str) -> Json:
    attention: Any = config.attention
    written = {"hidden_act": "silu", **write_rope(attention, label)}
    if (rotary_dim := attention.rope.rotary_dim) is not None:
        written["partial_rotary_factor"] = rotary_dim / attention.head_dim
    if isinstance(attention.rope.scaling, LongRopeScaling):
        # The code of the releases takes a scaling of three keys and no others.
        found = written["rope_scaling"]
        written["rope_scaling"] = {"type": found.pop("rope_type")} | found
        original = written[_LENGTH] = written["rope_scaling"].pop(_LENGTH)
        if found["attention_factor"] == long_magnitude(config.max_positions / original, original):
            del written["rope_scaling"]["attention_factor"]
    return written


_FUSED = {
    **llama.NORMS,
    "attention.q_proj": ("self_attn.qkv_proj", "(n h) d -> d n h"),
    "attention.k_proj": ("self_attn.qkv_proj", "(k h) d -> d k h"),
    "attention.v_proj": ("self_attn.qkv_proj", "(k h) d -> d k h"),
    "attention.o_proj": ("self_attn.o_proj", "d (n h) -> n h d"),
    "feed_forward.gate_proj": ("mlp.gate_up_proj", "f d -> d f"),
    "feed_forward.up_proj": ("mlp.gate_up_proj", "f d -> d f"),
    "feed_forward.down_proj": ("mlp.down_proj", "d f -> f d"),
}

PHI3 = Family(
    name="phi3",
    title="Phi-3, Phi-3.5 and Phi-4",
    label="a Phi-3",
    objectives=("Causal", "Chat"),
    presets={
        "phi3_mini_4k": _phi3(**_MINI, window=2047),
        "phi3_mini_128k": _phi3(**_MINI, **_long(_SHORT_MINI, _LONG_MINI)),  # as it was released first
        "phi3_medium_4k": _phi3(**_MEDIUM, window=2047),
        "phi4": _phi3(**_MEDIUM, vocab_size=100_352, max_positions=16_384, theta=250_000.0),
        "phi4_mini": _phi3(
            **(_MINI | {"heads": 24, "kv_heads": 8}),
            **_long((1.0,) * 48, _LONG_4_MINI),
            vocab_size=200_064,
            partial=0.75,
            tie_embeddings=True,
        ),
    },
    architectures=("Phi3ForCausalLM", "Phi3Model"),
    keys=(
        *SIZES,
        Key("num_key_value_heads", "attention.num_kv_heads", int, None),
        Key("intermediate_size", "feed_forward.intermediate_size", int),
        Key("max_position_embeddings", "max_positions", int, 4096),
        Key("rms_norm_eps", "norm.eps", float, 1e-5),
        Key("attention_dropout", "attention.dropout", float, 0.0, argument="attention_dropout"),
        Key("sliding_window", "attention.window", int, None),
        Key("tie_word_embeddings", "tie_embeddings", bool, False),
    ),
    read=_read,
    write=_write,
    harmless=CAUSAL,
    names=TensorNames(mappings(llama.ENDS | llama.HEAD) + mappings(_FUSED, "layers.", llama.LAYER), llama.TIED),
)
