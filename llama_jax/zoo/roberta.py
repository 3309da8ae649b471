"""RoBERTa (Liu et al. 2019, arXiv 1907.11692): BERT without pairs, its positions behind that of padding.

Its classifier has a dense layer of its own in place of the pooler.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from llama_jax.config import UserError
from llama_jax.models import EncoderConfig
from llama_jax.nn import LearnedPositions
from llama_jax.zoo.bert import (
    BASE,
    LARGE,
    as_read,
    encoder,
    read_heads,
    read_sizes,
    weights,
    with_pooler,
    write_config,
)
from llama_jax.zoo.reading import ConfigReader, checked, read_activation

_ROBERTA = {"vocab_size": 50_265, "max_positions": 512, "num_token_types": 1, "eps": 1e-5, "offset": 2, "pooler": True}
OBJECTIVES = ("MaskedLM",)
PRESETS = {"roberta_base": encoder(**BASE, **_ROBERTA), "roberta_large": encoder(**LARGE, **_ROBERTA)}

WEIGHTS = weights(
    "roberta.",
    {
        "head_transform.dense": "lm_head.dense",
        "head_transform.norm": "lm_head.layer_norm",
        "head_bias": "lm_head",
        "classifier_dense": "classifier.dense",
        "classifier": "classifier.out_proj",
    },
)
TIED = {"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.bias": "lm_head.bias"}

_A_ROBERTA = "a Hugging Face RoBERTa"
ARCHITECTURES = ("RobertaModel", "RobertaForMaskedLM", "RobertaForSequenceClassification")


def from_hf(data: Mapping[str, Any]) -> EncoderConfig:
    """The model that a `config.json` of model_type `roberta` describes; its heads are those of its `architectures`.

    Raises UserError for a key that is missing, not known, or asks for something the model cannot do.
    """
    reader = ConfigReader(data, "a RoBERTa", ARCHITECTURES)
    activation = read_activation(reader, "hidden_act", "gelu")
    heads = read_heads(data, reader, "Roberta")
    if "num_classes" in heads:
        heads |= {"pooler": False, "classifier": "dense"}
    fields = read_sizes(reader, eps=1e-12)
    pad, rows = data.get("pad_token_id", 1), reader.take("max_position_embeddings", int, 512)
    if not isinstance(pad, int) or not 0 <= pad < rows - 1:
        raise UserError(f"config.json has pad_token_id={pad!r}, behind which a RoBERTa's positions begin")
    reader.finish()
    return encoder(**fields, **heads, activation=activation, max_positions=rows - pad - 1, offset=pad + 1)


def with_tensors(config: EncoderConfig, names: Collection[str]) -> EncoderConfig:
    """The config with the pooler, where a file has one that its `architectures` do not speak of."""
    return dataclasses.replace(config, pooler=with_pooler(config, False, "roberta.", names))


def to_hf(config: EncoderConfig) -> dict[str, Any]:
    """The `config.json` of a model, for the class of Hugging Face's that has its heads.

    Raises UserError for a model that is no RoBERTa, naming what it has that a RoBERTa cannot have.
    """
    data = write_config(config, "roberta", "Roberta", _A_ROBERTA)
    if isinstance(config.positions, LearnedPositions) and config.positions.offset < 1:
        raise UserError(f"positions.offset={config.positions.offset} has no place in {_A_ROBERTA}")
    return checked(data, as_read(config, data), from_hf, _A_ROBERTA)
