"""BERT (Devlin et al. 2019, arXiv 1810.04805), whole or with one of its heads.

`PRESETS` are the encoder with its pooler, as the paper counts it; heads are options of its config.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from llama_jax.config import UserError
from llama_jax.models import EncoderConfig
from llama_jax.nn import MLP, Activation, GroupedQuery, LayerNorm, LearnedPositions
from llama_jax.zoo import Weight
from llama_jax.zoo.reading import ConfigReader, checked, expect, read_activation, write_activation

# What each architecture has beside embeddings and blocks.
_HEADS: dict[str, dict[str, Any]] = {
    "Model": {"pooler": True},
    "ForPreTraining": {"pooler": True, "head_transform": "gelu", "head_bias": "trained", "pair_head": True},
    "ForMaskedLM": {"head_transform": "gelu", "head_bias": "trained"},
    "ForSequenceClassification": {"pooler": True, "num_classes": 2},
}


def encoder(
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    intermediate_size: int,
    max_positions: int,
    num_token_types: int,
    eps: float,
    offset: int = 0,
    activation: Activation = "gelu",
    dropout: float = 0.1,
    attention_dropout: float = 0.1,
    **heads: Any,
) -> EncoderConfig:
    """A model of these sizes, made as BERT is; `heads` are fields of `EncoderConfig`."""
    if num_heads < 1 or hidden_size % num_heads:
        raise UserError(f"hidden_size={hidden_size} is not divisible by num_attention_heads={num_heads}")
    norm = LayerNorm(eps=eps, bias=True)
    return EncoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        max_positions=max_positions,
        attention=GroupedQuery(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=hidden_size // num_heads,
            rope=None,
            qkv_bias=True,
            out_bias=True,
            dropout=attention_dropout,
        ),
        feed_forward=MLP(intermediate_size=intermediate_size, activation=activation, bias=True),
        norm=norm,
        tie_embeddings=True,
        norm_placement="post",
        positions=LearnedPositions(num_positions=max_positions, offset=offset),
        embedding_norm=norm,
        dropout=dropout,
        num_token_types=num_token_types,
        **heads,
    )


BASE = {"num_layers": 12, "hidden_size": 768, "num_heads": 12, "intermediate_size": 3072}
LARGE = {"num_layers": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096}
_BERT = {"vocab_size": 30_522, "max_positions": 512, "num_token_types": 2, "eps": 1e-12, "pooler": True}
OBJECTIVES = ("MaskedLM",)
PRESETS = {"bert_base": encoder(**BASE, **_BERT), "bert_large": encoder(**LARGE, **_BERT)}


def weights(prefix: str, heads: Mapping[str, str]) -> tuple[Weight, ...]:
    """The table of a family whose encoder's names begin with `prefix`; `heads` are the names of its heads' layers."""
    norms = {
        "embedding_norm": "embeddings.LayerNorm",
        "layers.attention_norm": "encoder.layer.{layer}.attention.output.LayerNorm",
        "layers.feed_forward_norm": "encoder.layer.{layer}.output.LayerNorm",
    }
    own, attention = "layers.attention.", "encoder.layer.{layer}.attention."
    layers = {
        f"{own}q_proj": (attention + "self.query", "(n h) d -> d n h", "(n h) -> n h"),
        f"{own}k_proj": (attention + "self.key", "(k h) d -> d k h", "(k h) -> k h"),
        f"{own}v_proj": (attention + "self.value", "(k h) d -> d k h", "(k h) -> k h"),
        f"{own}o_proj": (attention + "output.dense", "d (n h) -> n h d", "d -> d"),
        "layers.feed_forward.up_proj": ("encoder.layer.{layer}.intermediate.dense", "f d -> d f", "f -> f"),
        "layers.feed_forward.down_proj": ("encoder.layer.{layer}.output.dense", "d f -> f d", "d -> d"),
        "pooler": ("pooler.dense", "f d -> d f", "f -> f"),
    }
    tables = {"embedding": "word", "token_type_embedding": "token_type", "positions": "position"}
    found = [
        Weight(f"{k}.weight", f"{prefix}embeddings.{v}_embeddings.weight", "v d -> v d") for k, v in tables.items()
    ]
    for name, source in norms.items():
        found += [Weight(f"{name}.{part}", f"{prefix}{source}.{part}", "d -> d") for part in ("weight", "bias")]
    for name, (source, weight, bias) in layers.items():
        found.append(Weight(f"{name}.weight", f"{prefix}{source}.weight", weight))
        found.append(Weight(f"{name}.bias", f"{prefix}{source}.bias", bias))
    for name, source in heads.items():
        if name != "head_bias":
            pattern = "d -> d" if name.endswith("norm") else "f d -> d f"
            found.append(Weight(f"{name}.weight", f"{source}.weight", pattern))
        found.append(Weight(f"{name}.bias", f"{source}.bias", "d -> d"))
    return tuple(found)


WEIGHTS = weights(
    "bert.",
    {
        "head_transform.dense": "cls.predictions.transform.dense",
        "head_transform.norm": "cls.predictions.transform.LayerNorm",
        "head_bias": "cls.predictions",
        "pair_head": "cls.seq_relationship",
        "classifier": "classifier",
    },
)
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
# The first files have TensorFlow's names.
RENAMES = (
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
)

_A_BERT = "a Hugging Face BERT"
ARCHITECTURES = tuple(f"Bert{kind}" for kind in ("ForPreTraining", "ForMaskedLM", "Model", "ForSequenceClassification"))


def from_hf(data: Mapping[str, Any]) -> EncoderConfig:
    """The model that a `config.json` of model_type `bert` describes; its heads are those of its `architectures`.

    Raises UserError for a key that is missing, not known, or asks for something the model cannot do.
    """
    reader = ConfigReader(data, "a BERT", ARCHITECTURES)
    activation = read_activation(reader, "hidden_act", "gelu")
    heads = read_heads(data, reader, "Bert")
    if "head_transform" in heads:
        heads["head_transform"] = activation
    fields = read_sizes(reader, eps=1e-12)
    max_positions = reader.take("max_position_embeddings", int, 512)
    reader.finish()
    return encoder(**fields, **heads, activation=activation, max_positions=max_positions)


def with_tensors(config: EncoderConfig, names: Collection[str]) -> EncoderConfig:
    """The config with the parts that a file has beyond its `architectures`: released ones name only one use of it."""
    pair_head = config.pair_head or "cls.seq_relationship.weight" in names
    return dataclasses.replace(config, pooler=with_pooler(config, pair_head, "bert.", names), pair_head=pair_head)


def to_hf(config: EncoderConfig) -> dict[str, Any]:
    """The `config.json` of a model, for the class of Hugging Face's that has its heads.

    Raises UserError for a model that is no BERT, naming what it has that a BERT cannot have.
    """
    data = write_config(config, "bert", "Bert", _A_BERT)
    return checked(data, as_read(config, data), from_hf, _A_BERT)


def with_pooler(config: EncoderConfig, pair_head: bool, prefix: str, names: Collection[str]) -> bool:
    """Whether there is a pooler: where a file has one, whatever its `architectures` say, and where a head needs it."""
    needed = pair_head or (config.num_classes > 0 and config.classifier == "pooler")
    return needed or f"{prefix}pooler.dense.weight" in names


def read_heads(data: Mapping[str, Any], reader: ConfigReader, family: str) -> dict[str, Any]:
    """Fields of the heads of `architectures`, whose names begin with `family`."""
    heads = dict(_HEADS[reader.architecture.removeprefix(family)])
    rate, labels = reader.take("classifier_dropout", float, None), reader.take("num_labels", int, None)
    if "num_classes" in heads:
        heads["num_classes"] = labels or len(data.get("id2label") or ()) or 2
        heads["classifier_dropout"] = rate
    return heads


def read_sizes(reader: ConfigReader, *, eps: float) -> dict[str, Any]:
    """The arguments of `encoder` that are the same for all; raises UserError for what no model here can do."""
    take = reader.take
    reader.only(
        position_embedding_type="absolute",
        is_decoder=False,
        add_cross_attention=False,
        tie_word_embeddings=True,
        directionality="bidi",
        pooler_type="first_token_transform",
    )
    return {
        "vocab_size": take("vocab_size", int),
        "hidden_size": take("hidden_size", int),
        "num_layers": take("num_hidden_layers", int),
        "num_heads": take("num_attention_heads", int),
        "intermediate_size": take("intermediate_size", int),
        "num_token_types": take("type_vocab_size", int, 2),
        "eps": take("layer_norm_eps", float, eps),
        "dropout": take("hidden_dropout_prob", float, 0.1),
        "attention_dropout": take("attention_probs_dropout_prob", float, 0.1),
    }


def write_config(config: EncoderConfig, model_type: str, family: str, kind: str) -> dict[str, Any]:
    """What `read_sizes` and its like read. Raises UserError where a piece is not that of `kind`."""
    config = expect(config, EncoderConfig, kind)
    attention = expect(config.attention, GroupedQuery, kind)
    feed_forward, norm = expect(config.feed_forward, MLP, kind), expect(config.norm, LayerNorm, kind)
    positions = expect(config.positions, LearnedPositions, kind)
    architecture = "ForPreTraining" if config.pair_head else "ForMaskedLM"
    if config.num_classes:
        architecture = "ForSequenceClassification"
    elif config.head_transform is None:
        architecture = "Model"
    data = {
        "architectures": [family + architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "intermediate_size": feed_forward.intermediate_size,
        "hidden_act": write_activation(feed_forward.activation, kind),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": attention.dropout,
        "max_position_embeddings": positions.num_positions + positions.offset,
        "type_vocab_size": config.num_token_types,
        "layer_norm_eps": norm.eps,
        "pad_token_id": max(positions.offset - 1, 0),
    }
    if config.num_classes:
        names = {str(i): f"LABEL_{i}" for i in range(config.num_classes)}
        data |= {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
        data["classifier_dropout"] = config.classifier_dropout
    return data


def as_read(config: EncoderConfig, data: Mapping[str, Any]) -> EncoderConfig:
    """`config` without a pooler that its architecture does not speak of, but its file may have."""
    spoken_of = any(name.endswith(("Model", "ForPreTraining")) for name in data["architectures"])
    spoken_of |= bool(config.num_classes) and config.classifier == "pooler"
    return config if spoken_of else dataclasses.replace(config, pooler=False)
