"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm before each sublayer, GELU, a tied head; and GPT-3."""

import dataclasses
from typing import Any

from llama_jax.config import Json
from llama_jax.models import DecoderConfig, LayerOverride
from llama_jax.nn import MLP, Activation, GroupedQuery, LayerNorm, LearnedPositions
from llama_jax.zoo.reading import CAUSAL, ConfigReader, Key
from llama_jax.zoo.registry import Family, Presets
from llama_jax.zoo.transformer import full_heads
from llama_jax.zoo.weights import TensorNames, mappings


def gpt(
    *,
    hidden_size: int,
    num_heads: int,
    max_positions: int,
    vocab_size: int = 50257,
    intermediate_size: int | None = None,
    activation: Activation = "gelu_tanh",
    eps: float = 1e-5,
    scale: float | None = None,
    attention_dropout: float = 0.0,
    tie_embeddings: bool = True,
    **fields: Any,
) -> DecoderConfig:
    """Return a decoder whose attention is as wide as the model, and whose feed-forward by default is four times that.

    `fields` are the others of `DecoderConfig`.
    """
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        max_positions=max_positions,
        attention=GroupedQuery(rope=None, scale=scale, **full_heads(hidden_size, num_heads, dropout=attention_dropout)),
        feed_forward=MLP(intermediate_size=intermediate_size or 4 * hidden_size, activation=activation, bias=True),
        norm=LayerNorm(eps=eps, bias=True),
        tie_embeddings=tie_embeddings,
        positions=LearnedPositions(num_positions=max_positions),
        **fields,
    )


def _released(layers: int, width: int, heads: int) -> DecoderConfig:
    return gpt(
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        max_positions=1024,
        dropout=0.1,
        attention_dropout=0.1,
    )


PRESETS: dict[str, DecoderConfig] = {
    "gpt2": _released(12, 768, 12),
    "gpt2_medium": _released(24, 1024, 16),
    "gpt2_large": _released(36, 1280, 20),
    "gpt2_xl": _released(48, 1600, 25),
}


_LAYER = "transformer.h.{layer}."
WEIGHTS = (
    *mappings(
        {"embedding": ("wte", "v d -> v d"), "positions": ("wpe", "p d -> p d"), "norm": ("ln_f", "d -> d", "d -> d")},
        theirs="transformer.",
    ),
    *mappings({"lm_head": ("lm_head", "v d -> d v")}),
    # Matrices are (in, out); those of queries, keys and values are one tensor.
    *mappings(
        {f"{name}_proj": ("c_attn", "d (n h) -> d n h", "(n h) -> n h") for name in "qkv"},
        "layers.attention.",
        f"{_LAYER}attn.",
        joined=1,
    ),
    *mappings(
        {
            "input_layernorm": ("ln_1", "d -> d", "d -> d"),
            "attention.o_proj": ("attn.c_proj", "(n h) d -> n h d", "d -> d"),
            "post_attention_layernorm": ("ln_2", "d -> d", "d -> d"),
            "feed_forward.up_proj": ("mlp.c_fc", "d f -> d f", "f -> f"),
            "feed_forward.down_proj": ("mlp.c_proj", "f d -> f d", "d -> d"),
        },
        "layers.",
        _LAYER,
    ),
)
# Computed, not trained: the causal mask, and the value in place of a masked score.
_IGNORED = (r"transformer\.h\.\d+\.attn\.(masked_)?bias",)


def _read(reader: ConfigReader, fields: Json) -> DecoderConfig:
    reader.only(scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    scale = None if reader.take("scale_attn_weights", bool, True) else 1.0
    return gpt(**fields, scale=scale)


def _write(config: DecoderConfig, label: str) -> Json:
    attention: Any = config.attention
    return {
        "n_ctx": config.max_positions,
        "scale_attn_weights": attention.scale is None,
        "embd_pdrop": config.dropout,
    }


GPT2 = Family(
    name="gpt2",
    title="GPT-2",
    label="a GPT-2",
    presets=PRESETS,
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    keys=(
        Key("vocab_size", "vocab_size", int, 50257),
        Key("n_positions", "max_positions", int, 1024),
        Key("n_embd", "hidden_size", int),
        Key("n_layer", "num_layers", int),
        Key("n_head", "attention.num_heads", int),
        Key("n_inner", "feed_forward.intermediate_size", int, None),
        Key("activation_function", "feed_forward.activation", Activation, "gelu_new"),
        Key("layer_norm_epsilon", "norm.eps", float, 1e-5),
        # Here the embeddings' too, whatever embd_pdrop is.
        Key("resid_pdrop", "dropout", float, 0.1),
        Key("attn_pdrop", "attention.dropout", float, 0.1, argument="attention_dropout"),
        Key("tie_word_embeddings", "tie_embeddings", bool, True),
    ),
    read=_read,
    write=_write,
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "n_vocab": "vocab_size",
    },
    # n_ctx was the size of the mask, which needs none; the softmax is in float32 here, so its order is rounding.
    harmless=CAUSAL | {"embd_pdrop", "n_ctx", "reorder_and_upcast_attn"},
    names=TensorNames(WEIGHTS, {"lm_head.weight": "transformer.wte.weight"}, _IGNORED),
)


def gpt3(
    layers: int, width: int, head_dim: int, *, window: int = 256, max_positions: int = 2048, vocab_size: int = 50257
) -> DecoderConfig:
    """Return a GPT-3 (Brown et al. 2020, table 2.1): GPT-2 with dense and locally banded attention in turns.

    Where the table contradicts itself, attention is as wide as the model, in heads of the size that it prints: 16 of
    128 in the 1.3B (for 24), and a width of 5120 in the 13B (for 5140). The paper gives no band size ("similar to the
    Sparse Transformer"): every second layer, from the second one on, attends to 256 tokens, as in EleutherAI's
    GPT-Neo. No dropout is mentioned, so there is none. The weights were never released.
    """
    config = gpt(
        num_layers=layers,
        hidden_size=width,
        num_heads=width // head_dim,
        max_positions=max_positions,
        vocab_size=vocab_size,
    )
    assert isinstance(config.attention, GroupedQuery)
    banded = LayerOverride(tuple(range(1, layers, 2)), dataclasses.replace(config.attention, window=window))
    return dataclasses.replace(config, overrides=(banded,))


GPT3 = Presets(
    name="gpt3",
    title="GPT-3",
    presets={
        "gpt3_125m": gpt3(12, 768, 64),
        "gpt3_350m": gpt3(24, 1024, 64),
        "gpt3_760m": gpt3(24, 1536, 96),
        "gpt3_1_3b": gpt3(24, 2048, 128),
        "gpt3_2_7b": gpt3(32, 2560, 80),
        "gpt3_6_7b": gpt3(32, 4096, 128),
        "gpt3_13b": gpt3(40, 5120, 128),
        "gpt3_175b": gpt3(96, 12288, 128),
    },
)
