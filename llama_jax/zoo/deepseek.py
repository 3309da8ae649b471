"""DeepSeek-V2 and V2-Lite (arXiv 2405.04434), V3 (arXiv 2412.19437), R1, V3.1 and V3.2 ("DeepSeek-V3.2-Exp", 2025).

V3 is V2 with experts balanced by a bias, eight-bit files and multi-token prediction; V3.2 attends to the tokens that an
indexer chooses. Moonlight (arXiv 2502.16982) and Kimi K2 (2507.20534) have V3's form. Sizes are the released configs'.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from llama_jax.config import Json, UserError
from llama_jax.models import DecoderConfig, MTPDecoderConfig
from llama_jax.nn import (
    Experts,
    LatentAttention,
    RMSNorm,
    Rope,
    Router,
    SigmoidTopK,
    SoftmaxTopK,
    SparseLatentAttention,
    YarnScaling,
)
from llama_jax.zoo import llama
from llama_jax.zoo.experts import (
    BIAS_UPDATE_RATE,
    CHOICE_BIAS,
    MTP_WEIGHT,
    dense_layers,
    feed_forwards,
    released,
    with_mtp,
    with_mtp_tensors,
    write_dense,
)
from llama_jax.zoo.reading import CAUSAL, SIZES, ConfigReader, Key, read_quantization
from llama_jax.zoo.registry import Family
from llama_jax.zoo.rope import read_rope, write_rope
from llama_jax.zoo.weights import TensorNames, mappings

_Q_LORA_RANK = 1536
_LATENT_EPS = 1e-6  # of the norms of the latents, in all of the original code, whatever rms_norm_eps is

_LATENT = ("num_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope")
_EXPERTS = ("num_experts", "num_shared", "router", "load_balance_loss", "balance_over")
_ROUTER = ("top_k", "num_groups", "top_groups", "scaling")


def _fields(*, num_layers: int, eps: float, num_dense: int, dense_size: int, expert_size: int, **sizes: Any) -> Json:
    """Return the fields of a `DecoderConfig`: experts everywhere but in the first `num_dense` layers.

    `sizes` are the others of the config, those of its attention (`_LATENT`) and of its experts (`_EXPERTS`).
    """
    sizes = {"balance_over": "row", "tie_embeddings": False} | sizes
    latent = {name: sizes.pop(name) for name in _LATENT}
    experts = {name: sizes.pop(name) for name in _EXPERTS}
    return sizes | {
        "num_layers": num_layers,
        "attention": LatentAttention(**latent, eps=_LATENT_EPS),
        "feed_forward": Experts(**experts, intermediate_size=expert_size, activation="silu", gated=True),
        "norm": RMSNorm(eps=eps),
        "overrides": dense_layers(range(min(num_dense, num_layers)), dense_size),
    }


def _sparse(attention: Any, num_heads: int, head_dim: int, topk: int) -> SparseLatentAttention:
    """Return a `LatentAttention` with V3.2's indexer."""
    latent: Json = vars(attention)
    return SparseLatentAttention(**latent, num_index_heads=num_heads, index_head_dim=head_dim, index_topk=topk)


def _rope(mscale: float, theta: float = 10_000.0, factor: float = 40.0, beta_fast: float = 32.0) -> Rope:
    scaling = YarnScaling(factor, 4096, beta_fast=beta_fast, beta_slow=1.0, mscale=mscale, mscale_all_dim=mscale)
    return Rope(theta=theta, scaling=scaling)


_RELEASED: Json = {
    "max_positions": 163_840,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "eps": 1e-6,
}


def _v2(**sizes: Any) -> DecoderConfig:
    return DecoderConfig(
        **_fields(
            **_RELEASED,
            **sizes,
            vocab_size=102_400,
            rope=_rope(mscale=0.707),
            num_dense=1,
            num_shared=2,
            load_balance_loss=1e-3,
        )
    )


_V2_PRESETS = {
    "deepseek_v2_lite": _v2(
        num_layers=27,
        hidden_size=2048,
        num_heads=16,
        q_lora_rank=None,
        dense_size=10944,
        num_experts=64,
        expert_size=1408,
        router=SoftmaxTopK(top_k=6, normalize=False),
    ),
    "deepseek_v2": _v2(
        num_layers=60,
        hidden_size=5120,
        num_heads=128,
        q_lora_rank=1536,
        dense_size=12288,
        num_experts=160,
        expert_size=1536,
        router=SoftmaxTopK(top_k=6, normalize=False, scaling=16.0, num_groups=8, top_groups=3),
    ),
}


def _router(top_k: int, scaling: float, groups: int = 1, top_groups: int = 1) -> SigmoidTopK:
    return SigmoidTopK(top_k, True, scaling, groups, top_groups, bias_update_rate=BIAS_UPDATE_RATE)


_V3_SIZES: Json = _RELEASED | {
    "num_layers": 61,
    "hidden_size": 7168,
    "q_lora_rank": 1536,
    "dense_size": 18432,
    "num_shared": 1,
    "expert_size": 2048,
}
_V3_PRESET = MTPDecoderConfig(
    **_fields(
        **_V3_SIZES,
        vocab_size=129_280,
        num_heads=128,
        rope=_rope(mscale=1.0),
        num_dense=3,
        num_experts=256,
        router=_router(8, 2.5, groups=8, top_groups=4),
        load_balance_loss=1e-4,
    )
)


def _moonshot(**sizes: Any) -> MTPDecoderConfig:
    return MTPDecoderConfig(**_fields(**sizes, vocab_size=163_840, num_dense=1, load_balance_loss=1e-3))


_MOONLIGHT = _moonshot(
    **_RELEASED | {"max_positions": 8192, "eps": 1e-5},
    num_layers=27,
    hidden_size=2048,
    num_heads=16,
    q_lora_rank=None,
    rope=Rope(theta=50_000.0, scaling=None),
    dense_size=11_264,
    num_experts=64,
    num_shared=2,
    expert_size=1408,
    router=_router(6, 2.446),
)
_KIMI_K2 = _moonshot(
    **_V3_SIZES | {"max_positions": 131_072},
    num_heads=64,
    rope=_rope(mscale=1.0, theta=50_000.0, factor=32.0, beta_fast=1.0),
    num_experts=384,
    router=_router(8, 2.827),
)
_V32_INDEXER = _sparse(_V3_PRESET.attention, num_heads=64, head_dim=128, topk=2048)

_ATTENTION = llama.LAYER + "self_attn."
# Each head of a file has its rotary part last, in interleaved pairs, so heads are joined one by one (`merged`).
_WHOLE, _PAIRS = "n h c -> c n h", "n (p two) c -> c n (two p)"
_V2_WEIGHTS = (
    *mappings(llama.ENDS | llama.HEAD),
    *mappings(llama.NORMS, "layers.", llama.LAYER),
    *mappings(
        {
            "q_nope_proj": ("q_proj", _WHOLE),
            "q_rope_proj": ("q_proj", _PAIRS),
            "q_b_nope_proj": ("q_b_proj", _WHOLE),
            "q_b_rope_proj": ("q_b_proj", _PAIRS),
            "k_b_proj": ("kv_b_proj", _WHOLE),
            "v_b_proj": ("kv_b_proj", _WHOLE),
        },
        "layers.attention.",
        _ATTENTION,
        joined=1,
        merged=True,
    ),
    *mappings(
        {
            "q_a_proj": ("q_a_proj", "c d -> d c"),
            "q_a_layernorm": ("q_a_layernorm", "c -> c"),
            "kv_a_proj": ("kv_a_proj_with_mqa", "c d -> d c"),
            "k_rope_proj": ("kv_a_proj_with_mqa", "(p two) d -> d (two p)"),
            "kv_a_layernorm": ("kv_a_layernorm", "c -> c"),
            "o_proj": ("o_proj", "d (n h) -> n h d"),
        },
        "layers.attention.",
        _ATTENTION,
    ),
    *feed_forwards(),
)
_V3_WEIGHTS = (*_V2_WEIGHTS, CHOICE_BIAS)
_INDEXER = mappings(
    {
        # Its rotary part comes first, in halves as ours.
        "q_proj": ("wq_b", "(n h) c -> c n h"),
        "k_proj": ("wk", "h d -> d h"),
        "k_norm": ("k_norm", "h -> h", "h -> h"),
        "weights_proj": ("weights_proj", "n d -> d n"),
    },
    "layers.attention.indexer.",
    _ATTENTION + "indexer.",
)


def _keys(*, q_lora_rank: int | None, scaling: float, groups: int, top_groups: int) -> tuple[Key, ...]:
    """Return the keys that all have, with the defaults of a version."""
    return (
        *SIZES,
        Key("max_position_embeddings", "max_positions", int),
        Key("q_lora_rank", "attention.q_lora_rank", int, None, absent=q_lora_rank),
        Key("kv_lora_rank", "attention.kv_lora_rank", int),
        Key("qk_nope_head_dim", "attention.qk_nope_head_dim", int),
        Key("qk_rope_head_dim", "attention.qk_rope_head_dim", int),
        Key("v_head_dim", "attention.v_head_dim", int),
        Key("rms_norm_eps", "norm.eps", float, 1e-6),
        Key("n_routed_experts", "feed_forward.num_experts", int),
        Key("n_shared_experts", "feed_forward.num_shared", int),
        Key("moe_intermediate_size", "feed_forward.intermediate_size", int, argument="expert_size"),
        Key("num_experts_per_tok", "feed_forward.router.top_k", int),
        Key("n_group", "feed_forward.router.num_groups", int, groups),
        Key("topk_group", "feed_forward.router.top_groups", int, top_groups),
        Key("routed_scaling_factor", "feed_forward.router.scaling", float, scaling),
        Key("aux_loss_alpha", "feed_forward.load_balance_loss", float, 1e-3),
        Key("tie_word_embeddings", "tie_embeddings", bool, False),
    )


def _read(reader: ConfigReader, fields: Json, router: Router, *, num_dense: int) -> Json:
    """Return the fields of a config, of the keys that all have; `num_dense` is for files without that key."""
    reader.activation("hidden_act", "silu", only="silu")
    reader.only(attention_bias=False, mlp_bias=False, moe_layer_freq=1)
    read_quantization(reader)
    nope, rope = fields["qk_nope_head_dim"], fields["qk_rope_head_dim"]
    # Other keys have these sizes already.
    reader.only(num_key_value_heads=fields["num_heads"], head_dim=rope, qk_head_dim=nope + rope)
    return _fields(
        **fields,
        rope=Rope(**read_rope(reader, fields["max_positions"])),
        num_dense=reader.take("first_k_dense_replace", int, num_dense),
        dense_size=reader.take("intermediate_size", int),
        router=router,
        balance_over="row" if reader.take("seq_aux", bool, True) else "batch",
    )


def _read_v2(reader: ConfigReader, fields: Json) -> DecoderConfig:
    reader.only(scoring_func="softmax", norm_topk_prob=False)
    method = reader.take("topk_method", str, "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise UserError(f"config.json has topk_method={method!r}: a DeepSeek-V2 has greedy or group_limited_greedy")
    if method == "greedy":
        fields |= {"num_groups": 1, "top_groups": 1}  # whatever the file has
    router = SoftmaxTopK(**{name: fields.pop(name) for name in _ROUTER}, normalize=False)
    return DecoderConfig(**_read(reader, fields, router, num_dense=0))


def _read_v3(reader: ConfigReader, fields: Json) -> MTPDecoderConfig:
    reader.only(scoring_func="sigmoid", topk_method="noaux_tc", rope_interleave=True)
    router = {name: fields.pop(name) for name in (*_ROUTER, "normalize")}
    found = _read(reader, fields, SigmoidTopK(**router, bias_update_rate=BIAS_UPDATE_RATE), num_dense=3)
    num_mtp_layers = reader.take("num_nextn_predict_layers", int, 0)
    return MTPDecoderConfig(**found, num_mtp_layers=num_mtp_layers, mtp_weight=MTP_WEIGHT)


def _read_v32(reader: ConfigReader, fields: Json) -> MTPDecoderConfig:
    indexer = [fields.pop(name) for name in ("num_index_heads", "index_head_dim", "index_topk")]
    config = _read_v3(reader, fields)
    # Other keys decide these already.
    kinds = ["sparse" if piece is config.feed_forward else "dense" for _, piece in config.stacks()["layers"]]
    reader.only(mlp_layer_types=kinds, layer_types=["indexed_attention"] * config.num_layers)
    return dataclasses.replace(config, attention=_sparse(config.attention, *indexer))


def _write(config: DecoderConfig, label: str) -> Json:
    """Return the other keys that all have."""
    attention: Any = config.attention
    dense, size = write_dense(config)
    return {
        "num_key_value_heads": attention.num_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "first_k_dense_replace": len(dense),
        "moe_layer_freq": 1,
        "intermediate_size": size,
        "seq_aux": config.feed_forward.balance_over == "row",  # type: ignore[union-attr]
        **write_rope(attention, label),
    }


def _write_v2(config: DecoderConfig, label: str) -> Json:
    router: Any = config.feed_forward.router  # type: ignore[union-attr]
    method = "greedy" if router.num_groups == 1 else "group_limited_greedy"
    return _write(config, label) | {"scoring_func": "softmax", "topk_method": method, "norm_topk_prob": False}


def _write_v3(config: MTPDecoderConfig, label: str) -> Json:
    own = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": config.num_mtp_layers}
    return _write(config, label) | own


def _released[C: DecoderConfig](config: C) -> C:
    """Return the model without what only its training needs, which no config.json can express."""
    if isinstance(attention := config.attention, SparseLatentAttention):
        config = dataclasses.replace(config, attention=dataclasses.replace(attention, index_loss_weight=0.0))
    by_row = config.feed_forward.balance_over == "row"  # type: ignore[union-attr]
    return released(config, balance_over="row" if by_row else "batch")


def _with_tensors[C: DecoderConfig](config: C, names: Collection[str]) -> C:
    """Return the config with a latent of the queries where a file has one, and without where it has none.

    Files that leave out `q_lora_rank` are of both kinds; the original code's default is 1536.
    """
    attention: Any = config.attention
    if attention.q_lora_rank is None and "model.layers.0.self_attn.q_a_proj.weight" in names:
        attention = dataclasses.replace(attention, q_lora_rank=_Q_LORA_RANK)
    elif attention.q_lora_rank is not None and "model.layers.0.self_attn.q_proj.weight" in names:
        attention = dataclasses.replace(attention, q_lora_rank=None)
    return dataclasses.replace(config, attention=attention)


_V3_KEYS = (
    *_keys(q_lora_rank=_Q_LORA_RANK, scaling=2.5, groups=8, top_groups=4),
    Key("norm_topk_prob", "feed_forward.router.normalize", bool, True),
)

DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    title="DeepSeek-V2 and V2-Lite",
    label="a DeepSeek-V2",
    presets=_V2_PRESETS,
    architectures=("DeepseekV2ForCausalLM", "DeepseekV2Model"),
    keys=_keys(q_lora_rank=None, scaling=1.0, groups=1, top_groups=1),
    read=_read_v2,
    write=_write_v2,
    aliases={
        "num_experts": "n_routed_experts",
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    },
    harmless=CAUSAL | {"attention_dropout"},  # latent attention has no dropout here
    names=TensorNames(_V2_WEIGHTS, llama.TIED),
    released=_released,
    with_tensors=_with_tensors,
)
DEEPSEEK_V3 = dataclasses.replace(
    DEEPSEEK_V2,  # type: ignore[arg-type]
    name="deepseek_v3",
    title="DeepSeek-V3, R1 and V3.1, Moonlight",
    label="a DeepSeek-V3",
    presets={
        **dict.fromkeys(("deepseek_v3", "deepseek_r1", "deepseek_v3_1"), _V3_PRESET),
        "moonlight_16b_a3b": _MOONLIGHT,
    },
    architectures=("DeepseekV3ForCausalLM", "DeepseekV3Model"),
    keys=_V3_KEYS,
    read=_read_v3,
    write=_write_v3,
    names=with_mtp(_V3_WEIGHTS),
    with_tensors=lambda config, names: with_mtp_tensors(_with_tensors(config, names), names),
)
KIMI_K2 = dataclasses.replace(
    DEEPSEEK_V3, name="kimi_k2", title="Kimi K2", label="a Kimi K2", presets={"kimi_k2": _KIMI_K2}
)
DEEPSEEK_V32 = dataclasses.replace(
    DEEPSEEK_V3,
    name="deepseek_v32",
    title="DeepSeek-V3.2",
    label="a DeepSeek-V3.2",
    presets={"deepseek_v32": dataclasses.replace(_V3_PRESET, attention=_V32_INDEXER)},
    architectures=("DeepseekV32ForCausalLM", "DeepseekV32Model"),
    keys=(
        *_V3_KEYS,
        Key("index_n_heads", "attention.num_index_heads", int),
        Key("index_head_dim", "attention.index_head_dim", int),
        Key("index_topk", "attention.index_topk", int),
    ),
    read=_read_v32,
    names=with_mtp((*_V3_WEIGHTS, *_INDEXER)),
)
