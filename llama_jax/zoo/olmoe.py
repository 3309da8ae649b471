"""OLMoE (Muennighoff et al. 2024, arXiv 2409.02060): Llama's blocks with small experts, and norms over all heads."""

import dataclasses
from typing import Any

from llama_jax.config import Json
from llama_jax.models import DecoderConfig
from llama_jax.zoo import llama
from llama_jax.zoo.experts import balanced_jointly, feed_forwards, released
from llama_jax.zoo.qwen_moe import qwen_moe
from llama_jax.zoo.reading import CAUSAL, SIZES, ConfigReader, Key
from llama_jax.zoo.registry import Family
from llama_jax.zoo.rope import read_rope
from llama_jax.zoo.weights import TensorNames, mappings


def _olmoe(**fields: Any) -> DecoderConfig:
    config = qwen_moe(**fields, qk_norm=True)
    attention: Any = config.attention
    return dataclasses.replace(config, attention=dataclasses.replace(attention, qk_norm_over="width"))


def _read(reader: ConfigReader, fields: Json) -> DecoderConfig:
    reader.activation("hidden_act", "silu", only="silu")
    return _olmoe(**fields, out_bias=fields["qkv_bias"], **read_rope(reader, fields["max_positions"]))


OLMOE = Family(
    name="olmoe",
    title="OLMoE",
    label="an OLMoE",
    presets={
        "olmoe_1b_7b": _olmoe(
            vocab_size=50_304,
            hidden_size=2048,
            num_layers=16,
            num_heads=16,
            num_experts=64,
            expert_size=1024,
            top_k=8,
            normalize=False,
            load_balance_loss=0.01,
            max_positions=4096,
            eps=1e-5,
            theta=10_000.0,
        )
    },
    architectures=("OlmoeForCausalLM", "OlmoeModel"),
    keys=(
        *SIZES,
        Key("num_key_value_heads", "attention.num_kv_heads", int, None),
        Key("intermediate_size", "feed_forward.intermediate_size", int, argument="expert_size"),
        Key("num_experts", "feed_forward.num_experts", int, 64),
        Key("num_experts_per_tok", "feed_forward.router.top_k", int, 8),
        Key("norm_topk_prob", "feed_forward.router.normalize", bool, False),
        Key("router_aux_loss_coef", "feed_forward.load_balance_loss", float, 0.01),
        Key("max_position_embeddings", "max_positions", int, 4096),
        Key("rms_norm_eps", "norm.eps", float, 1e-5),
        Key("attention_bias", "attention.qkv_bias", bool, False),
        Key("attention_dropout", "attention.dropout", float, 0.0, argument="attention_dropout"),
        Key("tie_word_embeddings", "tie_embeddings", bool, False),
    ),
    read=_read,
    write=llama.write,
    aliases={"num_local_experts": "num_experts"},
    harmless=CAUSAL,
    names=TensorNames(
        (
            *mappings(llama.ENDS | llama.HEAD),
            *mappings(llama.NORMS | llama.ATTENTION | llama.QK_NORMS, "layers.", llama.LAYER),
            *feed_forwards(),
        ),
        llama.TIED,
    ),
    released=lambda config: balanced_jointly(released(config)),
)
