"""The Llama family (arXiv 2302.13971, 2307.09288, 2407.21783), and llama2.c's small ones.

Sizes from the papers and from the released configs; the counts they give are tested to the digit.
"""

from collections.abc import Mapping
from typing import Any

from llama_jax.config import Json, UserError
from llama_jax.models import DecoderConfig
from llama_jax.nn import GroupedQuery, Llama3Scaling, RMSNorm, Rope, RopeScaling, SwiGLU
from llama_jax.zoo.known_keys import is_off
from llama_jax.zoo.reading import CAUSAL, SIZES, ConfigReader, Key, typed
from llama_jax.zoo.registry import Family, MetaFiles
from llama_jax.zoo.rope import read_rope, write_rope
from llama_jax.zoo.weights import TensorNames, mappings


def llama_like(
    *,
    hidden_size: int,
    num_heads: int,
    eps: float,
    theta: float,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    scaling: RopeScaling | None = None,
    window: int | None = None,
    attention_bias: bool = False,
    attention_dropout: float = 0.0,
    tie_embeddings: bool = False,
    **fields: Any,
) -> DecoderConfig:
    """Return a decoder with Llama's attention, norm and positions; `fields` are the others of `DecoderConfig`."""
    return DecoderConfig(
        hidden_size=hidden_size,
        attention=GroupedQuery(
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=head_dim or hidden_size // max(num_heads, 1),
            rope=Rope(theta=theta, scaling=scaling),
            qkv_bias=attention_bias,
            out_bias=attention_bias,
            window=window,
            dropout=attention_dropout,
        ),
        norm=RMSNorm(eps=eps),
        tie_embeddings=tie_embeddings,
        **fields,
    )


def _llama(*, intermediate_size: int, mlp_bias: bool = False, **sizes: Any) -> DecoderConfig:
    return llama_like(feed_forward=SwiGLU(intermediate_size, bias=mlp_bias), **sizes)


def _sizes(layers: int, width: int, heads: int, kv_heads: int, ffn: int) -> Json:
    return {
        "num_layers": layers,
        "hidden_size": width,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "intermediate_size": ffn,
    }


def _stretched(factor: float) -> Llama3Scaling:
    return Llama3Scaling(factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)


_LLAMA1: Json = {"vocab_size": 32000, "max_positions": 2048, "eps": 1e-6, "theta": 10_000.0}
_LLAMA2: Json = {"vocab_size": 32000, "max_positions": 4096, "eps": 1e-5, "theta": 10_000.0}
_LLAMA3: Json = {"vocab_size": 128_256, "max_positions": 8192, "eps": 1e-5, "theta": 500_000.0}
_LLAMA31 = _LLAMA3 | {"max_positions": 131_072}
_STORIES: Json = {"eps": 1e-5, "theta": 10_000.0, "tie_embeddings": True}
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

ENDS = {"embedding": ("model.embed_tokens", "v d -> v d"), "norm": ("model.norm", "d -> d")}
HEAD = {"lm_head": ("lm_head", "v d -> d v")}
NORMS = {name: (name, "d -> d") for name in ("input_layernorm", "post_attention_layernorm")}
ATTENTION = {
    "attention.q_proj": ("self_attn.q_proj", "(n h) d -> d n h", "(n h) -> n h"),
    "attention.k_proj": ("self_attn.k_proj", "(k h) d -> d k h", "(k h) -> k h"),
    "attention.v_proj": ("self_attn.v_proj", "(k h) d -> d k h", "(k h) -> k h"),
    "attention.o_proj": ("self_attn.o_proj", "d (n h) -> n h d", "d -> d"),
}
FEED_FORWARD = {
    "feed_forward.gate_proj": ("mlp.gate_proj", "f d -> d f", "f -> f"),
    "feed_forward.up_proj": ("mlp.up_proj", "f d -> d f", "f -> f"),
    "feed_forward.down_proj": ("mlp.down_proj", "d f -> f d", "d -> d"),
}
LAYER = "model.layers.{layer}."
TIED = {"lm_head.weight": "model.embed_tokens.weight"}

# Meta's names, with the rotary pairs interleaved: also the layout of llama2.c.
META_WEIGHTS = mappings(
    {"embedding": ("tok_embeddings", "v d -> v d"), "norm": ("norm", "d -> d"), "lm_head": ("output", "v d -> d v")}
) + mappings(
    {
        "input_layernorm": ("attention_norm", "d -> d"),
        "attention.q_proj": ("attention.wq", "(n h two) d -> d n (two h)"),
        "attention.k_proj": ("attention.wk", "(k h two) d -> d k (two h)"),
        "attention.v_proj": ("attention.wv", "(k h) d -> d k h"),
        "attention.o_proj": ("attention.wo", "d (n h) -> n h d"),
        "post_attention_layernorm": ("ffn_norm", "d -> d"),
        "feed_forward.gate_proj": ("feed_forward.w1", "f d -> d f"),
        "feed_forward.up_proj": ("feed_forward.w3", "f d -> d f"),
        "feed_forward.down_proj": ("feed_forward.w2", "d f -> f d"),
    },
    "layers.",
    "layers.{layer}.",
)
META_TIED = {"output.weight": "tok_embeddings.weight"}


def _read(reader: ConfigReader, fields: Json) -> DecoderConfig:
    reader.activation("hidden_act", "silu", only="silu")
    return _llama(**fields, **read_rope(reader, fields["max_positions"]))


def _write(config: DecoderConfig, label: str) -> Json:
    return {"hidden_act": "silu", **write_rope(config.attention, label)}


_META_KEYS: dict[str, type] = {
    **dict.fromkeys(("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"), int),
    **dict.fromkeys(("multiple_of", "max_seq_len", "max_batch_size"), int),
    **dict.fromkeys(("ffn_dim_multiplier", "norm_eps", "rope_theta", "rope_scaling_factor"), float),
    "use_scaled_rope": bool,
}


def from_meta(params: Json, shapes: Mapping[str, tuple[int, ...]]) -> DecoderConfig:
    """Return the model of Meta's `params.json`; the shapes of the tensors show what it leaves out.

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


LLAMA = Family(
    name="llama",
    title="The Llama family",
    label="a Llama",
    presets=PRESETS,
    architectures=("LlamaForCausalLM", "LlamaModel"),
    keys=(
        *SIZES,
        Key("num_key_value_heads", "attention.num_kv_heads", int, None),
        Key("head_dim", "attention.head_dim", int, None),
        Key("intermediate_size", "feed_forward.intermediate_size", int),
        Key("max_position_embeddings", "max_positions", int, 2048),
        Key("rms_norm_eps", "norm.eps", float, 1e-6),
        Key("attention_bias", "attention.qkv_bias", bool, False, argument="attention_bias"),
        Key("attention_dropout", "attention.dropout", float, 0.0, argument="attention_dropout"),
        Key("mlp_bias", "feed_forward.bias", bool, False, argument="mlp_bias"),
        Key("tie_word_embeddings", "tie_embeddings", bool, False),
    ),
    read=_read,
    write=_write,
    harmless=CAUSAL,
    names=TensorNames(mappings(ENDS | HEAD) + mappings(NORMS | ATTENTION | FEED_FORWARD, "layers.", LAYER), TIED),
    meta=MetaFiles(TensorNames(META_WEIGHTS, META_TIED), from_meta),
)
