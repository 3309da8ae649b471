"""BERT and RoBERTa: exact sizes, every head by its architecture, nothing of a config.json ignored."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_jax import zoo
from llama_jax.checkpoint import LanguageModel, load, load_params, open_source, save
from llama_jax.config import UserError
from llama_jax.models import Compute, abstract_params, from_params, num_parameters
from llama_jax.nn import LayerNorm, RMSNorm

bert = zoo.family("bert")
roberta = zoo.family("roberta")

GOLDENS = Path(__file__).parent.parent / "parity" / "goldens"
COUNTS = {
    "bert_base": 109_482_240,
    "bert_large": 335_141_888,
    "roberta_base": 124_645_632,
    "roberta_large": 355_359_744,
}
FAMILIES = {"Bert": bert, "Roberta": roberta}
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 48,
}  # fmt: skip


def config_json(name: str, kind: str = "Model", **changes: Any) -> dict[str, Any]:
    own = {"pad_token_id": 0, "type_vocab_size": 2} if name == "Bert" else {"pad_token_id": 1, "type_vocab_size": 1}
    return {"architectures": [name + kind], "model_type": name.lower(), **SIZES, **own, **changes}


def test_presets_have_the_published_number_of_parameters():
    assert {name: num_parameters(zoo.presets()[name]) for name in COUNTS} == COUNTS
    assert set(bert.presets) | set(roberta.presets) == set(COUNTS)


def test_presets_survive_hugging_face_s_config():
    for family in FAMILIES.values():
        for config in family.presets.values():
            data = family.to_hf(config)
            assert json.loads(json.dumps(data)) == data
            assert family.from_hf(data) == config


@pytest.mark.parametrize(
    ("name", "kind", "heads"),
    [
        ("Bert", "Model", {"pooler": True}),
        ("Bert", "ForMaskedLM", {"head_transform": "relu", "head_bias": "trained"}),
        (
            "Bert",
            "ForPreTraining",
            {"pooler": True, "pair_head": True, "head_transform": "relu", "head_bias": "trained"},
        ),
        ("Bert", "ForSequenceClassification", {"pooler": True, "num_classes": 4, "classifier_dropout": 0.25}),
        ("Roberta", "Model", {"pooler": True}),
        # Its head has GELU whatever the feed-forwards have.
        ("Roberta", "ForMaskedLM", {"head_transform": "gelu", "head_bias": "trained"}),
        ("Roberta", "ForSequenceClassification", {"num_classes": 4, "classifier": "dense", "classifier_dropout": 0.25}),
    ],
)
def test_heads_are_those_of_the_architecture(name: str, kind: str, heads: dict[str, Any]):
    labels = {str(i): word for i, word in enumerate("abcd")} if "num_classes" in heads else None
    rate = heads.get("classifier_dropout")
    data = config_json(name, kind, hidden_act="relu", id2label=labels, classifier_dropout=rate)
    config = FAMILIES[name].from_hf(data)
    none = {
        "pooler": False, "pair_head": False, "head_transform": None, "head_bias": "none", "num_classes": 0,
        "classifier": "pooler", "classifier_dropout": None,
    }  # fmt: skip
    assert {key: getattr(config, key) for key in none} == none | heads
    assert config.feed_forward.activation == "relu"
    assert FAMILIES[name].from_hf(FAMILIES[name].to_hf(config)) == config


def test_positions_begin_behind_padding_in_roberta_alone():
    of_bert, of_roberta = (FAMILIES[name].from_hf(config_json(name)) for name in FAMILIES)
    assert (of_bert.max_positions, of_bert.positions.offset) == (48, 0)
    assert (of_roberta.max_positions, of_roberta.positions.offset) == (46, 2)
    moved = roberta.from_hf(config_json("Roberta", pad_token_id=3))
    assert (moved.max_positions, moved.positions.offset) == (44, 4)
    assert roberta.to_hf(moved)["max_position_embeddings"] == 48


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
        ({"new_option": 3}, "new_option=3"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"hidden_dropout_prob": "much"}, "hidden_dropout_prob='much'"),
        ({"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification"),
        ({"vocab_size": None}, "lacks 'vocab_size'"),
    ],
)
def test_what_is_not_supported_is_named(name: str, change: dict[str, Any], named: str):
    with pytest.raises(UserError, match=named):
        FAMILIES[name].from_hf(config_json(name) | change)


def test_what_a_classifier_was_trained_on_changes_no_logit():
    data = config_json("Bert", "ForSequenceClassification", id2label={"0": "similar"})
    assert bert.from_hf(data | {"problem_type": "regression"}) == bert.from_hf(data)
    with pytest.raises(UserError, match=r"RobertaForPreTraining.*for a RoBERTa"):
        roberta.from_hf(config_json("Roberta", "ForPreTraining"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"norm": RMSNorm(1e-6)}, "LayerNorm, and this model RMSNorm"),
        ({"embedding_norm": None}, "embedding_norm=None"),
        ({"norm": LayerNorm(1e-6, True)}, r"embedding_norm\.eps="),
        ({"norm_placement": "pre"}, "norm_placement=pre"),
        ({"pooler": False}, "pooler=False"),
        ({"tie_embeddings": False}, "tie_embeddings=False"),
        ({"num_classes": 3, "pair_head": True}, "pair_head=True"),
    ],
)
def test_what_no_bert_has_is_not_exported(change: dict[str, Any], named: str):
    config = dataclasses.replace(bert.from_hf(config_json("Bert")), **change)
    with pytest.raises(UserError, match=named):
        bert.to_hf(config)


@pytest.mark.quick("Bert")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_pooler_beside_a_head_is_kept(name: str, random_params, tmp_path):
    """As in the first releases, whose config.json speaks of the masked-token head alone."""
    family = FAMILIES[name]
    config = dataclasses.replace(family.from_hf(config_json(name, "ForMaskedLM")), pooler=True)
    lm = load(_saved(config, random_params(config), tmp_path / "first", name.lower()), dtype="float32")
    assert lm.config == config
    written = open_source(tmp_path / "first")
    assert written.model_type == name.lower()
    assert set(load_params(written, abstract_params(config))) == set(abstract_params(config))


def _saved(config: Any, params: Any, folder: Any, model_type: str) -> Any:
    save(
        LanguageModel(config, from_params(config, params, Compute()), None, model_type),
        folder,
        format="hf",
    )
    return folder


@pytest.mark.parametrize("name", ["bert_classifier", "roberta_classifier"])
def test_a_classifier_answers_with_its_classes(name: str):
    golden = dict(np.load(GOLDENS / name / "expected.npz"))
    others = {key: golden[key] for key in ("mask", "token_types") if key in golden}
    logits = load(GOLDENS / name, dtype="float32").model(golden["ids"], **others)
    assert logits.shape == golden["class_logits"].shape
    np.testing.assert_allclose(logits, golden["class_logits"], atol=5e-5)
