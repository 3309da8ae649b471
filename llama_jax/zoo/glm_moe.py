"""GLM-4.5, its smaller Air, and what followed in their form (GLM-4.5 Team 2025, arXiv 2508.06471, table 1).

Few key/value heads, rotary positions on the first half of every head, in halves; queries and keys of the large one have
norms. Experts are balanced by a bias, and a block predicts one token more, as in DeepSeek-V3.
"""

from typing import Any

from llama_jax.config import Json
from llama_jax.models import MTPDecoderConfig
from llama_jax.nn import Experts, GroupedQuery, RMSNorm, Rope, RopeScaling, SigmoidTopK
from llama_jax.zoo import llama
from llama_jax.zoo.experts import (
    BIAS_UPDATE_RATE,
    CHOICE_BIAS,
    dense_layers,
    feed_forwards,
    released,
    with_mtp,
    with_mtp_tensors,
    write_dense,
)
from llama_jax.zoo.reading import CAUSAL, SIZES, ConfigReader, Key
from llama_jax.zoo.registry import Family
from llama_jax.zoo.rope import read_rope, write_rope
from llama_jax.zoo.weights import mappings

_BALANCE = 1e-4  # section 2.4, no key of config.json


def glm_moe(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    theta: float,
    eps: float,
    num_experts: int,
    expert_size: int,
    router: SigmoidTopK,
    scaling: RopeScaling | None = None,
    qkv_bias: bool = True,
    qk_norm: bool = False,
    attention_dropout: float = 0.0,
    num_shared: int = 1,
    **fields: Any,
) -> MTPDecoderConfig:
    """Return a GLM-4.5; `fields` are the others of `MTPDecoderConfig`."""
    norm = RMSNorm(eps)
    attention = GroupedQuery(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=Rope(theta=theta, scaling=scaling, rotary_dim=head_dim // 2),
        qkv_bias=qkv_bias,
        out_bias=False,
        qk_norm=norm if qk_norm else None,
        dropout=attention_dropout,
    )
    experts = Experts(
        num_experts=num_experts,
        intermediate_size=expert_size,
        router=router,
        activation="silu",
        gated=True,
        num_shared=num_shared,
        load_balance_loss=_BALANCE,
    )
    return MTPDecoderConfig(attention=attention, feed_forward=experts, norm=norm, **fields)


def _preset(
    layers: int, width: int, dense: int, dense_size: int, experts: int, expert_size: int, scaling: float, **own: Any
) -> MTPDecoderConfig:
    return glm_moe(
        vocab_size=151_552,
        hidden_size=width,
        num_layers=layers,
        num_heads=96,
        num_kv_heads=8,
        head_dim=128,
        theta=1_000_000.0,
        eps=1e-5,
        num_experts=experts,
        expert_size=expert_size,
        router=SigmoidTopK(8, True, scaling, 1, 1, BIAS_UPDATE_RATE),
        max_positions=131_072,
        tie_embeddings=False,
        overrides=dense_layers(range(dense), dense_size),
        **own,
    )


def _read(reader: ConfigReader, fields: Json) -> MTPDecoderConfig:
    reader.activation("hidden_act", "silu", only="silu")
    if fields["head_dim"] is None:
        fields["head_dim"] = fields["hidden_size"] // max(fields["num_heads"], 1)
    names = ("top_k", "normalize", "scaling", "num_groups", "top_groups")
    router = SigmoidTopK(**{name: fields.pop(name) for name in names}, bias_update_rate=BIAS_UPDATE_RATE)
    num_dense = min(reader.take("first_k_dense_replace", int, 1), fields["num_layers"])
    return glm_moe(
        router=router,
        qk_norm=reader.take("use_qk_norm", bool, False),
        overrides=dense_layers(range(num_dense), reader.take("intermediate_size", int)),
        **fields,
        **read_rope(reader, fields["max_positions"], partial=0.5),
    )


def _write(config: MTPDecoderConfig, label: str) -> Json:
    attention: Any = config.attention
    layers, size = write_dense(config)
    return {
        "hidden_act": "silu",
        "first_k_dense_replace": len(layers),
        "intermediate_size": size,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": attention.qk_norm is not None,
        **write_rope(attention, label),
    }


GLM4_MOE = Family(
    name="glm4_moe",
    title="GLM-4.5 and GLM-4.5-Air",
    label="a GLM-4.5",
    objectives=("Causal", "Chat"),
    presets={
        "glm4_5": _preset(92, 5120, 3, 12_288, 160, 1536, 2.5, qk_norm=True),
        "glm4_5_air": _preset(46, 4096, 1, 10_944, 128, 1408, 1.0),
    },
    architectures=("Glm4MoeForCausalLM", "Glm4MoeModel"),
    keys=(
        *SIZES,
        Key("num_key_value_heads", "attention.num_kv_heads", int, 8),
        Key("head_dim", "attention.head_dim", int, None),
        Key("n_routed_experts", "feed_forward.num_experts", int, 128),
        Key("n_shared_experts", "feed_forward.num_shared", int, 1),
        Key("moe_intermediate_size", "feed_forward.intermediate_size", int, 1408, argument="expert_size"),
        Key("num_experts_per_tok", "feed_forward.router.top_k", int, 8),
        Key("norm_topk_prob", "feed_forward.router.normalize", bool, True),
        Key("routed_scaling_factor", "feed_forward.router.scaling", float, 1.0),
        Key("n_group", "feed_forward.router.num_groups", int, 1),
        Key("topk_group", "feed_forward.router.top_groups", int, 1),
        Key("max_position_embeddings", "max_positions", int, 131_072),
        Key("rms_norm_eps", "norm.eps", float, 1e-5),
        Key("attention_bias", "attention.qkv_bias", bool, False),
        Key("attention_dropout", "attention.dropout", float, 0.0, argument="attention_dropout"),
        Key("num_nextn_predict_layers", "num_mtp_layers", int, 1),
        Key("tie_word_embeddings", "tie_embeddings", bool, False),
    ),
    read=_read,
    write=_write,
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    harmless=CAUSAL,
    names=with_mtp(
        (
            *mappings(llama.ENDS | llama.HEAD),
            *mappings(llama.NORMS | llama.ATTENTION | llama.QK_NORMS, "layers.", llama.LAYER),
            *feed_forwards(),
            CHOICE_BIAS,
        )
    ),
    with_tensors=with_mtp_tensors,
    released=lambda config: released(config, load_balance_loss=_BALANCE, balance_over="row"),
)
