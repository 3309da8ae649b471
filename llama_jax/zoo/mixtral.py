"""Mixtral (arXiv 2401.04088): Llama's blocks with eight SwiGLU experts, two of them for each token."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llama_jax.config import UserError
from llama_jax.models import DecoderConfig
from llama_jax.nn import Experts, GroupedQuery, RMSNorm, Rope, RopeScaling, SoftmaxTopK
from llama_jax.zoo import Weight, llama
from llama_jax.zoo.reading import CAUSAL, ConfigReader, checked, expect, read_activation, read_rope, write_rope


def _mixtral(
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    max_positions: int,
    eps: float,
    theta: float,
    load_balance_loss: float,
    head_dim: int | None = None,
    scaling: RopeScaling | None = None,
    window: int | None = None,
    tie_embeddings: bool = False,
    attention_dropout: float = 0.0,
) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        max_positions=max_positions,
        attention=GroupedQuery(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim or hidden_size // max(num_heads, 1),
            rope=Rope(theta=theta, scaling=scaling),
            qkv_bias=False,
            out_bias=False,
            window=window,
            dropout=attention_dropout,
        ),
        feed_forward=Experts(
            num_experts=num_experts,
            intermediate_size=intermediate_size,
            router=SoftmaxTopK(top_k, normalize=True),
            activation="silu",
            gated=True,
            load_balance_loss=load_balance_loss,
        ),
        norm=RMSNorm(eps=eps),
        tie_embeddings=tie_embeddings,
    )


PRESETS: dict[str, DecoderConfig] = {
    "mixtral_8x7b": _mixtral(
        vocab_size=32_000,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        intermediate_size=14_336,
        num_experts=8,
        top_k=2,
        max_positions=32_768,
        eps=1e-5,
        theta=1_000_000.0,
        load_balance_loss=0.02,
    ),
}

_EXPERTS = "model.layers.{layer}.block_sparse_moe."
WEIGHTS = (
    *(w for w in llama.WEIGHTS if "feed_forward" not in w.name and not w.name.endswith(".bias")),
    Weight("layers.feed_forward.router.weight", _EXPERTS + "gate.weight", "e d -> d e"),
    Weight("layers.feed_forward.experts.gate_proj.weight", _EXPERTS + "experts.{expert}.w1.weight", "e f d -> e d f"),
    Weight("layers.feed_forward.experts.up_proj.weight", _EXPERTS + "experts.{expert}.w3.weight", "e f d -> e d f"),
    Weight("layers.feed_forward.experts.down_proj.weight", _EXPERTS + "experts.{expert}.w2.weight", "e d f -> e f d"),
)
TIED = llama.TIED
# What newer code calls the same.
RENAMES = (
    (r"\.mlp\.gate\.weight$", ".block_sparse_moe.gate.weight"),
    (r"\.mlp\.experts\.(\d+)\.gate_proj\.", r".block_sparse_moe.experts.\1.w1."),
    (r"\.mlp\.experts\.(\d+)\.up_proj\.", r".block_sparse_moe.experts.\1.w3."),
    (r"\.mlp\.experts\.(\d+)\.down_proj\.", r".block_sparse_moe.experts.\1.w2."),
)

# In Mistral's own files, with the rotary pairs interleaved as in Meta's.
_META_EXPERTS = "layers.{layer}.feed_forward."
META_WEIGHTS = (
    *(w for w in llama.META_WEIGHTS if "feed_forward" not in w.name),
    *(
        dataclasses.replace(w, source=w.source.replace(_EXPERTS, _META_EXPERTS))
        for w in WEIGHTS
        if "feed_forward" in w.name
    ),
)
META_TIED = llama.META_TIED

_A_MIXTRAL = "a Hugging Face Mixtral"
ARCHITECTURES = ("MixtralForCausalLM", "MixtralModel")


def from_hf(data: Mapping[str, Any]) -> DecoderConfig:
    """The model that a `config.json` of model_type `mixtral` describes.

    Raises UserError for a key that is missing, not known, or asks for something the model cannot do.
    """
    aliases = {"num_experts": "num_local_experts"}
    reader = ConfigReader(data, "a Mixtral", ARCHITECTURES, aliases=aliases, harmless=CAUSAL | {"router_jitter_noise"})
    take = reader.take
    read_activation(reader, "hidden_act", "silu", only="silu")
    reader.only(moe_frequency=1)
    max_positions, num_heads = take("max_position_embeddings", int, 131_072), take("num_attention_heads", int)
    theta, scaling = read_rope(reader, max_positions, 1_000_000.0)
    config = _mixtral(
        vocab_size=take("vocab_size", int),
        hidden_size=take("hidden_size", int),
        num_layers=take("num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=take("num_key_value_heads", int, num_heads, absent=8),
        head_dim=take("head_dim", int, None),
        intermediate_size=take("intermediate_size", int),
        num_experts=take("num_local_experts", int, 8),
        top_k=take("num_experts_per_tok", int, 2),
        max_positions=max_positions,
        eps=take("rms_norm_eps", float, 1e-5),
        theta=theta,
        scaling=scaling,
        window=take("sliding_window", int, None),
        # Per layer; Hugging Face's has its minimum at top_k instead of 1.
        load_balance_loss=take("router_aux_loss_coef", float, 0.001),
        tie_embeddings=take("tie_word_embeddings", bool, False),
        attention_dropout=take("attention_dropout", float, 0.0),
    )
    reader.finish()
    return config


def from_meta(params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> DecoderConfig:
    """The model of Mistral's own `params.json`; what it leaves out is read off the shapes of the tensors.

    Raises UserError for a key that is not known.
    """
    choice, first = params.get("moe"), "layers.0.feed_forward.experts.0.w1.weight"
    if not isinstance(choice, dict) or {"num_experts", "num_experts_per_tok"} != choice.keys():
        raise UserError(f"params.json has moe={choice!r}, which must be num_experts and num_experts_per_tok")
    if first not in shapes:
        raise UserError(f"the weights lack '{first}'")
    dense = llama.from_meta(
        {key: value for key, value in params.items() if key != "moe"},
        {**shapes, "layers.0.feed_forward.w1.weight": shapes[first]},
    )
    experts = Experts(
        num_experts=choice["num_experts"],
        intermediate_size=shapes[first][0],
        router=SoftmaxTopK(choice["num_experts_per_tok"], normalize=True),
        activation="silu",
        gated=True,
        load_balance_loss=0.02,
    )
    return dataclasses.replace(dense, feed_forward=experts)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a model, for Hugging Face's `MixtralForCausalLM`.

    Raises UserError for a model that is no Mixtral, naming what it has that a Mixtral cannot have.
    """
    attention, experts = (
        expect(config.attention, GroupedQuery, _A_MIXTRAL),
        expect(config.feed_forward, Experts, _A_MIXTRAL),
    )
    router, norm = expect(experts.router, SoftmaxTopK, _A_MIXTRAL), expect(config.norm, RMSNorm, _A_MIXTRAL)
    if attention.rope is None:
        raise UserError(f"rope=None has no place in {_A_MIXTRAL}")
    data = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": experts.intermediate_size,
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": router.top_k,
        "router_aux_loss_coef": experts.load_balance_loss,
        "hidden_act": "silu",
        "attention_dropout": attention.dropout,
        "max_position_embeddings": config.max_positions,
        "sliding_window": attention.window,
        "rms_norm_eps": norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": attention.rope.theta,
        "rope_scaling": write_rope(attention.rope.scaling, _A_MIXTRAL),
    }
    return checked(data, config, from_hf, _A_MIXTRAL)
