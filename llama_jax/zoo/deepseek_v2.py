"""DeepSeek-V2 and V2-Lite (arXiv 2405.04434), and what V3 and V3.2 have in common with them.

Sizes and YaRN's numbers from the released configs; the counts they give are tested to the digit.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from llama_jax.config import UserError
from llama_jax.models import DecoderConfig, LayerOverride
from llama_jax.nn import Experts, LatentAttention, RMSNorm, Rope, RopeScaling, Router, SoftmaxTopK, SwiGLU, YarnScaling
from llama_jax.zoo import Weight
from llama_jax.zoo.reading import (
    CAUSAL,
    ConfigReader,
    checked,
    expect,
    read_activation,
    read_quantization,
    read_rope,
    write_rope,
)

Q_LORA_RANK = 1536
LATENT_EPS = 1e-6  # of the norms of the latents, in all of the original code, whatever rms_norm_eps is


def fields(
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    max_positions: int,
    num_heads: int,
    q_lora_rank: int | None,
    kv_lora_rank: int,
    qk_nope_head_dim: int,
    qk_rope_head_dim: int,
    v_head_dim: int,
    theta: float,
    scaling: RopeScaling | None,
    eps: float,
    num_dense: int,
    dense_size: int,
    num_experts: int,
    num_shared: int,
    expert_size: int,
    router: Router,
    load_balance_loss: float,
    tie_embeddings: bool = False,
) -> dict[str, Any]:
    """The fields of a `DecoderConfig`: experts everywhere but in the first `num_dense` layers."""
    dense = LayerOverride(tuple(range(min(num_dense, num_layers))), SwiGLU(intermediate_size=dense_size, bias=False))
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "max_positions": max_positions,
        "attention": LatentAttention(
            num_heads=num_heads,
            q_lora_rank=q_lora_rank,
            kv_lora_rank=kv_lora_rank,
            qk_nope_head_dim=qk_nope_head_dim,
            qk_rope_head_dim=qk_rope_head_dim,
            v_head_dim=v_head_dim,
            rope=Rope(theta=theta, scaling=scaling),
            eps=LATENT_EPS,
        ),
        "feed_forward": Experts(
            num_experts=num_experts,
            intermediate_size=expert_size,
            router=router,
            activation="silu",
            gated=True,
            num_shared=num_shared,
            load_balance_loss=load_balance_loss,
        ),
        "norm": RMSNorm(eps=eps),
        "tie_embeddings": tie_embeddings,
        "overrides": (dense,) if dense.layers else (),
    }


RELEASED: dict[str, Any] = {
    "max_positions": 163_840,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "theta": 10_000.0,
    "eps": 1e-6,
}
_V2: dict[str, Any] = RELEASED | {
    "vocab_size": 102_400,
    "scaling": YarnScaling(40.0, 4096, beta_fast=32.0, beta_slow=1.0, mscale=0.707, mscale_all_dim=0.707),
    "num_dense": 1,
    "num_shared": 2,
    "load_balance_loss": 1e-3,
}
PRESETS: dict[str, DecoderConfig] = {
    "deepseek_v2_lite": DecoderConfig(
        **fields(
            **_V2,
            num_layers=27,
            hidden_size=2048,
            num_heads=16,
            q_lora_rank=None,
            dense_size=10944,
            num_experts=64,
            expert_size=1408,
            router=SoftmaxTopK(top_k=6, normalize=False),
        )
    ),
    "deepseek_v2": DecoderConfig(
        **fields(
            **_V2,
            num_layers=60,
            hidden_size=5120,
            num_heads=128,
            q_lora_rank=1536,
            dense_size=12288,
            num_experts=160,
            expert_size=1536,
            router=SoftmaxTopK(top_k=6, normalize=False, scaling=16.0, num_groups=8, top_groups=3),
        )
    ),
}

_LAYER = "model.layers.{layer}."
_ATTENTION, _MLP = _LAYER + "self_attn.", _LAYER + "mlp."
# Each head of a file has its rotary part last, in interleaved pairs.
WEIGHTS = (
    Weight("embedding.weight", "model.embed_tokens.weight", "v d -> v d"),
    Weight("layers.input_layernorm.weight", _LAYER + "input_layernorm.weight", "d -> d"),
    Weight("layers.attention.q_nope_proj.weight", _ATTENTION + "q_proj.weight", "n h d -> d n h", 1, True),
    Weight("layers.attention.q_rope_proj.weight", _ATTENTION + "q_proj.weight", "n (p two) d -> d n (two p)", 1, True),
    Weight("layers.attention.q_a_proj.weight", _ATTENTION + "q_a_proj.weight", "c d -> d c"),
    Weight("layers.attention.q_a_layernorm.weight", _ATTENTION + "q_a_layernorm.weight", "c -> c"),
    Weight("layers.attention.q_b_nope_proj.weight", _ATTENTION + "q_b_proj.weight", "n h c -> c n h", 1, True),
    Weight(
        "layers.attention.q_b_rope_proj.weight", _ATTENTION + "q_b_proj.weight", "n (p two) c -> c n (two p)", 1, True
    ),
    Weight("layers.attention.kv_a_proj.weight", _ATTENTION + "kv_a_proj_with_mqa.weight", "c d -> d c"),
    Weight("layers.attention.k_rope_proj.weight", _ATTENTION + "kv_a_proj_with_mqa.weight", "(p two) d -> d (two p)"),
    Weight("layers.attention.kv_a_layernorm.weight", _ATTENTION + "kv_a_layernorm.weight", "c -> c"),
    Weight("layers.attention.k_b_proj.weight", _ATTENTION + "kv_b_proj.weight", "n h c -> c n h", 1, True),
    Weight("layers.attention.v_b_proj.weight", _ATTENTION + "kv_b_proj.weight", "n h c -> c n h", 1, True),
    Weight("layers.attention.o_proj.weight", _ATTENTION + "o_proj.weight", "d (n h) -> n h d"),
    Weight("layers.post_attention_layernorm.weight", _LAYER + "post_attention_layernorm.weight", "d -> d"),
    Weight("layers.feed_forward.gate_proj.weight", _MLP + "gate_proj.weight", "f d -> d f"),
    Weight("layers.feed_forward.up_proj.weight", _MLP + "up_proj.weight", "f d -> d f"),
    Weight("layers.feed_forward.down_proj.weight", _MLP + "down_proj.weight", "d f -> f d"),
    Weight("layers.feed_forward.router.weight", _MLP + "gate.weight", "e d -> d e"),
    Weight(
        "layers.feed_forward.experts.gate_proj.weight", _MLP + "experts.{expert}.gate_proj.weight", "e f d -> e d f"
    ),
    Weight("layers.feed_forward.experts.up_proj.weight", _MLP + "experts.{expert}.up_proj.weight", "e f d -> e d f"),
    Weight(
        "layers.feed_forward.experts.down_proj.weight", _MLP + "experts.{expert}.down_proj.weight", "e d f -> e f d"
    ),
    Weight("layers.feed_forward.shared.gate_proj.weight", _MLP + "shared_experts.gate_proj.weight", "f d -> d f"),
    Weight("layers.feed_forward.shared.up_proj.weight", _MLP + "shared_experts.up_proj.weight", "f d -> d f"),
    Weight("layers.feed_forward.shared.down_proj.weight", _MLP + "shared_experts.down_proj.weight", "d f -> f d"),
    Weight("norm.weight", "model.norm.weight", "d -> d"),
    Weight("lm_head.weight", "lm_head.weight", "v d -> d v"),
)
TIED = {"lm_head.weight": "model.embed_tokens.weight"}

ARCHITECTURES = ("DeepseekV2ForCausalLM", "DeepseekV2Model")
_ALIASES = {
    "num_experts": "n_routed_experts",
    "num_local_experts": "n_routed_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
}


def reader_of(data: Mapping[str, Any], family: str, architectures: Collection[str]) -> ConfigReader:
    """A reader that has refused what no DeepSeek can do."""
    # Latent attention has no dropout here.
    harmless = CAUSAL | {"attention_dropout", "seq_aux"}
    reader = ConfigReader(data, family, architectures, aliases=_ALIASES, harmless=harmless)
    read_activation(reader, "hidden_act", "silu", only="silu")
    reader.only(attention_bias=False, mlp_bias=False, moe_layer_freq=1)
    read_quantization(reader)
    return reader


def read(reader: ConfigReader, router: Router, *, num_dense: int = 0, q_lora_rank: int | None = None) -> dict[str, Any]:
    """What `fields` takes, of the keys that all DeepSeeks have.

    `num_dense` and `q_lora_rank` are for files that say nothing of them.
    """
    take = reader.take
    num_heads, nope, rope = (take(key, int) for key in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"))
    # Said by other keys already.
    reader.only(num_key_value_heads=num_heads, head_dim=rope, qk_head_dim=nope + rope)
    max_positions = take("max_position_embeddings", int)
    theta, scaling = read_rope(reader, max_positions)
    return fields(
        vocab_size=take("vocab_size", int),
        hidden_size=take("hidden_size", int),
        num_layers=take("num_hidden_layers", int),
        max_positions=max_positions,
        num_heads=num_heads,
        q_lora_rank=take("q_lora_rank", int, None, absent=q_lora_rank),
        kv_lora_rank=take("kv_lora_rank", int),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=take("v_head_dim", int),
        theta=theta,
        scaling=scaling,
        eps=take("rms_norm_eps", float, 1e-6),
        num_dense=take("first_k_dense_replace", int, num_dense),
        dense_size=take("intermediate_size", int),
        num_experts=take("n_routed_experts", int),
        num_shared=take("n_shared_experts", int),
        expert_size=take("moe_intermediate_size", int),
        router=router,
        load_balance_loss=take("aux_loss_alpha", float, 1e-3),
        tie_embeddings=take("tie_word_embeddings", bool, False),
    )


def from_hf(data: Mapping[str, Any]) -> DecoderConfig:
    """The model that a `config.json` of model_type `deepseek_v2` describes.

    Raises UserError for a key that is missing, not known, or asks for something the model cannot do.
    """
    reader = reader_of(data, "a DeepSeek-V2", ARCHITECTURES)
    reader.only(scoring_func="softmax", norm_topk_prob=False)
    method = reader.take("topk_method", str, "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise UserError(f"config.json has topk_method={method!r}: a DeepSeek-V2 has greedy or group_limited_greedy")
    groups, top_groups = reader.take("n_group", int, 1), reader.take("topk_group", int, 1)
    if method == "greedy":
        groups, top_groups = 1, 1  # whatever they say
    router = SoftmaxTopK(
        top_k=reader.take("num_experts_per_tok", int),
        normalize=False,
        scaling=reader.take("routed_scaling_factor", float, 1.0),
        num_groups=groups,
        top_groups=top_groups,
    )
    config = DecoderConfig(**read(reader, router))
    reader.finish()
    return config


def with_tensors(config: Any, names: Collection[str]) -> Any:
    """The config with a latent of the queries where a file has one, and without where it has none.

    Files that leave out `q_lora_rank` are of both kinds; the original code's default is 1536.
    """
    attention, own = config.attention, "model.layers.0.self_attn.{}.weight"
    if attention.q_lora_rank is None and own.format("q_a_proj") in names:
        attention = dataclasses.replace(attention, q_lora_rank=Q_LORA_RANK)
    elif attention.q_lora_rank is not None and own.format("q_proj") in names:
        attention = dataclasses.replace(attention, q_lora_rank=None)
    return dataclasses.replace(config, attention=attention)


def write(config: DecoderConfig, family: str, attention_type: type, router_type: type) -> dict[str, Any]:
    """The keys of a `config.json` that all DeepSeeks have."""
    attention = expect(config.attention, attention_type, family)
    experts, norm = expect(config.feed_forward, Experts, family), expect(config.norm, RMSNorm, family)
    router = expect(experts.router, router_type, family)
    if attention.rope is None:
        raise UserError(f"rope=None has no place in {family}")
    dense = [piece for _, piece in config.stacks()["layers"] if isinstance(piece, SwiGLU)]
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "max_position_embeddings": config.max_positions,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "rope_theta": attention.rope.theta,
        "rope_scaling": write_rope(attention.rope.scaling, family),
        "rms_norm_eps": norm.eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "first_k_dense_replace": len(dense),
        "moe_layer_freq": 1,
        "intermediate_size": dense[0].intermediate_size if dense else 4 * config.hidden_size,
        "n_routed_experts": experts.num_experts,
        "n_shared_experts": experts.num_shared,
        "moe_intermediate_size": experts.intermediate_size,
        "num_experts_per_tok": router.top_k,
        "n_group": router.num_groups,
        "topk_group": router.top_groups,
        "routed_scaling_factor": router.scaling,
        "norm_topk_prob": router.normalize,
        "aux_loss_alpha": experts.load_balance_loss,
        "seq_aux": True,
        "tie_word_embeddings": config.tie_embeddings,
    }


def as_released(config: Any, **router: Any) -> Any:
    """The model without what only its training knows, which no config.json can say."""
    experts = config.feed_forward
    router = dataclasses.replace(experts.router, **router)
    plain = dataclasses.replace(experts, router=router, router_z_loss=0.0, dispatch="auto")
    return dataclasses.replace(config, feed_forward=plain)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a model, for Hugging Face's `DeepseekV2ForCausalLM`.

    Raises UserError for a model that is no DeepSeek-V2, naming what it has that such a one cannot have.
    """
    family = "a Hugging Face DeepSeek-V2"
    data = write(config, family, LatentAttention, SoftmaxTopK)
    data |= {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "scoring_func": "softmax",
        "topk_method": "greedy" if data["n_group"] == 1 else "group_limited_greedy",
    }
    return checked(data, as_released(config), from_hf, family)
