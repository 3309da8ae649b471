"""BART (Lewis et al. 2020, arXiv 1910.13461).

A Transformer with GELU, learned positions whose table has two rows before the first, and a norm after the embeddings.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from llama_jax.models import EncoderDecoderConfig
from llama_jax.nn import MLP, GroupedQuery, LearnedPositions
from llama_jax.zoo import Weight
from llama_jax.zoo.reading import ConfigReader, checked, expect, read_activation, write_activation
from llama_jax.zoo.transformer import transformer

OFFSET = 2


def _preset(layers: int, width: int, heads: int) -> EncoderDecoderConfig:
    # The released configs' dropouts; the paper names none.
    return transformer(
        vocab_size=50_265,
        hidden_size=width,
        num_encoder_layers=layers,
        num_layers=layers,
        encoder_heads=heads,
        num_heads=heads,
        encoder_intermediate_size=4 * width,
        intermediate_size=4 * width,
        max_positions=1024,
        positions=LearnedPositions(1024, offset=OFFSET),
        decoder_start_id=2,
        scale_embedding=False,
        activation="gelu",
        embedding_norm=True,
        head_bias="fixed",
        dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.1,
    )


OBJECTIVES = ("Denoising",)
PRESETS = {"bart_base": _preset(6, 768, 12), "bart_large": _preset(12, 1024, 16)}


def weights() -> tuple[Weight, ...]:
    """The table, but for the tables of positions."""
    found = [Weight("embedding.weight", "model.shared.weight", "v d -> v d")]

    def both(ours: str, theirs: str, weight: str, bias: str = "d -> d") -> None:
        found.append(Weight(f"{ours}.weight", f"{theirs}.weight", weight))
        found.append(Weight(f"{ours}.bias", f"{theirs}.bias", bias))

    def attention(ours: str, theirs: str) -> None:
        for name in ("q_proj", "k_proj", "v_proj"):
            both(f"{ours}.{name}", f"{theirs}.{name}", "(n h) d -> d n h", "(n h) -> n h")
        both(f"{ours}.o_proj", f"{theirs}.out_proj", "d (n h) -> n h d")
        both(f"{ours}_norm", f"{theirs}_layer_norm", "d -> d")

    for ours, side in (("encoder_layers", "encoder"), ("layers", "decoder")):
        layer = f"model.{side}.layers." + "{layer}"
        attention(f"{ours}.attention", f"{layer}.self_attn")
        if side == "decoder":
            attention(f"{ours}.cross_attention", f"{layer}.encoder_attn")
        both(f"{ours}.feed_forward.up_proj", f"{layer}.fc1", "f d -> d f", "f -> f")
        both(f"{ours}.feed_forward.down_proj", f"{layer}.fc2", "d f -> f d")
        both(f"{ours}.feed_forward_norm", f"{layer}.final_layer_norm", "d -> d")
    return *found, Weight("head_bias.bias", "final_logits_bias", "1 v -> v")


WEIGHTS = (
    *weights(),
    *(
        Weight(f"{ours}{name}", f"model.{theirs}.{source}", "v d -> v d" if name == "positions.weight" else "d -> d")
        for ours, theirs in (("encoder_", "encoder"), ("", "decoder"))
        for name, source in (
            ("positions.weight", "embed_positions.weight"),
            ("embedding_norm.weight", "layernorm_embedding.weight"),
            ("embedding_norm.bias", "layernorm_embedding.bias"),
        )
    ),
)
# The version of the tool that trained the first releases.
IGNORED = (r"model\.(encoder|decoder)\.version",)
TIED = dict.fromkeys(
    ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"), "model.shared.weight"
)

_A_BART = "a Hugging Face BART"
ARCHITECTURES = ("BartForConditionalGeneration", "BartModel")
ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "encoder_attention_heads",
    "num_hidden_layers": "encoder_layers",
}


def read_shape(reader: ConfigReader) -> dict[str, Any]:
    """What BART and Marian have in common in their config.json, as arguments of `transformer`."""
    take = reader.take
    reader.only(
        is_encoder_decoder=True,
        is_decoder=False,
        tie_word_embeddings=True,
        normalize_before=False,
        add_final_layer_norm=False,
        add_bias_logits=False,
    )
    activation = read_activation(reader, "activation_function", "gelu")
    return {
        "vocab_size": take("vocab_size", int),
        "hidden_size": take("d_model", int),
        "num_encoder_layers": take("encoder_layers", int),
        "num_layers": take("decoder_layers", int),
        "encoder_heads": take("encoder_attention_heads", int),
        "num_heads": take("decoder_attention_heads", int),
        "encoder_intermediate_size": take("encoder_ffn_dim", int),
        "intermediate_size": take("decoder_ffn_dim", int),
        "max_positions": take("max_position_embeddings", int, 1024),
        "scale_embedding": take("scale_embedding", bool, False),
        "activation": activation,
        "dropout": take("dropout", float, 0.1),
        "attention_dropout": take("attention_dropout", float, 0.0),
        "activation_dropout": take("activation_dropout", float, 0.0),
    }


def from_hf(data: Mapping[str, Any]) -> EncoderDecoderConfig:
    """The model that a `config.json` of model_type `bart` describes.

    Raises UserError for a key that is missing, not known, or asks for something the model cannot do.
    """
    reader = ConfigReader(data, "a BART", ARCHITECTURES, aliases=ALIASES)
    reader.only(normalize_embedding=True, static_position_embeddings=False, extra_pos_embeddings=OFFSET)
    shape = read_shape(reader)
    start = reader.take("decoder_start_token_id", int, 2)
    reader.finish()
    return transformer(
        **shape,
        positions=LearnedPositions(shape["max_positions"], offset=OFFSET),
        decoder_start_id=start,
        embedding_norm=True,
        head_bias="none" if reader.architecture == "BartModel" else "fixed",
    )


def with_tensors(config: EncoderDecoderConfig, names: Collection[str]) -> EncoderDecoderConfig:
    """The config with the bias of the logits where a file has it, whatever its `architectures` say."""
    return dataclasses.replace(config, head_bias="fixed" if "final_logits_bias" in names else "none")


def write_shape(config: EncoderDecoderConfig, family: str) -> dict[str, Any]:
    """The keys that `read_shape` reads, and those that say the same in every such file."""
    config = expect(config, EncoderDecoderConfig, family)
    encoder, decoder = (pieces[0] for pieces in config.stacks().values())
    (own, inside), (of_encoder, inside_encoder) = (
        (expect(mixer, GroupedQuery, family), expect(feed_forward, MLP, family))
        for mixer, feed_forward in (decoder, encoder)
    )
    return {
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "encoder_layers": config.num_encoder_layers,
        "decoder_layers": config.num_layers,
        "encoder_attention_heads": of_encoder.num_heads,
        "decoder_attention_heads": own.num_heads,
        "encoder_ffn_dim": inside_encoder.intermediate_size,
        "decoder_ffn_dim": inside.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "scale_embedding": config.embedding_scale != 1,
        "activation_function": write_activation(inside.activation, family),
        "dropout": config.dropout,
        "attention_dropout": own.dropout,
        "activation_dropout": inside.dropout,
        "decoder_start_token_id": config.decoder_start_id,
        "tie_word_embeddings": True,
    }


def to_hf(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The `config.json` of a model, for Hugging Face's `BartForConditionalGeneration`, or its `BartModel`.

    Raises UserError for a model that is no BART, naming what it has that a BART cannot have.
    """
    shape = write_shape(config, _A_BART)
    kind = "BartForConditionalGeneration" if config.head_bias == "fixed" else "BartModel"
    data = {"architectures": [kind], "model_type": "bart", "pad_token_id": 1, "normalize_embedding": True, **shape}
    return checked(data, config, from_hf, _A_BART)
