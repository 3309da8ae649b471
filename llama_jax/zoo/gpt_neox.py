"""EleutherAI's GPT-NeoX (arXiv 2204.06745), with Pythia, and GPT-J; Microsoft's Phi-1 to 2 (arXiv 2306.11644).

LayerNorm and biases as in GPT-2, and three things of GPT-J's: attention and feed-forward that read the same input, and
rotary positions in the first part of each head.
"""

from collections.abc import Mapping
from typing import Any

from llama_jax.config import Json, UserError
from llama_jax.models import DecoderConfig
from llama_jax.nn import MLP, Activation, GroupedQuery, LayerNorm, Norm, Rope, RopeScaling
from llama_jax.zoo import llama
from llama_jax.zoo.gpt2 import GPT2
from llama_jax.zoo.reading import CAUSAL, SIZES, ConfigReader, Key
from llama_jax.zoo.registry import Family
from llama_jax.zoo.rope import read_rope, write_rope
from llama_jax.zoo.transformer import full_heads
from llama_jax.zoo.weights import TensorNames, WeightMapping, mappings

# -- what decoders with LayerNorm and these tensors have in common; Falcon and BLOOM too


def layer_norm_decoder(
    *,
    hidden_size: int,
    num_heads: int,
    rope: Rope | None,
    num_kv_heads: int | None = None,
    intermediate_size: int | None = None,
    activation: Activation = "gelu",
    eps: float = 1e-5,
    attention_bias: bool = True,
    bias: bool = True,
    qk_norm: Norm | None = None,
    attention_dropout: float = 0.0,
    tie_embeddings: bool = False,
    **fields: Any,
) -> DecoderConfig:
    """Return a decoder whose heads are together as wide as the model; `bias` is the feed-forward's.

    By default the feed-forward is four times as wide. `fields` are the others of `DecoderConfig`.
    """
    heads = full_heads(hidden_size, num_heads, dropout=attention_dropout)
    heads |= {"num_kv_heads": num_kv_heads or num_heads, "qkv_bias": attention_bias, "out_bias": attention_bias}
    return DecoderConfig(
        hidden_size=hidden_size,
        attention=GroupedQuery(**heads, rope=rope, qk_norm=qk_norm),
        feed_forward=MLP(intermediate_size or 4 * hidden_size, activation=activation, bias=bias),
        norm=LayerNorm(eps=eps, bias=True),
        tie_embeddings=tie_embeddings,
        **fields,
    )


def rotary(head_dim: int, theta: float, scaling: RopeScaling | None = None, partial: float = 1.0) -> Rope:
    """Return the rotary positions of this share of a head."""
    size = int(head_dim * partial)
    return Rope(theta, scaling, rotary_dim=None if size == head_dim else size)


def read_rotary(reader: ConfigReader, fields: Json, partial: float) -> Rope:
    """Return the rotary positions of heads that are together as wide as the model; `partial` is the usual share."""
    found = read_rope(reader, fields["max_positions"], partial=partial, other_partials=True)
    return rotary(fields["hidden_size"] // max(fields["num_heads"], 1), **found)


def write_rotary(config: DecoderConfig, label: str) -> Json:
    """Return the keys that `read_rotary` reads."""
    attention: Any = config.attention
    found = write_rope(attention, label)
    return found | {"partial_rotary_factor": (attention.rope.rotary_dim or attention.head_dim) / attention.head_dim}


def ends(embedding: str, norm: str, head: str = "lm_head") -> tuple[WeightMapping, ...]:
    """Return the weights before and after the layers."""
    rows = {"embedding": (embedding, "v d -> v d"), "norm": (norm, "d -> d", "d -> d"), "lm_head": (head, "v d -> d v")}
    return mappings(rows)


NORMS = {name: (name, "d -> d", "d -> d") for name in ("input_layernorm", "post_attention_layernorm")}


def fused_layers(
    layer: str, attention: str, norms: Mapping[str, tuple[str, ...]] = NORMS, group: int = 1
) -> tuple[WeightMapping, ...]:
    """Return the weights of layers whose queries, keys and values are one tensor.

    In it each key head, with its value head, follows the `group` query heads that share it.
    """
    queries = ("k h", "k h") if group == 1 else (f"k (x{group} h)", f"(k x{group}) h")
    sides = {"q": queries, "k": ("k h", "k h"), "v": ("k h", "k h")}
    fused = {
        f"{name}_proj": ("query_key_value", f"{theirs} d -> d {ours}", f"{theirs} -> {ours}")
        for name, (theirs, ours) in sides.items()
    }
    rows = {
        "attention.o_proj": (f"{attention}.dense", "d (n h) -> n h d", "d -> d"),
        "feed_forward.up_proj": ("mlp.dense_h_to_4h", "f d -> d f", "f -> f"),
        "feed_forward.down_proj": ("mlp.dense_4h_to_h", "d f -> f d", "d -> d"),
    }
    return mappings(
        fused, "layers.attention.", f"{layer}{attention}.", joined=1, merged=True
    ) + mappings({**norms, **rows}, "layers.", layer)  # fmt: skip


# -- GPT-NeoX


def _neox(layers: int, width: int, heads: int, vocab: int, *, partial: float = 0.25, **fields: Any) -> DecoderConfig:
    usual: Json = {"max_positions": 2048, "parallel": "own_norms"}
    return layer_norm_decoder(
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        vocab_size=vocab,
        rope=rotary(width // heads, 10_000.0, partial=partial),
        **usual | fields,
    )


def _read_neox(reader: ConfigReader, fields: Json) -> DecoderConfig:
    parallel = reader.take("use_parallel_residual", bool, True)
    rope = read_rotary(reader, fields, 0.25)
    return layer_norm_decoder(**fields, rope=rope, parallel="own_norms" if parallel else "none")


def _write_neox(config: DecoderConfig, label: str) -> Json:
    names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    found = {names.get(key, key): value for key, value in write_rotary(config, label).items()}
    return found | {"use_parallel_residual": config.parallel != "none"}


GPT_NEOX = Family(
    name="gpt_neox",
    title="GPT-NeoX and Pythia",
    label="a GPT-NeoX",
    presets={
        "pythia_14m": _neox(6, 128, 4, 50_304),
        "pythia_31m": _neox(6, 256, 8, 50_304),
        "pythia_70m": _neox(6, 512, 8, 50_304),
        "pythia_160m": _neox(12, 768, 12, 50_304),
        "pythia_410m": _neox(24, 1024, 16, 50_304),
        "pythia_1b": _neox(16, 2048, 8, 50_304),
        "pythia_1_4b": _neox(24, 2048, 16, 50_304),
        "pythia_2_8b": _neox(32, 2560, 32, 50_304),
        "pythia_6_9b": _neox(32, 4096, 32, 50_432),
        "pythia_12b": _neox(36, 5120, 40, 50_688),
        "gpt_neox_20b": _neox(44, 6144, 64, 50_432, activation="gelu_tanh"),
        "redpajama_incite_3b": _neox(32, 2560, 32, 50_432, partial=1.0, parallel="none"),
    },
    architectures=("GPTNeoXForCausalLM", "GPTNeoXModel"),
    keys=(
        *SIZES,
        Key("intermediate_size", "feed_forward.intermediate_size", int),
        Key("hidden_act", "feed_forward.activation", Activation, "gelu"),
        Key("max_position_embeddings", "max_positions", int, 2048),
        Key("layer_norm_eps", "norm.eps", float, 1e-5),
        Key("attention_bias", "attention.qkv_bias", bool, True, argument="attention_bias"),
        Key("attention_dropout", "attention.dropout", float, 0.0, argument="attention_dropout"),
        Key("hidden_dropout", "dropout", float, 0.0),
        Key("tie_word_embeddings", "tie_embeddings", bool, False),
    ),
    read=_read_neox,
    write=_write_neox,
    aliases={"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
    harmless=CAUSAL,
    names=TensorNames(
        ends("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out")
        + fused_layers("gpt_neox.layers.{layer}.", "attention"),
        {"embed_out.weight": "gpt_neox.embed_in.weight"},
        # Computed, not trained: the causal mask, and the value in place of a masked score.
        (r"gpt_neox\.layers\.\d+\.attention\.(masked_)?bias",),
        ((r"^lm_head\.", "embed_out."),),
    ),
)

# -- Phi-1, 1.5 and 2: one norm for both


def _phi(layers: int, width: int, partial: float, dropout: float) -> DecoderConfig:
    return layer_norm_decoder(
        vocab_size=51_200,
        num_layers=layers,
        hidden_size=width,
        num_heads=32,
        max_positions=2048,
        rope=rotary(width // 32, 10_000.0, partial=partial),
        activation="gelu_tanh",
        dropout=dropout,
        parallel="one_norm",
        head_bias="trained",
    )


def _read_phi(reader: ConfigReader, fields: Json) -> DecoderConfig:
    qk_norm = LayerNorm(fields["eps"], bias=True) if reader.take("qk_layernorm", bool, False) else None
    rope = read_rotary(reader, fields, 0.5)
    return layer_norm_decoder(**fields, rope=rope, qk_norm=qk_norm, parallel="one_norm", head_bias="trained")


def _write_phi(config: DecoderConfig, label: str) -> Json:
    attention: Any = config.attention
    found = {"embd_pdrop": config.dropout, "qk_layernorm": attention.qk_norm is not None}
    return found | write_rotary(config, label)


_QKV = {name: row for name, row in llama.ATTENTION.items() if name != "attention.o_proj"}
_HEAD_BIAS = WeightMapping("head_bias.bias", "lm_head.bias", "v -> v")
PHI = Family(
    name="phi",
    title="Phi-1, 1.5 and 2",
    label="a Phi",
    presets={
        "phi_1": _phi(24, 2048, 0.5, 0.0),
        "phi_1_5": _phi(24, 2048, 0.5, 0.0),
        "phi_2": _phi(32, 2560, 0.4, 0.1),
    },
    architectures=("PhiForCausalLM",),
    keys=(
        *SIZES,
        Key("num_key_value_heads", "attention.num_kv_heads", int, None),
        Key("intermediate_size", "feed_forward.intermediate_size", int, 8192),
        Key("hidden_act", "feed_forward.activation", Activation, "gelu_new"),
        Key("max_position_embeddings", "max_positions", int, 2048),
        Key("layer_norm_eps", "norm.eps", float, 1e-5),
        Key("attention_dropout", "attention.dropout", float, 0.0, argument="attention_dropout"),
        # Here the embeddings' too, whatever embd_pdrop is.
        Key("resid_pdrop", "dropout", float, 0.0),
        Key("tie_word_embeddings", "tie_embeddings", bool, False),
    ),
    read=_read_phi,
    write=_write_phi,
    harmless=CAUSAL | {"embd_pdrop"},
    names=TensorNames(
        (
            *ends("model.embed_tokens", "model.final_layernorm"),
            _HEAD_BIAS,
            *mappings(
                {
                    "input_layernorm": ("input_layernorm", "d -> d", "d -> d"),
                    **_QKV,
                    "attention.o_proj": ("self_attn.dense", "d (n h) -> n h d", "d -> d"),
                    "attention.q_norm": ("self_attn.q_layernorm", "h -> h", "h -> h"),
                    "attention.k_norm": ("self_attn.k_layernorm", "h -> h", "h -> h"),
                    "feed_forward.up_proj": ("mlp.fc1", "f d -> d f", "f -> f"),
                    "feed_forward.down_proj": ("mlp.fc2", "d f -> f d", "d -> d"),
                },
                "layers.",
                llama.LAYER,
            ),
        ),
        llama.TIED,
    ),
)

# -- GPT-J: rotary pairs lie side by side


def _gptj(*, rotary_dim: int, **fields: Any) -> DecoderConfig:
    if (head_dim := fields["hidden_size"] // max(fields["num_heads"], 1)) % rotary_dim:
        raise UserError(f"rotary_dim={rotary_dim} must divide the size of a head, {head_dim}, in a GPT-J")
    rope = Rope(10_000.0, None, rotary_dim)
    return layer_norm_decoder(rope=rope, attention_bias=False, parallel="one_norm", head_bias="trained", **fields)


def _read_gptj(reader: ConfigReader, fields: Json) -> DecoderConfig:
    reader.only(rotary=True, scale_attn_weights=True)
    return _gptj(**fields)


def _gptj_names(config: DecoderConfig) -> TensorNames:
    # Every part of a head that is as large as the first, which turns, is reordered like it, in queries and keys alike:
    # scores do not depend on the order.
    attention: Any = config.attention
    parts = f"x{attention.head_dim // attention.rope.rotary_dim}"
    rows = {
        "input_layernorm": ("ln_1", "d -> d", "d -> d"),
        "attention.q_proj": ("attn.q_proj", f"(n {parts} h two) d -> d n ({parts} two h)"),
        "attention.k_proj": ("attn.k_proj", f"(n {parts} h two) d -> d n ({parts} two h)"),
        "attention.v_proj": ("attn.v_proj", "(n h) d -> d n h"),
        "attention.o_proj": ("attn.out_proj", "d (n h) -> n h d"),
        "feed_forward.up_proj": ("mlp.fc_in", "f d -> d f", "f -> f"),
        "feed_forward.down_proj": ("mlp.fc_out", "d f -> f d", "d -> d"),
    }
    weights = (*ends("transformer.wte", "transformer.ln_f"), _HEAD_BIAS)
    return TensorNames(
        weights + mappings(rows, "layers.", "transformer.h.{layer}."),
        {"lm_head.weight": "transformer.wte.weight"},
        (r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
    )


GPTJ = Family(
    name="gptj",
    title="GPT-J",
    label="a GPT-J",
    presets={
        "gptj_6b": _gptj(
            vocab_size=50_400,
            num_layers=28,
            hidden_size=4096,
            num_heads=16,
            max_positions=2048,
            rotary_dim=64,
            activation="gelu_tanh",
        )
    },
    architectures=("GPTJForCausalLM",),
    keys=(
        Key("vocab_size", "vocab_size", int, 50_400),
        Key("n_positions", "max_positions", int, 2048),
        Key("n_embd", "hidden_size", int),
        Key("n_layer", "num_layers", int),
        Key("n_head", "attention.num_heads", int),
        Key("n_inner", "feed_forward.intermediate_size", int, None),
        Key("rotary_dim", "attention.rope.rotary_dim", int, absent=64),
        Key("activation_function", "feed_forward.activation", Activation, "gelu_new"),
        Key("layer_norm_epsilon", "norm.eps", float, 1e-5),
        # Here the embeddings' too, whatever embd_pdrop is.
        Key("resid_pdrop", "dropout", float, 0.0),
        Key("attn_pdrop", "attention.dropout", float, 0.0, argument="attention_dropout"),
        Key("tie_word_embeddings", "tie_embeddings", bool, False),
    ),
    read=_read_gptj,
    write=lambda config, label: {"embd_pdrop": config.dropout, "rotary": True},
    aliases=GPT2.aliases,
    harmless=CAUSAL | {"embd_pdrop"},
    names=_gptj_names,
)
