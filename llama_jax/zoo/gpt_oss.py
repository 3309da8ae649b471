"""GPT-OSS (OpenAI 2025, arXiv 2508.10925): sinks, windows in turns, biased experts behind a clamped gate."""

import dataclasses
from typing import Any

from llama_jax.config import Json, UserError
from llama_jax.models import DecoderConfig
from llama_jax.nn import Experts, SoftmaxTopK, YarnScaling
from llama_jax.zoo import llama
from llama_jax.zoo.experts import balanced_jointly
from llama_jax.zoo.layers import FULL, SLIDING, every, in_turns, read_layer_types, write_turns
from llama_jax.zoo.reading import CAUSAL, SIZES, ConfigReader, Key
from llama_jax.zoo.registry import Family
from llama_jax.zoo.rope import read_rope, write_rope
from llama_jax.zoo.weights import TensorNames, WeightMapping, mappings

_YARN = YarnScaling(32.0, 4096, beta_fast=32.0, beta_slow=1.0, mscale=0.0, mscale_all_dim=0.0, truncate=False)


def _gpt_oss(types: tuple[str, ...], *, window: int | None, top_k: int, **fields: Any) -> DecoderConfig:
    """Return the model whose layers have these `types`; `fields` are those of `Experts` and of `llama_like`."""
    own = {name: fields.pop(name) for name in ("num_experts", "intermediate_size", "limit", "load_balance_loss")}
    router = SoftmaxTopK(top_k, normalize=True, bias=True)
    experts = Experts(router=router, activation="quick_gelu", gated=True, bias=True, balance_over="layers", **own)
    config = llama.llama_like(num_layers=len(types), feed_forward=experts, **fields)
    full = dataclasses.replace(config.attention, sinks=True)  # type: ignore[call-overload]
    return in_turns(config, types, {SLIDING: dataclasses.replace(full, window=window), FULL: full})


def _preset(num_layers: int, num_experts: int) -> DecoderConfig:
    return _gpt_oss(
        every(2, num_layers),
        vocab_size=201_088,
        hidden_size=2880,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        intermediate_size=2880,
        num_experts=num_experts,
        top_k=4,
        limit=7.0,
        load_balance_loss=0.9,
        max_positions=131_072,
        theta=150_000.0,
        scaling=_YARN,
        window=128,
        eps=1e-5,
        attention_bias=True,
    )


def _read(reader: ConfigReader, fields: Json) -> DecoderConfig:
    reader.activation("hidden_act", "silu", only="silu")
    reader.only(swiglu_alpha=1.702)
    method = reader.take("quantization_config", dict, {}).get("quant_method", "mxfp4")
    if method != "mxfp4":
        raise UserError(
            f"config.json has quantization_config.quant_method={method!r}, and {reader.label} can only have 'mxfp4': "
            "take the release of these weights"
        )
    rope = read_rope(reader, fields["max_positions"], 150_000.0)
    if not any(reader.data.get(key) for key in ("rope_scaling", "rope_parameters")):
        rope["scaling"] = _YARN
    types = read_layer_types(reader, num_layers := fields.pop("num_layers"), every(2, num_layers))
    return _gpt_oss(types, window=reader.take("sliding_window", int, None, absent=128), **fields, **rope)


def _write(config: DecoderConfig, label: str) -> Json:
    rope = write_rope(config.attention, label)
    return {
        "hidden_act": "silu",
        "swiglu_alpha": 1.702,
        **write_turns(config),
        # Where it is null, the model has the scaling of the release.
        **rope | {"rope_scaling": rope["rope_scaling"] or {"rope_type": "default"}},
    }


_MLP, _EXPERTS = llama.LAYER + "mlp.", "layers.feed_forward.experts."
GPT_OSS = Family(
    name="gpt_oss",
    title="GPT-OSS",
    label="a GPT-OSS",
    objectives=("Causal", "Chat"),
    presets={"gpt_oss_20b": _preset(24, 32), "gpt_oss_120b": _preset(36, 128)},
    architectures=("GptOssForCausalLM", "GptOssModel"),
    keys=(
        *SIZES,
        Key("num_key_value_heads", "attention.num_kv_heads", int, None, absent=8),
        Key("head_dim", "attention.head_dim", int, None, absent=64),
        Key("intermediate_size", "feed_forward.intermediate_size", int, 2880),
        Key("num_local_experts", "feed_forward.num_experts", int, 128),
        Key("num_experts_per_tok", "feed_forward.router.top_k", int, 4),
        Key("swiglu_limit", "feed_forward.limit", float, 7.0),
        Key("router_aux_loss_coef", "feed_forward.load_balance_loss", float, 0.001),
        Key("max_position_embeddings", "max_positions", int, 131_072),
        Key("rms_norm_eps", "norm.eps", float, 1e-5),
        Key("attention_bias", "attention.qkv_bias", bool, True, argument="attention_bias"),
        Key("attention_dropout", "attention.dropout", float, 0.0, argument="attention_dropout"),
        Key("tie_word_embeddings", "tie_embeddings", bool, False),
    ),
    read=_read,
    write=_write,
    aliases={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
    harmless=CAUSAL | {"initial_context_length"},  # the scaling has it, too
    names=TensorNames(
        (
            *mappings(llama.ENDS | llama.HEAD),
            *mappings(llama.NORMS | llama.ATTENTION, "layers.", llama.LAYER),
            WeightMapping("layers.attention.sinks", llama.LAYER + "self_attn.sinks", "n -> n"),
            *mappings({"router": ("router", "e d -> d e", "e -> e")}, "layers.feed_forward.", _MLP),
            *(
                WeightMapping(f"{_EXPERTS}{name}.{part}", f"{_MLP}experts.gate_up_proj{end}", pattern, dim, merged=True)
                for part, end, pattern, dim in (
                    ("weight", "", "e d f 1 -> e d f", 3),
                    ("bias", "_bias", "e f 1 -> e f", 2),
                )
                for name in ("gate_proj", "up_proj")  # whose columns take turns in one tensor
            ),
            WeightMapping(f"{_EXPERTS}down_proj.weight", f"{_MLP}experts.down_proj", "e f d -> e f d"),
            WeightMapping(f"{_EXPERTS}down_proj.bias", f"{_MLP}experts.down_proj_bias", "e d -> e d"),
        ),
        llama.TIED,
    ),
    released=balanced_jointly,
)
