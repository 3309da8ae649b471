"""Qwen's mixtures of experts: Qwen1.5-MoE and Qwen2-57B (arXiv 2407.10671), Qwen3's and Qwen3-Coder's (2505.09388).

Llama's blocks with experts of their own width. The second generation adds an expert for all tokens, times a gate, and
biases on queries, keys and values; the third has norms of queries and keys instead.
"""

import dataclasses
from typing import Any

from llama_jax.config import Json, UserError
from llama_jax.models import DecoderConfig, LayerOverride
from llama_jax.nn import Experts, RMSNorm, SoftmaxTopK
from llama_jax.zoo import llama
from llama_jax.zoo.experts import balanced_jointly, dense_layers, feed_forwards, released, write_dense
from llama_jax.zoo.reading import CAUSAL, SIZES, ConfigReader, Key
from llama_jax.zoo.registry import Family
from llama_jax.zoo.rope import read_rope, write_rope
from llama_jax.zoo.weights import TensorNames, mappings


def qwen_moe(
    *,
    num_experts: int,
    expert_size: int,
    top_k: int,
    normalize: bool,
    shared_size: int | None = None,
    load_balance_loss: float = 1e-3,
    qk_norm: bool = False,
    qkv_bias: bool = False,
    out_bias: bool = False,
    **fields: Any,
) -> DecoderConfig:
    """Return a Qwen with experts; `shared_size` is the width of the gated expert for all, `fields` are Llama's."""
    shared = shared_size is not None
    experts = Experts(
        num_experts=num_experts,
        intermediate_size=expert_size,
        router=SoftmaxTopK(top_k, normalize),
        activation="silu",
        gated=True,
        num_shared=int(shared),
        shared_size=shared_size,
        shared_gate=shared,
        load_balance_loss=load_balance_loss,
        balance_over="layers",
    )
    config = llama.llama_like(feed_forward=experts, **fields)
    attention: Any = config.attention
    norm = RMSNorm(fields["eps"]) if qk_norm else None
    attention = dataclasses.replace(attention, qkv_bias=qkv_bias, out_bias=out_bias, qk_norm=norm)
    return dataclasses.replace(config, attention=attention)


def _sizes(layers: int, width: int, heads: int, kv_heads: int, experts: int, expert_size: int, top_k: int) -> Json:
    return {
        "num_layers": layers,
        "hidden_size": width,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "num_experts": experts,
        "expert_size": expert_size,
        "top_k": top_k,
    }


_RELEASED: Json = {"vocab_size": 151_936, "eps": 1e-6, "theta": 1_000_000.0}
_QWEN2 = _RELEASED | {"qkv_bias": True, "normalize": False}
_QWEN3 = _RELEASED | {"qk_norm": True, "normalize": True, "head_dim": 128, "max_positions": 40_960}
_CODER = _QWEN3 | {"theta": 10_000_000.0, "max_positions": 262_144}
ROWS = (
    *mappings(llama.ENDS | llama.HEAD),
    *mappings(llama.NORMS | llama.ATTENTION | llama.QK_NORMS, "layers.", llama.LAYER),
    *feed_forwards("shared_expert"),
    *mappings({"feed_forward.shared_gate": ("mlp.shared_expert_gate", "o d -> d o")}, "layers.", llama.LAYER),
)


def _read(reader: ConfigReader, fields: Json) -> DecoderConfig:
    reader.only(use_sliding_window=False)
    overrides = read_dense(reader, fields["num_layers"])
    return qwen_moe(**fields, **read_rope(reader, fields["max_positions"]), overrides=overrides)


def read_dense(reader: ConfigReader, num_layers: int) -> tuple[LayerOverride, ...]:
    """Return the overrides of the layers without experts, by `mlp_only_layers` and `decoder_sparse_step`.

    Raises UserError for numbers that no layer has, and for another activation than SiLU.
    """
    reader.activation("hidden_act", "silu", only="silu")
    dense, step = reader.take("mlp_only_layers", list, []), reader.take("decoder_sparse_step", int, 1)
    if step < 1 or not all(i in range(num_layers) for i in dense):
        raise UserError(
            f"config.json has decoder_sparse_step={step} and mlp_only_layers={dense}: the step is at least 1, and the "
            f"numbers of layers are below {num_layers}"
        )
    layers = [i for i in range(num_layers) if i in dense or (i + 1) % step]
    return dense_layers(layers, reader.take("intermediate_size", int))


def _read_qwen3(reader: ConfigReader, fields: Json) -> DecoderConfig:
    reader.only(use_qk_norm=True, shared_expert_intermediate_size=0)  # as some releases have them
    return _read(reader, fields | {"out_bias": fields["qkv_bias"], "qk_norm": True})


def write(config: DecoderConfig, label: str) -> Json:
    """Return what the families with experts take from a config.json themselves."""
    layers, size = write_dense(config)
    own = {"decoder_sparse_step": 1, "mlp_only_layers": layers, "intermediate_size": size, "use_sliding_window": False}
    return {"hidden_act": "silu", **own, **write_rope(config.attention, label)}


def keys(
    kv_heads: int,
    experts: int,
    expert_size: int,
    top_k: int,
    bias: str = "attention_bias",
    biased: bool = False,
    *,
    head_dim: int | None = None,
    normalize: bool = False,
) -> tuple[Key, ...]:
    """Return the keys of a generation with its defaults; `bias` is the name of that of queries, keys and values."""
    return (
        *SIZES,
        Key("num_key_value_heads", "attention.num_kv_heads", int, None, absent=kv_heads),
        Key("head_dim", "attention.head_dim", int, None, absent=head_dim),
        Key("num_experts", "feed_forward.num_experts", int, experts),
        Key("moe_intermediate_size", "feed_forward.intermediate_size", int, expert_size, argument="expert_size"),
        Key("num_experts_per_tok", "feed_forward.router.top_k", int, top_k),
        Key("norm_topk_prob", "feed_forward.router.normalize", bool, normalize),
        Key("router_aux_loss_coef", "feed_forward.load_balance_loss", float, 0.001),
        Key("max_position_embeddings", "max_positions", int, 32_768),
        Key("rms_norm_eps", "norm.eps", float, 1e-6),
        Key(bias, "attention.qkv_bias", bool, biased),
        Key("attention_dropout", "attention.dropout", float, 0.0, argument="attention_dropout"),
        Key("tie_word_embeddings", "tie_embeddings", bool, False),
    )


QWEN3_MOE = Family(
    name="qwen3_moe",
    title="Qwen3 with experts",
    label="a Qwen3-MoE",
    objectives=("Causal", "Chat"),
    presets={
        "qwen3_30b_a3b": qwen_moe(**_QWEN3, **_sizes(48, 2048, 32, 4, 128, 768, 8)),
        "qwen3_235b_a22b": qwen_moe(**_QWEN3, **_sizes(94, 4096, 64, 4, 128, 1536, 8)),
        "qwen3_coder_30b_a3b": qwen_moe(**_CODER, **_sizes(48, 2048, 32, 4, 128, 768, 8)),
        "qwen3_coder_480b_a35b": qwen_moe(**_CODER, **_sizes(62, 6144, 96, 8, 160, 2560, 8)),
    },
    architectures=("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
    keys=keys(4, 128, 768, 8),
    read=_read_qwen3,
    write=write,
    aliases={"num_local_experts": "num_experts"},
    harmless=CAUSAL | {"sliding_window", "max_window_layers"},  # only read with use_sliding_window
    names=TensorNames(ROWS, llama.TIED),
    released=lambda config: balanced_jointly(released(config)),
)
QWEN2_MOE = dataclasses.replace(
    QWEN3_MOE,
    name="qwen2_moe",
    title="Qwen1.5-MoE and Qwen2-57B",
    label="a Qwen2-MoE",
    presets={
        "qwen1_5_moe_a2_7b": qwen_moe(
            **_QWEN2, **_sizes(24, 2048, 16, 16, 60, 1408, 4), shared_size=5632, max_positions=8192
        ),
        "qwen2_57b_a14b": qwen_moe(
            **_QWEN2, **_sizes(28, 3584, 28, 4, 64, 2560, 8), shared_size=20_480, max_positions=131_072
        ),
    },
    architectures=("Qwen2MoeForCausalLM", "Qwen2MoeModel"),
    keys=(
        *keys(16, 60, 1408, 4, "qkv_bias", True),
        Key("shared_expert_intermediate_size", "feed_forward.shared_size", int, 5632),
    ),
    read=_read,
)
