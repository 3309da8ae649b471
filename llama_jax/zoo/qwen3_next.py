"""Qwen3-Next: three of four layers have the gated delta rule (arXiv 2412.06464), the fourth gated attention.

All have Qwen3's experts with a gated one for all tokens, and norms whose factor is 1 plus the weight. The released
blocks of multi-token prediction (`mtp.*`) are left out, as transformers leaves them out.
"""

import dataclasses
from typing import Any

from llama_jax.config import Json
from llama_jax.models import DecoderConfig, LayerOverride
from llama_jax.nn import GatedDeltaNet, RMSNorm
from llama_jax.zoo import llama, qwen_moe
from llama_jax.zoo.layers import FULL, every, read_layer_types
from llama_jax.zoo.reading import ConfigReader, Key
from llama_jax.zoo.rope import read_rope
from llama_jax.zoo.weights import TensorNames, WeightMapping, mappings

LINEAR, PARTIAL = "linear_attention", 0.25
# Keys of the delta rule by its fields, with transformers' defaults.
_DELTA = {
    "num_key_heads": ("linear_num_key_heads", 16),
    "num_value_heads": ("linear_num_value_heads", 32),
    "key_dim": ("linear_key_head_dim", 128),
    "value_dim": ("linear_value_head_dim", 128),
    "conv_kernel": ("linear_conv_kernel_dim", 4),
}


def qwen3_next(
    *, layer_types: tuple[str, ...], delta: Json, overrides: tuple[LayerOverride, ...] = (), **fields: Any
) -> DecoderConfig:
    """Return a Qwen3-Next; `delta` are sizes of `GatedDeltaNet`, `fields` the arguments of `qwen_moe`."""
    config = qwen_moe.qwen_moe(**fields, partial=PARTIAL)
    attention: Any = config.attention
    norm = RMSNorm(fields["eps"], zero_centered=True)
    linear = tuple(i for i, kind in enumerate(layer_types) if kind == LINEAR)
    if linear:
        overrides = (LayerOverride(linear, GatedDeltaNet(**delta, eps=fields["eps"])), *overrides)
    attention = dataclasses.replace(attention, output_gate=True, qk_norm=norm)
    return dataclasses.replace(config, attention=attention, norm=norm, overrides=overrides)


_A_LAYER = {
    "attention.in_proj_qkvz": ("linear_attn.in_proj_qkvz", "(k c) d -> d k c"),
    "attention.in_proj_ba": ("linear_attn.in_proj_ba", "(k c) d -> d k c"),
    "attention.norm": ("linear_attn.norm", "j -> j"),
    "attention.out_proj": ("linear_attn.out_proj", "d (k c) -> k c d"),
}
_PARTS = {f"conv_{part}": ("conv1d.weight", "(k c) 1 s -> k c s") for part in "qkv"}
_PARTS |= {name: (name, "v -> v") for name in ("A_log", "dt_bias")}
_ROWS = (
    *qwen_moe.ROWS,
    *mappings(_A_LAYER, "layers.", llama.LAYER),
    *(
        WeightMapping(f"layers.attention.{name}", f"{llama.LAYER}linear_attn.{source}", pattern)
        for name, (source, pattern) in _PARTS.items()
    ),
)


def _read(reader: ConfigReader, fields: Json) -> DecoderConfig:
    num_layers = fields["num_layers"]
    usual = every(reader.take("full_attention_interval", int, 4), num_layers, others=LINEAR)
    return qwen3_next(
        **fields,
        **read_rope(reader, fields["max_positions"], partial=PARTIAL),
        layer_types=read_layer_types(reader, num_layers, usual, (FULL, LINEAR)),
        delta={field: reader.take(key, int, default) for field, (key, default) in _DELTA.items()},
        overrides=qwen_moe.read_dense(reader, num_layers),
        out_bias=fields["qkv_bias"],
    )


def _write(config: DecoderConfig, label: str) -> Json:
    mixers = [mixer for mixer, _ in config.layer_pieces()]
    delta = next((mixer for mixer in mixers if isinstance(mixer, GatedDeltaNet)), None)
    found = {key: getattr(delta, field, default) for field, (key, default) in _DELTA.items()}
    types = [LINEAR if isinstance(mixer, GatedDeltaNet) else FULL for mixer in mixers]
    own = qwen_moe.write(config, label) | {"layer_types": types, "partial_rotary_factor": PARTIAL}
    return {key: value for key, value in own.items() if key != "use_sliding_window"} | found


QWEN3_NEXT = dataclasses.replace(
    qwen_moe.QWEN3_MOE,
    name="qwen3_next",
    title="Qwen3-Next",
    label="a Qwen3-Next",
    presets={
        "qwen3_next_80b_a3b": qwen3_next(
            vocab_size=151_936,
            hidden_size=2048,
            num_layers=48,
            num_heads=16,
            num_kv_heads=2,
            head_dim=256,
            num_experts=512,
            expert_size=512,
            top_k=10,
            normalize=True,
            shared_size=512,
            eps=1e-6,
            theta=10_000_000.0,
            max_positions=262_144,
            layer_types=every(4, 48, others=LINEAR),
            delta={field: default for field, (_, default) in _DELTA.items()},
        )
    },
    architectures=("Qwen3NextForCausalLM", "Qwen3NextModel"),
    keys=(
        *qwen_moe.keys(2, 512, 512, 10, head_dim=256, normalize=True),
        Key("shared_expert_intermediate_size", "feed_forward.shared_size", int, 512),
    ),
    read=_read,
    write=_write,
    names=TensorNames(_ROWS, llama.TIED, ignored=(r"mtp\..*",)),
)
