"""BERT (Devlin et al. 2019, arXiv 1810.04805) and the encoders that are made like it, whole or with one head.

The presets are the encoder with its pooler, as the papers count it; heads are options of its config. RoBERTa (Liu et
al. 2019, arXiv 1907.11692) has no pairs of texts, its positions follow that of padding, and its classifier has a dense
layer in place of the pooler; XLM-RoBERTa (Conneau et al. 2020, arXiv 1911.02116) is one of a hundred languages.
DistilBERT (Sanh et al. 2019, arXiv 1910.01108) has neither token types nor a pooler, and names of its own.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

from llama_jax.config import Json, UserError
from llama_jax.models import EncoderConfig
from llama_jax.nn import MLP, Activation, GroupedQuery, LayerNorm, LearnedPositions
from llama_jax.zoo.reading import SIZES, ConfigReader, Key, expect
from llama_jax.zoo.registry import Family
from llama_jax.zoo.transformer import full_heads
from llama_jax.zoo.weights import TensorNames, WeightMapping, mappings


def encoder(
    *,
    hidden_size: int,
    num_heads: int,
    intermediate_size: int,
    max_positions: int,
    eps: float,
    offset: int = 0,
    activation: Activation = "gelu",
    dropout: float = 0.1,
    attention_dropout: float = 0.1,
    **fields: Any,
) -> EncoderConfig:
    """Return a model of these sizes, made as BERT is; `fields` are the others of `EncoderConfig`."""
    norm = LayerNorm(eps=eps, bias=True)
    return EncoderConfig(
        hidden_size=hidden_size,
        max_positions=max_positions,
        attention=GroupedQuery(
            rope=None, **full_heads(hidden_size, num_heads, "num_attention_heads", dropout=attention_dropout)
        ),
        feed_forward=MLP(intermediate_size=intermediate_size, activation=activation, bias=True),
        norm=norm,
        tie_embeddings=True,
        norm_placement="post",
        positions=LearnedPositions(num_positions=max_positions, offset=offset),
        embedding_norm=norm,
        dropout=dropout,
        **fields,
    )


_BASE = {"num_layers": 12, "hidden_size": 768, "num_heads": 12, "intermediate_size": 3072}
_LARGE = {"num_layers": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096}
_BERT = {"vocab_size": 30_522, "max_positions": 512, "num_token_types": 2, "eps": 1e-12, "pooler": True}
_ROBERTA = {"vocab_size": 50_265, "max_positions": 512, "num_token_types": 1, "eps": 1e-5, "offset": 2, "pooler": True}

# The parts of each class in addition to embeddings and blocks, as fields of `EncoderConfig`.
_HEADS: dict[str, Json] = {
    "Model": {"pooler": True},
    "ForPreTraining": {"pooler": True, "head_transform": "gelu", "head_bias": "trained", "pair_head": True},
    "ForMaskedLM": {"head_transform": "gelu", "head_bias": "trained"},
    "ForSequenceClassification": {"pooler": True, "num_classes": 2},
}


# Patterns of the weight and the bias of each layer of a block.
_BLOCK = {
    **dict.fromkeys(("attention.q_proj", "attention.k_proj", "attention.v_proj"), ("(n h) d -> d n h", "(n h) -> n h")),
    "attention.o_proj": ("d (n h) -> n h d", "d -> d"),
    "attention_norm": ("d -> d", "d -> d"),
    "feed_forward.up_proj": ("f d -> d f", "f -> f"),
    "feed_forward.down_proj": ("d f -> f d", "d -> d"),
    "feed_forward_norm": ("d -> d", "d -> d"),
}
# In that order, below the encoder's name.
_BERT_BLOCK = (
    "encoder.layer.{layer}.",
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    *("attention.output.dense", "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"),
)
_DISTILBERT_BLOCK = (
    "transformer.layer.{layer}.",
    *(f"attention.{name}_lin" for name in ("q", "k", "v", "out")),
    *("sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"),
)


def _weights(
    prefix: str, heads: Mapping[str, str], head_bias: str, block: tuple[str, ...] = _BERT_BLOCK
) -> tuple[WeightMapping, ...]:
    """Return the table of a family whose encoder's names begin with `prefix`.

    `heads` are the layers of heads, `head_bias` the tensor of that name, `block` the names of a block's layers.
    """
    tables = {"embedding": "word", "token_type_embedding": "token_type", "positions": "position"}
    rows = {name: (f"embeddings.{table}_embeddings", "v d -> v d") for name, table in tables.items()}
    beginning, *names = block
    layers = {name: (source, *patterns) for source, (name, patterns) in zip(names, _BLOCK.items(), strict=True)}
    outside = {
        "embedding_norm": ("embeddings.LayerNorm", "d -> d", "d -> d"),
        "pooler": ("pooler.dense", "f d -> d f", "f -> f"),
    }
    own = {
        name: (source, "d -> d" if name.endswith("norm") else "f d -> d f", "d -> d") for name, source in heads.items()
    }
    return (
        *mappings(rows | outside, theirs=prefix),
        *mappings(layers, "layers.", prefix + beginning),
        *mappings(own),
        WeightMapping("head_bias.bias", head_bias, "d -> d"),
    )


_BERT_NAMES = TensorNames(
    _weights(
        "bert.",
        {
            "head_transform.dense": "cls.predictions.transform.dense",
            "head_transform.norm": "cls.predictions.transform.LayerNorm",
            "pair_head": "cls.seq_relationship",
            "classifier": "classifier",
        },
        "cls.predictions.bias",
    ),
    tied={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    # The first files have TensorFlow's names.
    renames=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
)
_ROBERTA_NAMES = TensorNames(
    _weights(
        "roberta.",
        {
            "head_transform.dense": "lm_head.dense",
            "head_transform.norm": "lm_head.layer_norm",
            "classifier_dense": "classifier.dense",
            "classifier": "classifier.out_proj",
        },
        "lm_head.bias",
    ),
    tied={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
)
_DISTILBERT_NAMES = TensorNames(
    _weights(
        "distilbert.",
        {
            "head_transform.dense": "vocab_transform",
            "head_transform.norm": "vocab_layer_norm",
            "classifier_dense": "pre_classifier",
            "classifier": "classifier",
        },
        "vocab_projector.bias",
        _DISTILBERT_BLOCK,
    ),
    tied={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
)


def _read_heads(reader: ConfigReader) -> Json:
    """Return the fields of the heads of the file's class. Raises UserError for parts that no model here has."""
    reader.only(
        position_embedding_type="absolute",
        is_decoder=False,
        add_cross_attention=False,
        tie_word_embeddings=True,
        directionality="bidi",
        pooler_type="first_token_transform",
    )
    heads = dict(next(fields for kind, fields in _HEADS.items() if reader.architecture.endswith(kind)))
    rate, labels = reader.take("classifier_dropout", float, None), reader.take("num_labels", int, None)
    if "num_classes" in heads:
        heads["num_classes"] = labels or len(reader.data.get("id2label") or ()) or 2
        heads["classifier_dropout"] = rate
    return heads


def _read_bert(reader: ConfigReader, fields: Json) -> EncoderConfig:
    heads = _read_heads(reader)
    if "head_transform" in heads:
        heads["head_transform"] = fields["activation"]
    return encoder(**fields, **heads, max_positions=reader.take("max_position_embeddings", int, 512))


def _read_roberta(reader: ConfigReader, fields: Json) -> EncoderConfig:
    heads = _read_heads(reader)
    if "num_classes" in heads:
        heads |= {"pooler": False, "classifier": "dense"}
    pad, rows = reader.data.get("pad_token_id", 1), reader.take("max_position_embeddings", int, 512)
    if not isinstance(pad, int) or not 0 <= pad < rows - 1:
        raise UserError(f"config.json has pad_token_id={pad!r}, behind which a RoBERTa's positions begin")
    return encoder(**fields, **heads, max_positions=rows - pad - 1, offset=pad + 1)


def _read_distilbert(reader: ConfigReader, fields: Json) -> EncoderConfig:
    reader.only(tie_weights_=True)
    heads: Json = _read_heads(reader) | {"pooler": False}
    rate = reader.take("seq_classif_dropout", float, 0.2)
    if "num_classes" in heads:
        heads |= {"classifier": "relu_dense", "classifier_dropout": rate}
    if "head_transform" in heads:
        heads["head_transform"] = fields["activation"]
    return encoder(**fields, **heads, eps=1e-12, max_positions=reader.take("max_position_embeddings", int, 512))


def _kind(config: EncoderConfig) -> str:
    """Return the class with the heads of a config, without its family's name."""
    if config.num_classes:
        return "ForSequenceClassification"
    if config.head_transform is None:
        return "Model"
    return "ForPreTraining" if config.pair_head else "ForMaskedLM"


def _write(config: EncoderConfig, label: str, family: str) -> Json:
    positions = expect(config.positions, LearnedPositions, label=label)
    data = {
        "architectures": [family + _kind(config)],
        "max_position_embeddings": positions.num_positions + positions.offset,
        "pad_token_id": max(positions.offset - 1, 0),
    }
    if config.num_classes:
        names = {str(i): f"LABEL_{i}" for i in range(config.num_classes)}
        data |= {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
        data["classifier_dropout"] = config.classifier_dropout
    return data


def _write_distilbert(config: EncoderConfig, label: str) -> Json:
    data = _write(config, label, "DistilBert")
    return data | {"seq_classif_dropout": data.pop("classifier_dropout", 0.2)}


def _released(config: EncoderConfig) -> EncoderConfig:
    """Return the config without a pooler that its class does not imply; the file's tensors show it."""
    implied = _kind(config) in ("Model", "ForPreTraining") or (config.num_classes and config.classifier == "pooler")
    return config if implied else dataclasses.replace(config, pooler=False)


def _with_tensors(config: EncoderConfig, names: Collection[str]) -> EncoderConfig:
    """Return the config with the pooler and the pair head of a file, whatever its `architectures` are.

    Released files name only one use of them. A head that needs the pooler keeps it.
    """
    pair_head = config.pair_head or "cls.seq_relationship.weight" in names
    needed = pair_head or (config.num_classes > 0 and config.classifier == "pooler")
    pooler = needed or any(f"{prefix}.pooler.dense.weight" in names for prefix in ("bert", "roberta"))
    return dataclasses.replace(config, pooler=pooler, pair_head=pair_head)


BERT = Family(
    name="bert",
    title="BERT",
    label="a BERT",
    objectives=("MaskedLM",),
    presets={"bert_base": encoder(**_BASE, **_BERT), "bert_large": encoder(**_LARGE, **_BERT)},
    architectures=tuple(
        f"Bert{kind}" for kind in ("ForPreTraining", "ForMaskedLM", "Model", "ForSequenceClassification")
    ),
    keys=(
        *SIZES,
        Key("intermediate_size", "feed_forward.intermediate_size", int),
        Key("hidden_act", "feed_forward.activation", Activation, "gelu"),
        Key("hidden_dropout_prob", "dropout", float, 0.1),
        Key("attention_probs_dropout_prob", "attention.dropout", float, 0.1, argument="attention_dropout"),
        Key("type_vocab_size", "num_token_types", int, 2),
        Key("layer_norm_eps", "norm.eps", float, 1e-12),
    ),
    read=_read_bert,
    write=functools.partial(_write, family="Bert"),
    names=_BERT_NAMES,
    released=_released,
    with_tensors=_with_tensors,
)
ROBERTA = dataclasses.replace(
    BERT,
    name="roberta",
    title="RoBERTa",
    label="a RoBERTa",
    presets={"roberta_base": encoder(**_BASE, **_ROBERTA), "roberta_large": encoder(**_LARGE, **_ROBERTA)},
    architectures=("RobertaModel", "RobertaForMaskedLM", "RobertaForSequenceClassification"),
    read=_read_roberta,
    write=functools.partial(_write, family="Roberta"),
    names=_ROBERTA_NAMES,
)
_XLM_ROBERTA: Json = _ROBERTA | {"vocab_size": 250_002}
XLM_ROBERTA = dataclasses.replace(
    ROBERTA,
    name="xlm-roberta",
    title="XLM-RoBERTa",
    label="an XLM-RoBERTa",
    presets={
        "xlm_roberta_base": encoder(**_BASE, **_XLM_ROBERTA),
        "xlm_roberta_large": encoder(**_LARGE, **_XLM_ROBERTA),
    },
    architectures=tuple(name.replace("Roberta", "XLMRoberta") for name in ROBERTA.architectures),
    write=functools.partial(_write, family="XLMRoberta"),
)
_DISTILBERT = {"vocab_size": 30_522, "max_positions": 512, "eps": 1e-12, **_BASE, "num_layers": 6}
DISTILBERT = dataclasses.replace(
    BERT,
    name="distilbert",
    title="DistilBERT",
    label="a DistilBERT",
    presets={"distilbert_base": encoder(**_DISTILBERT)},
    architectures=tuple(f"DistilBert{kind}" for kind in ("Model", "ForMaskedLM", "ForSequenceClassification")),
    keys=(
        Key("vocab_size", "vocab_size", int),
        Key("dim", "hidden_size", int),
        Key("n_layers", "num_layers", int),
        Key("n_heads", "attention.num_heads", int),
        Key("hidden_dim", "feed_forward.intermediate_size", int),
        Key("activation", "feed_forward.activation", Activation, "gelu"),
        Key("dropout", "dropout", float, 0.1),
        Key("attention_dropout", "attention.dropout", float, 0.1, argument="attention_dropout"),
    ),
    read=_read_distilbert,
    write=_write_distilbert,
    aliases={"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"},
    harmless={"sinusoidal_pos_embds"},  # they are in the file's table of positions, like trained ones
    names=_DISTILBERT_NAMES,
    released=None,
    with_tensors=None,
)
