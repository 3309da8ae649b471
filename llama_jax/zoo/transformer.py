"""The Transformer (Vaswani et al. 2017, arXiv 1706.03762), BART and Marian, which are made like it.

BART (Lewis et al. 2020, arXiv 1910.13461) has GELU, learned positions whose table has two rows before the first, and a
norm after the embeddings. Marian's Transformer (Junczys-Dowmunt et al. 2018, arXiv 1804.00344), of the OPUS-MT
translation models, has swish, and sinusoids that are not interleaved: all sines, then all cosines. Padding, which no
text was trained with, begins its translations and has a logit of 0: it is never written.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from llama_jax.config import Json, UserError
from llama_jax.models import EncoderDecoderConfig, LayerOverride
from llama_jax.nn import (
    MLP,
    Activation,
    CrossAttention,
    FeedForward,
    GroupedQuery,
    LayerNorm,
    LearnedPositions,
    Mixer,
    SinusoidalPositions,
)
from llama_jax.zoo.reading import ConfigReader, Key, expect
from llama_jax.zoo.registry import Family, Presets
from llama_jax.zoo.weights import TensorNames, WeightMapping, mappings

_OFFSET = 2  # of BART's positions


def full_heads(hidden_size: int, num_heads: int, name: str = "num_heads", *, dropout: float) -> Json:
    """Return the fields of attention as wide as the model, with biases everywhere; `name` is for its error."""
    if num_heads < 1 or hidden_size % num_heads:
        raise UserError(f"hidden_size={hidden_size} is not divisible by {name}={num_heads}")
    return {
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": hidden_size // num_heads,
        "qkv_bias": True,
        "out_bias": True,
        "dropout": dropout,
    }


def transformer(
    *,
    hidden_size: int,
    num_encoder_layers: int,
    num_heads: int,
    intermediate_size: int,
    scale_embedding: bool,
    encoder_heads: int | None = None,
    encoder_intermediate_size: int | None = None,
    activation: Activation = "relu",
    embedding_norm: bool = False,
    eps: float = 1e-5,
    dropout: float = 0.1,
    attention_dropout: float = 0.0,
    activation_dropout: float = 0.0,
    **fields: Any,
) -> EncoderDecoderConfig:
    """Return a model of these sizes, made as in the paper: norms after the sums, biases everywhere, one embedding.

    The encoder's sizes are the decoder's where they are None; `fields` are the others of `EncoderDecoderConfig`.
    """
    norm = LayerNorm(eps=eps, bias=True)

    def pieces(count: int, name: str, size: int) -> tuple[Mixer, FeedForward]:
        heads = full_heads(hidden_size, count, name, dropout=attention_dropout)
        return GroupedQuery(rope=None, **heads), MLP(size, activation, bias=True, dropout=activation_dropout)

    own = pieces(num_heads, "num_heads", intermediate_size)
    of_encoder = pieces(
        num_heads if encoder_heads is None else encoder_heads,
        "encoder_heads",
        intermediate_size if encoder_intermediate_size is None else encoder_intermediate_size,
    )
    everywhere = tuple(range(num_encoder_layers))
    return EncoderDecoderConfig(
        hidden_size=hidden_size,
        num_encoder_layers=num_encoder_layers,
        attention=own[0],
        cross_attention=CrossAttention(**full_heads(hidden_size, num_heads, dropout=attention_dropout)),
        feed_forward=own[1],
        norm=norm,
        norm_placement="post",
        embedding_norm=norm if embedding_norm else None,
        embedding_scale=hidden_size**0.5 if scale_embedding else 1.0,
        tie_embeddings=True,
        dropout=dropout,
        **fields,
        encoder_overrides=tuple(
            LayerOverride(everywhere, piece) for piece, same in zip(of_encoder, own, strict=True) if piece != same
        ),
    )


def _paper(hidden_size: int, num_heads: int, intermediate_size: int, dropout: float) -> EncoderDecoderConfig:
    # Token 1 is BOS in the package's tokenizers; the paper names no limit of positions.
    return transformer(
        vocab_size=37_000,
        hidden_size=hidden_size,
        num_encoder_layers=6,
        num_layers=6,
        num_heads=num_heads,
        intermediate_size=intermediate_size,
        max_positions=512,
        positions=SinusoidalPositions(),
        decoder_start_id=1,
        scale_embedding=True,
        dropout=dropout,
    )


# Its weights were not released. The paper's table 3 rounds: with a vocabulary of 37,000 these sizes have 63 and 214
# million parameters, where it has 65 and 213. The big one dropped 0.3 for English to German, and 0.1 for French.
TRANSFORMER = Presets(
    name="transformer",
    title="The Transformer",
    objectives=("ParallelText",),
    presets={
        "transformer_base": _paper(512, 8, 2048, dropout=0.1),
        "transformer_big": _paper(1024, 16, 4096, dropout=0.3),
    },
)


def _bart(layers: int, width: int, heads: int) -> EncoderDecoderConfig:
    # The released configs' dropouts; the paper names none.
    return transformer(
        vocab_size=50_265,
        hidden_size=width,
        num_encoder_layers=layers,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=4 * width,
        max_positions=1024,
        positions=LearnedPositions(1024, offset=_OFFSET),
        decoder_start_id=2,
        scale_embedding=False,
        activation="gelu",
        embedding_norm=True,
        head_bias="fixed",
        dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.1,
    )


def _weights() -> tuple[WeightMapping, ...]:
    """Return the table of Marian, which BART has too: all but the positions and the norm after the embeddings."""

    def attention(theirs: str, ours: str = "attention") -> dict[str, tuple[str, ...]]:
        rows = {f"{ours}.{n}_proj": (f"{theirs}.{n}_proj", "(n h) d -> d n h", "(n h) -> n h") for n in "qkv"}
        rows[f"{ours}.o_proj"] = (f"{theirs}.out_proj", "d (n h) -> n h d", "d -> d")
        rows[f"{ours}_norm"] = (f"{theirs}_layer_norm", "d -> d", "d -> d")
        return rows

    inside = {
        "feed_forward.up_proj": ("fc1", "f d -> d f", "f -> f"),
        "feed_forward.down_proj": ("fc2", "d f -> f d", "d -> d"),
        "feed_forward_norm": ("final_layer_norm", "d -> d", "d -> d"),
    }
    cross = attention("encoder_attn", "cross_attention")
    return (
        *mappings({"embedding": ("model.shared", "v d -> v d")}),
        *mappings(attention("self_attn") | inside, "encoder_layers.", "model.encoder.layers.{layer}."),
        *mappings(attention("self_attn") | cross | inside, "layers.", "model.decoder.layers.{layer}."),
        WeightMapping("head_bias.bias", "final_logits_bias", "1 v -> v"),
    )


_EMBEDDING_ROWS = {
    "positions": ("embed_positions", "v d -> v d"),
    "embedding_norm": ("layernorm_embedding", "d -> d", "d -> d"),
}
_TIED: dict[str, str] = dict.fromkeys(
    ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"), "model.shared.weight"
)


def _read(reader: ConfigReader, fields: Json) -> Json:
    """Return the arguments of `transformer` that BART and Marian have in common."""
    reader.only(
        is_encoder_decoder=True,
        is_decoder=False,
        tie_word_embeddings=True,
        normalize_before=False,
        add_final_layer_norm=False,
        add_bias_logits=False,
    )
    sizes = {
        "encoder_heads": reader.take("encoder_attention_heads", int),
        "encoder_intermediate_size": reader.take("encoder_ffn_dim", int),
        "scale_embedding": reader.take("scale_embedding", bool, False),
        "head_bias": "none" if reader.architecture in ("BartModel", "MarianModel") else "fixed",
    }
    return fields | sizes


def _read_bart(reader: ConfigReader, fields: Json) -> EncoderDecoderConfig:
    reader.only(normalize_embedding=True, static_position_embeddings=False, extra_pos_embeddings=_OFFSET)
    positions = LearnedPositions(fields["max_positions"], offset=_OFFSET)
    return transformer(**_read(reader, fields), positions=positions, embedding_norm=True)


def _read_marian(reader: ConfigReader, fields: Json) -> EncoderDecoderConfig:
    reader.only(
        static_position_embeddings=True,
        normalize_embedding=False,
        share_encoder_decoder_embeddings=True,
        decoder_vocab_size=fields["vocab_size"],
    )
    start = fields["decoder_start_id"]
    if (pad := reader.data.get("pad_token_id", start)) != start:
        raise UserError(
            f"config.json has pad_token_id={pad!r} and decoder_start_token_id={start}, and a Marian's are the same"
        )
    return transformer(**_read(reader, fields), positions=SinusoidalPositions("halves"), never_written=(start,))


def _write(config: EncoderDecoderConfig, label: str) -> Json:
    """Return the other keys that BART and Marian have in common."""
    mixer, feed_forward = config.stacks()["encoder_layers"][0]
    return {
        "is_encoder_decoder": True,
        "encoder_attention_heads": expect(mixer, GroupedQuery, label=label).num_heads,
        "encoder_ffn_dim": expect(feed_forward, MLP, label=label).intermediate_size,
        "scale_embedding": config.embedding_scale != 1,
        "tie_word_embeddings": True,
    }


def _write_bart(config: EncoderDecoderConfig, label: str) -> Json:
    name = "BartForConditionalGeneration" if config.head_bias == "fixed" else "BartModel"
    own = {"architectures": [name], "pad_token_id": 1, "normalize_embedding": True}
    return _write(config, label) | own


def _write_marian(config: EncoderDecoderConfig, label: str) -> Json:
    return _write(config, label) | {
        "architectures": ["MarianMTModel" if config.head_bias == "fixed" else "MarianModel"],
        "static_position_embeddings": True,
        "normalize_embedding": False,
        "share_encoder_decoder_embeddings": True,
        "pad_token_id": config.decoder_start_id,
        "bad_words_ids": [[config.decoder_start_id]],
    }


def _with_tensors(config: EncoderDecoderConfig, names: Collection[str]) -> EncoderDecoderConfig:
    """Return the config with the bias of the logits where a file has it, whatever its `architectures` are."""
    return dataclasses.replace(config, head_bias="fixed" if "final_logits_bias" in names else "none")


def _keys(decoder_start_id: int) -> tuple[Key, ...]:
    """Return the keys that BART and Marian have in common."""
    return (
        Key("vocab_size", "vocab_size", int),
        Key("d_model", "hidden_size", int),
        Key("encoder_layers", "num_encoder_layers", int),
        Key("decoder_layers", "num_layers", int),
        Key("decoder_attention_heads", "attention.num_heads", int),
        Key("decoder_ffn_dim", "feed_forward.intermediate_size", int),
        Key("max_position_embeddings", "max_positions", int, 1024),
        Key("activation_function", "feed_forward.activation", Activation, "gelu"),
        Key("dropout", "dropout", float, 0.1),
        Key("attention_dropout", "attention.dropout", float, 0.0, argument="attention_dropout"),
        Key("activation_dropout", "feed_forward.dropout", float, 0.0, argument="activation_dropout"),
        Key("decoder_start_token_id", "decoder_start_id", int, decoder_start_id),
    )


BART = Family(
    name="bart",
    title="BART",
    label="a BART",
    objectives=("Denoising",),
    presets={"bart_base": _bart(6, 768, 12), "bart_large": _bart(12, 1024, 16)},
    architectures=("BartForConditionalGeneration", "BartModel"),
    keys=_keys(decoder_start_id=2),
    read=_read_bart,
    write=_write_bart,
    aliases={
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    },
    names=TensorNames(
        (
            *_weights(),
            *mappings(_EMBEDDING_ROWS, "encoder_", "model.encoder."),
            *mappings(_EMBEDDING_ROWS, theirs="model.decoder."),
        ),
        _TIED,
        # The version of the tool that trained the first releases.
        ignored=(r"model\.(encoder|decoder)\.version",),
    ),
    with_tensors=_with_tensors,
)
MARIAN = dataclasses.replace(
    BART,
    name="marian",
    title="Marian's Transformer",
    label="a Marian",
    objectives=("ParallelText",),
    # The sizes of opus-mt-en-de; every pair of languages has a different vocabulary.
    presets={
        "opus_mt_en_de": transformer(
            vocab_size=58_101,
            hidden_size=512,
            num_encoder_layers=6,
            num_layers=6,
            num_heads=8,
            intermediate_size=2048,
            max_positions=512,
            positions=SinusoidalPositions("halves"),
            decoder_start_id=58_100,
            scale_embedding=True,
            activation="silu",
            head_bias="fixed",
            never_written=(58_100,),
        )
    },
    architectures=("MarianMTModel", "MarianModel"),
    keys=_keys(decoder_start_id=58_100),
    read=_read_marian,
    write=_write_marian,
    harmless={"extra_pos_embeddings"},  # its sinusoids have no extra rows, whatever the first files have
    # Computed, not trained: the sinusoids.
    names=TensorNames(_weights(), _TIED, ignored=(r"model\.(encoder|decoder)\.embed_positions\.weight",)),
)
