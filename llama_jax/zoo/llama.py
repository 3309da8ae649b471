"""The Llama family (arXiv 2302.13971, 2307.09288, 2407.21783), and llama2.c's small ones.

Sizes from the papers and from the released configs; the counts they give are tested to the digit.
"""

from collections.abc import Mapping
from typing import Any

from llama_jax.config import Json, UserError
from llama_jax.models import DecoderConfig
from llama_jax.nn import GroupedQuery, Llama3Scaling, Norm, RMSNorm, Rope, RopeScaling, SwiGLU
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
    qkv_bias: bool = False,
    qk_norm: Norm | None = None,
    attention_dropout: float = 0.0,
    tie_embeddings: bool = False,
    partial: float = 1.0,
    **fields: Any,
) -> DecoderConfig:
    """Return a decoder with Llama's attention, norm and positions; `fields` are the others of `DecoderConfig`.

    `attention_bias` is for all four projections, `qkv_bias` for three of them. `partial` is the share of a head that is
    rotated.
    """
    head_dim = head_dim or hidden_size // max(num_heads, 1)
    return DecoderConfig(
        hidden_size=hidden_size,
        attention=GroupedQuery(
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=head_dim,
            rope=Rope(theta, scaling, rotary_dim=None if partial == 1 else int(head_dim * partial)),
            qkv_bias=attention_bias or qkv_bias,
            out_bias=attention_bias,
            qk_norm=qk_norm,
            window=window,
            dropout=attention_dropout,
        ),
        norm=RMSNorm(eps=eps),
        tie_embeddings=tie_embeddings,
        **fields,
    )


def llama(*, intermediate_size: int, mlp_bias: bool = False, **others: Any) -> DecoderConfig:
    """Return a Llama; `others` are the other arguments of `llama_like`."""
    return llama_like(feed_forward=SwiGLU(intermediate_size, bias=mlp_bias), **others)


def sizes(layers: int, width: int, heads: int, kv_heads: int, ffn: int) -> Json:
    """Return the arguments of `llama` for a row of a table of sizes."""
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
_SMOL: Json = {"vocab_size": 49_152, "eps": 1e-5, "tie_embeddings": True}
_YI: Json = {"vocab_size": 64_000, "max_positions": 4096, "eps": 1e-5, "theta": 5_000_000.0}
_STORIES: Json = {"eps": 1e-5, "theta": 10_000.0, "tie_embeddings": True}
PRESETS: dict[str, DecoderConfig] = {
    "llama1_7b": llama(**_LLAMA1, **sizes(32, 4096, 32, 32, 11008)),
    "llama1_13b": llama(**_LLAMA1, **sizes(40, 5120, 40, 40, 13824)),
    "llama1_33b": llama(**_LLAMA1, **sizes(60, 6656, 52, 52, 17920)),
    "llama1_65b": llama(**_LLAMA1, **sizes(80, 8192, 64, 64, 22016)),
    "llama2_7b": llama(**_LLAMA2, **sizes(32, 4096, 32, 32, 11008)),
    "llama2_13b": llama(**_LLAMA2, **sizes(40, 5120, 40, 40, 13824)),
    # Never released by itself: the paper's context, and the shape that Code Llama 34B has.
    "llama2_34b": llama(**_LLAMA2, **sizes(48, 8192, 64, 8, 22016)),
    "llama2_70b": llama(**_LLAMA2, **sizes(80, 8192, 64, 8, 28672)),
    "llama3_8b": llama(**_LLAMA3, **sizes(32, 4096, 32, 8, 14336)),
    "llama3_70b": llama(**_LLAMA3, **sizes(80, 8192, 64, 8, 28672)),
    "llama3_405b": llama(**_LLAMA31, **sizes(126, 16384, 128, 8, 53248), scaling=_stretched(8.0)),
    "llama3_2_1b": llama(**_LLAMA31, **sizes(16, 2048, 32, 8, 8192), scaling=_stretched(32.0), tie_embeddings=True),
    "llama3_2_3b": llama(**_LLAMA31, **sizes(28, 3072, 24, 8, 8192), scaling=_stretched(32.0), tie_embeddings=True),
    "smollm2_135m": llama(**_SMOL, **sizes(30, 576, 9, 3, 1536), max_positions=8192, theta=100_000.0),
    "smollm2_360m": llama(**_SMOL, **sizes(32, 960, 15, 5, 2560), max_positions=8192, theta=100_000.0),
    "smollm2_1_7b": llama(**_SMOL, **sizes(24, 2048, 32, 32, 8192), max_positions=8192, theta=130_000.0),
    "tinyllama_1_1b": llama(**_LLAMA1 | {"eps": 1e-5}, **sizes(22, 2048, 32, 4, 5632)),
    "yi_6b": llama(**_YI, **sizes(32, 4096, 32, 4, 11_008)),
    "yi_34b": llama(**_YI, **sizes(60, 7168, 56, 8, 20_480)),
    "stories260k": llama(**_STORIES, **sizes(5, 64, 8, 4, 172), vocab_size=512, max_positions=512),
    "stories15m": llama(**_STORIES, **sizes(6, 288, 6, 6, 768), vocab_size=32000, max_positions=256),
    "stories42m": llama(**_STORIES, **sizes(8, 512, 8, 8, 1376), vocab_size=32000, max_positions=1024),
    "stories110m": llama(**_STORIES, **sizes(12, 768, 12, 12, 2048), vocab_size=32000, max_positions=1024),
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
QK_NORMS = {f"attention.{name}_norm": (f"self_attn.{name}_norm", "h -> h") for name in "qk"}
FEED_FORWARD = {
    "feed_forward.gate_proj": ("mlp.gate_proj", "f d -> d f", "f -> f"),
    "feed_forward.up_proj": ("mlp.up_proj", "f d -> d f", "f -> f"),
    "feed_forward.down_proj": ("mlp.down_proj", "d f -> f d", "d -> d"),
}
LAYER = "model.layers.{layer}."
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
NAMES = TensorNames(mappings(ENDS | HEAD) + mappings(NORMS | ATTENTION | FEED_FORWARD, "layers.", LAYER), TIED)

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


def keys(
    *more: Key,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    max_positions: int = 2048,
    eps: float = 1e-6,
    tied: bool = False,
    eps_key: str = "rms_norm_eps",
) -> tuple[Key, ...]:
    """Return Llama's keys of config.json, with these values where the keys are absent, and `more` of them."""
    return (
        *SIZES,
        Key("num_key_value_heads", "attention.num_kv_heads", int, None, absent=kv_heads),
        Key("head_dim", "attention.head_dim", int, None, absent=head_dim),
        Key("intermediate_size", "feed_forward.intermediate_size", int),
        Key("max_position_embeddings", "max_positions", int, max_positions),
        Key(eps_key, "norm.eps", float, eps),
        Key("attention_dropout", "attention.dropout", float, 0.0, argument="attention_dropout"),
        Key("tie_word_embeddings", "tie_embeddings", bool, tied),
        *more,
    )


ATTENTION_BIAS = Key("attention_bias", "attention.qkv_bias", bool, False, argument="attention_bias")
MLP_BIAS = Key("mlp_bias", "feed_forward.bias", bool, False, argument="mlp_bias")


def read(reader: ConfigReader, fields: Json, *, theta: float = 10_000.0, **others: Any) -> DecoderConfig:
    """Return the Llama of a config.json: `fields` are the values of its `keys`, `others` what its family adds."""
    reader.activation("hidden_act", "silu", only="silu")
    return llama(**fields, **others, **read_rope(reader, fields["max_positions"], theta))


def write(config: DecoderConfig, label: str) -> Json:
    """Return what `read` takes from a config.json itself."""
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
    return llama(
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
    keys=keys(ATTENTION_BIAS, MLP_BIAS),
    read=read,
    write=write,
    harmless=CAUSAL,
    names=NAMES,
    meta=MetaFiles(TensorNames(META_WEIGHTS, META_TIED), from_meta),
)
