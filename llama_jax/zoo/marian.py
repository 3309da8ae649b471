"""Marian's Transformer (Junczys-Dowmunt et al. 2018, arXiv 1804.00344), of the OPUS-MT translation models.

The paper's Transformer with swish, and with sinusoids that are not interleaved: all sines, then all cosines. Padding,
which no text was trained with, begins a translation and has a logit of 0: it is never written.
"""

from collections.abc import Collection, Mapping
from typing import Any

from llama_jax.config import UserError
from llama_jax.models import EncoderDecoderConfig
from llama_jax.nn import SinusoidalPositions
from llama_jax.zoo import bart
from llama_jax.zoo.reading import ConfigReader, checked
from llama_jax.zoo.transformer import transformer

OBJECTIVES = ("ParallelText",)
# The sizes of opus-mt-en-de; every pair of languages has a vocabulary of its own.
PRESETS = {
    "opus_mt_en_de": transformer(
        vocab_size=58_101,
        hidden_size=512,
        num_encoder_layers=6,
        num_layers=6,
        encoder_heads=8,
        num_heads=8,
        encoder_intermediate_size=2048,
        intermediate_size=2048,
        max_positions=512,
        positions=SinusoidalPositions("halves"),
        decoder_start_id=58_100,
        scale_embedding=True,
        activation="silu",
        head_bias="fixed",
        never_written=(58_100,),
    )
}

WEIGHTS = bart.weights()
# Computed, not trained: the sinusoids.
IGNORED = (r"model\.(encoder|decoder)\.embed_positions\.weight",)
TIED = bart.TIED

_A_MARIAN = "a Hugging Face Marian"
ARCHITECTURES = ("MarianMTModel", "MarianModel")


def from_hf(data: Mapping[str, Any]) -> EncoderDecoderConfig:
    """The model that a `config.json` of model_type `marian` describes.

    Raises UserError for a key that is missing, not known, or asks for something the model cannot do.
    """
    # Its sinusoids have no extra rows, whatever the first files say of them.
    harmless = {"extra_pos_embeddings"}
    reader = ConfigReader(data, "a Marian", ARCHITECTURES, aliases=bart.ALIASES, harmless=harmless)
    reader.only(static_position_embeddings=True, normalize_embedding=False, share_encoder_decoder_embeddings=True)
    shape = bart.read_shape(reader)
    reader.only(decoder_vocab_size=shape["vocab_size"])
    start = reader.take("decoder_start_token_id", int, 58_100)
    if data.get("pad_token_id", start) != start:
        raise UserError(
            f"config.json has pad_token_id={data['pad_token_id']!r} and decoder_start_token_id={start}, and a Marian's "
            "are the same"
        )
    reader.finish()
    return transformer(
        **shape,
        positions=SinusoidalPositions("halves"),
        decoder_start_id=start,
        head_bias="none" if reader.architecture == "MarianModel" else "fixed",
        never_written=(start,),
    )


def with_tensors(config: EncoderDecoderConfig, names: Collection[str]) -> EncoderDecoderConfig:
    """The config with the bias of the logits where a file has it, whatever its `architectures` say."""
    return bart.with_tensors(config, names)


def to_hf(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The `config.json` of a model, for Hugging Face's `MarianMTModel`, or its `MarianModel`.

    Raises UserError for a model that is no Marian, naming what it has that a Marian cannot have.
    """
    shape = bart.write_shape(config, _A_MARIAN)
    data = {
        "architectures": ["MarianMTModel" if config.head_bias == "fixed" else "MarianModel"],
        "model_type": "marian",
        "static_position_embeddings": True,
        "normalize_embedding": False,
        "share_encoder_decoder_embeddings": True,
        "pad_token_id": config.decoder_start_id,
        "bad_words_ids": [[config.decoder_start_id]],
        **shape,
    }
    return checked(data, config, from_hf, _A_MARIAN)
