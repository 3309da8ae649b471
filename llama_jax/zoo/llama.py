"""The Llama family (arXiv 2302.13971, 2307.09288, 2407.21783), and llama2.c's small ones.

Sizes from the papers and from the released configs; the counts they give are tested to the digit.
"""

from collections.abc import Mapping
from typing import Any

from llama_jax.config import UserError
from llama_jax.models import DecoderConfig
from llama_jax.nn import GroupedQuery, Llama3Scaling, RMSNorm, Rope, RopeScaling, SwiGLU
from llama_jax.zoo import Weight
from llama_jax.zoo.known_keys import is_off
from llama_jax.zoo.reading import CAUSAL, ConfigReader, checked, expect, read_activation, read_rope, typed, write_rope


def _llama(
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    intermediate_size: int,
    max_positions: int,
    eps: float,
    theta: float,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    scaling: RopeScaling | None = None,
    tie_embeddings: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    attention_dropout: float = 0.0,
) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        max_positions=max_positions,
        attention=GroupedQuery(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads or num_heads,
            head_dim=head_dim or hidden_size // max(num_heads, 1),
            rope=Rope(theta=theta, scaling=scaling),
            qkv_bias=attention_bias,
            out_bias=attention_bias,
            dropout=attention_dropout,
        ),
        feed_forward=SwiGLU(intermediate_size=intermediate_size, bias=mlp_bias),
        norm=RMSNorm(eps=eps),
        tie_embeddings=tie_embeddings,
    )


def _sizes(layers: int, width: int, heads: int, kv_heads: int, ffn: int) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": width,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "intermediate_size": ffn,
    }


_LLAMA1: dict[str, Any] = {"vocab_size": 32000, "max_positions": 2048, "eps": 1e-6, "theta": 10_000.0}
_LLAMA2: dict[str, Any] = {"vocab_size": 32000, "max_positions": 4096, "eps": 1e-5, "theta": 10_000.0}
_LLAMA3: dict[str, Any] = {"vocab_size": 128_256, "max_positions": 8192, "eps": 1e-5, "theta": 500_000.0}
_LLAMA31 = _LLAMA3 | {"max_positions": 131_072}
_STORIES: dict[str, Any] = {"eps": 1e-5, "theta": 10_000.0, "tie_embeddings": True}


def _stretched(factor: float) -> Llama3Scaling:
    return Llama3Scaling(factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)


PRESETS: dict[str, DecoderConfig] = {
    "llama1_7b": _llama(**_LLAMA1, **_sizes(32, 4096, 32, 32, 11008)),
    "llama1_13b": _llama(**_LLAMA1, **_sizes(40, 5120, 40, 40, 13824)),
    "llama1_33b": _llama(**_LLAMA1, **_sizes(60, 6656, 52, 52, 17920)),
    "llama1_65b": _llama(**_LLAMA1, **_sizes(80, 8192, 64, 64, 22016)),
    "llama2_7b": _llama(**_LLAMA2, **_sizes(32, 4096, 32, 32, 11008)),
    "llama2_13b": _llama(**_LLAMA2, **_sizes(40, 5120, 40, 40, 13824)),
    # Never released by itself: the paper's context, and the shape that Code Llama 34B has.
    "llama2_34b": _llama(**_LLAMA2, **_sizes(48, 8192, 64, 8, 22016)),
    "llama2_70b": _llama(**_LLAMA2, **_sizes(80, 8192, 64, 8, 28672)),
    "llama3_8b": _llama(**_LLAMA3, **_sizes(32, 4096, 32, 8, 14336)),
    "llama3_70b": _llama(**_LLAMA3, **_sizes(80, 8192, 64, 8, 28672)),
    "llama3_405b": _llama(**_LLAMA31, **_sizes(126, 16384, 128, 8, 53248), scaling=_stretched(8.0)),
    "llama3_2_1b": _llama(**_LLAMA31, **_sizes(16, 2048, 32, 8, 8192), scaling=_stretched(32.0), tie_embeddings=True),
    "llama3_2_3b": _llama(**_LLAMA31, **_sizes(28, 3072, 24, 8, 8192), scaling=_stretched(32.0), tie_embeddings=True),
    "stories260k": _llama(**_STORIES, **_sizes(5, 64, 8, 4, 172), vocab_size=512, max_positions=512),
    "stories15m": _llama(**_STORIES, **_sizes(6, 288, 6, 6, 768), vocab_size=32000, max_positions=256),
    "stories42m": _llama(**_STORIES, **_sizes(8, 512, 8, 8, 1376), vocab_size=32000, max_positions=1024),
    "stories110m": _llama(**_STORIES, **_sizes(12, 768, 12, 12, 2048), vocab_size=32000, max_positions=1024),
}

_LAYER = "model.layers.{layer}."
WEIGHTS = (
    Weight("embedding.weight", "model.embed_tokens.weight", "v d -> v d"),
    Weight("layers.input_layernorm.weight", _LAYER + "input_layernorm.weight", "d -> d"),
    Weight("layers.attention.q_proj.weight", _LAYER + "self_attn.q_proj.weight", "(n h) d -> d n h"),
    Weight("layers.attention.k_proj.weight", _LAYER + "self_attn.k_proj.weight", "(k h) d -> d k h"),
    Weight("layers.attention.v_proj.weight", _LAYER + "self_attn.v_proj.weight", "(k h) d -> d k h"),
    Weight("layers.attention.o_proj.weight", _LAYER + "self_attn.o_proj.weight", "d (n h) -> n h d"),
    Weight("layers.attention.q_proj.bias", _LAYER + "self_attn.q_proj.bias", "(n h) -> n h"),
    Weight("layers.attention.k_proj.bias", _LAYER + "self_attn.k_proj.bias", "(k h) -> k h"),
    Weight("layers.attention.v_proj.bias", _LAYER + "self_attn.v_proj.bias", "(k h) -> k h"),
    Weight("layers.attention.o_proj.bias", _LAYER + "self_attn.o_proj.bias", "d -> d"),
    Weight("layers.post_attention_layernorm.weight", _LAYER + "post_attention_layernorm.weight", "d -> d"),
    Weight("layers.feed_forward.gate_proj.weight", _LAYER + "mlp.gate_proj.weight", "f d -> d f"),
    Weight("layers.feed_forward.up_proj.weight", _LAYER + "mlp.up_proj.weight", "f d -> d f"),
    Weight("layers.feed_forward.down_proj.weight", _LAYER + "mlp.down_proj.weight", "d f -> f d"),
    Weight("layers.feed_forward.gate_proj.bias", _LAYER + "mlp.gate_proj.bias", "f -> f"),
    Weight("layers.feed_forward.up_proj.bias", _LAYER + "mlp.up_proj.bias", "f -> f"),
    Weight("layers.feed_forward.down_proj.bias", _LAYER + "mlp.down_proj.bias", "d -> d"),
    Weight("norm.weight", "model.norm.weight", "d -> d"),
    Weight("lm_head.weight", "lm_head.weight", "v d -> d v"),
)
# What files of tied models may repeat.
TIED = {"lm_head.weight": "model.embed_tokens.weight"}

# Meta's names, with the rotary pairs interleaved: also the layout of llama2.c.
META_WEIGHTS = (
    Weight("embedding.weight", "tok_embeddings.weight", "v d -> v d"),
    Weight("layers.input_layernorm.weight", "layers.{layer}.attention_norm.weight", "d -> d"),
    Weight("layers.attention.q_proj.weight", "layers.{layer}.attention.wq.weight", "(n h two) d -> d n (two h)"),
    Weight("layers.attention.k_proj.weight", "layers.{layer}.attention.wk.weight", "(k h two) d -> d k (two h)"),
    Weight("layers.attention.v_proj.weight", "layers.{layer}.attention.wv.weight", "(k h) d -> d k h"),
    Weight("layers.attention.o_proj.weight", "layers.{layer}.attention.wo.weight", "d (n h) -> n h d"),
    Weight("layers.post_attention_layernorm.weight", "layers.{layer}.ffn_norm.weight", "d -> d"),
    Weight("layers.feed_forward.gate_proj.weight", "layers.{layer}.feed_forward.w1.weight", "f d -> d f"),
    Weight("layers.feed_forward.up_proj.weight", "layers.{layer}.feed_forward.w3.weight", "f d -> d f"),
    Weight("layers.feed_forward.down_proj.weight", "layers.{layer}.feed_forward.w2.weight", "d f -> f d"),
    Weight("norm.weight", "norm.weight", "d -> d"),
    Weight("lm_head.weight", "output.weight", "v d -> d v"),
)
META_TIED = {"output.weight": "tok_embeddings.weight"}
_A_LLAMA = "a Hugging Face Llama"
ARCHITECTURES = ("LlamaForCausalLM", "LlamaModel")


def from_hf(data: Mapping[str, Any]) -> DecoderConfig:
    """The model that a `config.json` of model_type `llama` describes.

    Raises UserError for a key that is missing, not known, or asks for something the model cannot do.
    """
    reader = ConfigReader(data, "a Llama", ARCHITECTURES, harmless=CAUSAL)
    take = reader.take
    read_activation(reader, "hidden_act", "silu", only="silu")
    max_positions = take("max_position_embeddings", int, 2048)
    theta, scaling = read_rope(reader, max_positions)
    config = _llama(
        vocab_size=take("vocab_size", int),
        hidden_size=take("hidden_size", int),
        num_layers=take("num_hidden_layers", int),
        num_heads=take("num_attention_heads", int),
        num_kv_heads=take("num_key_value_heads", int, None),
        head_dim=take("head_dim", int, None),
        intermediate_size=take("intermediate_size", int),
        max_positions=max_positions,
        eps=take("rms_norm_eps", float, 1e-6),
        attention_bias=take("attention_bias", bool, False),
        mlp_bias=take("mlp_bias", bool, False),
        attention_dropout=take("attention_dropout", float, 0.0),
        tie_embeddings=take("tie_word_embeddings", bool, False),
        theta=theta,
        scaling=scaling,
    )
    reader.finish()
    return config


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a model, for Hugging Face's `LlamaForCausalLM`.

    Raises UserError for a model that is no Llama, naming what it has that a Llama cannot have.
    """
    attention = expect(config.attention, GroupedQuery, _A_LLAMA)
    feed_forward, norm = expect(config.feed_forward, SwiGLU, _A_LLAMA), expect(config.norm, RMSNorm, _A_LLAMA)
    if attention.qkv_bias != attention.out_bias:
        raise UserError(f"qkv_bias={attention.qkv_bias} with out_bias={attention.out_bias} has no place in {_A_LLAMA}")
    if attention.rope is None:
        raise UserError(f"rope=None has no place in {_A_LLAMA}")
    data = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": feed_forward.intermediate_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": norm.eps,
        "attention_bias": attention.qkv_bias,
        "attention_dropout": attention.dropout,
        "mlp_bias": feed_forward.bias,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": attention.rope.theta,
        "rope_scaling": write_rope(attention.rope.scaling, _A_LLAMA),
    }
    return checked(data, config, from_hf, _A_LLAMA)


_META_KEYS = {
    "dim": int,
    "n_layers": int,
    "n_heads": int,
    "n_kv_heads": int,
    "head_dim": int,
    "hidden_dim": int,
    "vocab_size": int,
    "multiple_of": int,
    "ffn_dim_multiplier": float,
    "norm_eps": float,
    "rope_theta": float,
    "use_scaled_rope": bool,
    "rope_scaling_factor": float,
    "max_seq_len": int,
    "max_batch_size": int,
}


def from_meta(params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> DecoderConfig:
    """The model of Meta's `params.json`; what it leaves out is read off the shapes of the tensors.

    Raises UserError for a key that is not known.
    """
    unknown = [key for key, value in params.items() if key not in _META_KEYS and not is_off(value)]
    if unknown:
        raise UserError(
            f"params.json has {unknown[0]}={params[unknown[0]]!r}, which is not supported; where it changes no logit, "
            f"pass --ignore-config-keys {unknown[0]}"
        )
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in shapes:
            raise UserError(f"the weights lack '{name}'")
    for key, kind in _META_KEYS.items():
        if params.get(key) is not None:
            typed(params[key], kind, f"params.json has {key}")
    dim, theta = params["dim"], float(params.get("rope_theta") or 10_000.0)
    scaling = None
    if params.get("use_scaled_rope"):
        # Meta's code has the factor, not its files: 8 in Llama 3.1, 32 in 3.2, whose two sizes no 3.1 has.
        scaling = _stretched(float(params.get("rope_scaling_factor") or (32.0 if dim <= 3072 else 8.0)))
    if (max_positions := params.get("max_seq_len")) is None:
        # Not in Meta's files either: the context of the release that has this base or this eps.
        by_theta = {500_000.0: 131_072 if scaling else 8192, 1_000_000.0: 16_384}
        max_positions = by_theta.get(theta) or (2048 if params["norm_eps"] == 1e-6 else 4096)
    return _llama(
        vocab_size=shapes["tok_embeddings.weight"][0],  # the file's may be -1
        hidden_size=dim,
        num_layers=params["n_layers"],
        num_heads=params["n_heads"],
        num_kv_heads=params.get("n_kv_heads"),
        head_dim=params.get("head_dim"),
        intermediate_size=shapes["layers.0.feed_forward.w1.weight"][0],
        max_positions=max_positions,
        eps=params["norm_eps"],
        theta=theta,
        scaling=scaling,
        tie_embeddings="output.weight" not in shapes,
    )
