"""DistilBERT, XLM-RoBERTa, ModernBERT and mT5: exact sizes, spellings of a config.json, packing, what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax import zoo
from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError
from llama_jax.data.objectives import Document, SpanCorruption, Vocabulary
from llama_jax.models import num_parameters
from llama_jax.nn import MLP, LayerNorm, Rope
from llama_jax.tokenizers import load_tokenizer
from llama_jax.zoo.layers import FULL, SLIDING

TESTS = Path(__file__).parent.parent
GOLDENS, DIRECTORIES = TESTS / "parity" / "goldens", TESTS / "directories" / "goldens"
# Of transformers' own models with the released configs; of mT5 with the head, which is not tied.
COUNTS = {
    "distilbert_base": 66_362_880,
    "xlm_roberta_base": 278_043_648,
    "xlm_roberta_large": 559_890_432,
    "modernbert_base": 149_014_272,
    "modernbert_large": 394_781_696,
    "mt5_small": 300_176_768,
    "mt5_base": 582_401_280,
    "mt5_large": 1_229_581_312,
    "mt5_xl": 3_742_619_648,
    "mt5_xxl": 12_921_057_280,
}
FAMILIES = {name: zoo.family(name) for name in ("distilbert", "xlm-roberta", "modernbert", "mt5")}


def config_json(name: str, kind: str | None = None, **changes: Any) -> dict[str, Any]:
    """A golden's config.json as of a release, of another of its classes."""
    data = json.loads((GOLDENS / name.replace("-", "_") / "config.json").read_text())
    if kind is not None:
        data["architectures"] = [data["architectures"][0].replace("ForMaskedLM", kind)]
    return data | changes


def read(name: str, kind: str | None = None, **changes: Any) -> Any:
    return FAMILIES[name].from_hf(config_json(name, kind, **changes))


def test_presets_have_the_published_number_of_parameters():
    assert {name: num_parameters(zoo.presets()[name]) for name in COUNTS} == COUNTS
    assert {name for family in FAMILIES.values() for name in family.presets} == set(COUNTS)


@pytest.mark.parametrize("name", FAMILIES)
def test_configs_survive_hugging_face_s_form(name: str):
    family = FAMILIES[name]
    for config in (*family.presets.values(), read(name)):
        data = family.to_hf(config)
        assert json.loads(json.dumps(data)) == data
        assert family.from_hf(data) == config


def test_modernbert_s_layers_are_the_released_ones():
    for preset, count in (("modernbert_base", 22), ("modernbert_large", 28)):
        mixers = [mixer for mixer, _ in zoo.presets()[preset].layer_pieces()]
        assert len(mixers) == count
        for i, mixer in enumerate(mixers):
            theta, window = (10_000.0, 65) if i % 3 else (160_000.0, None)
            assert (mixer.rope, mixer.window, mixer.pre_norm) == (Rope(theta, None), window, i > 0)


def test_both_spellings_are_one_config():
    old = config_json("modernbert")
    new = dict(old)
    del new["global_attn_every_n_layers"], new["global_rope_theta"], new["local_rope_theta"]
    new["layer_types"] = [SLIDING if i % 3 else FULL for i in range(5)]
    new["rope_parameters"] = {
        FULL: {"rope_theta": 160000.0, "rope_type": "default"}, SLIDING: {"rope_theta": 10000.0, "rope_type": "default"}
    }  # fmt: skip
    family = FAMILIES["modernbert"]
    assert family.from_hf(new) == family.from_hf(old)
    del new["layer_types"], new["rope_parameters"]
    assert family.from_hf(new) == family.from_hf(old), "transformers' defaults"
    distilbert = config_json("distilbert")
    names = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}
    renamed = {names.get(key, key): value for key, value in distilbert.items()}
    assert FAMILIES["distilbert"].from_hf(renamed) == FAMILIES["distilbert"].from_hf(distilbert)


@pytest.mark.parametrize(
    ("name", "kind", "heads"),
    [
        ("distilbert", "Model", {}),
        ("distilbert", "ForMaskedLM", {"head_transform": "gelu", "head_bias": "trained"}),
        (
            "distilbert",
            "ForSequenceClassification",
            {"num_classes": 2, "classifier": "relu_dense", "classifier_dropout": 0.2},
        ),
        ("xlm-roberta", "Model", {"pooler": True}),
        ("xlm-roberta", "ForMaskedLM", {"head_transform": "gelu", "head_bias": "trained"}),
        ("xlm-roberta", "ForSequenceClassification", {"num_classes": 2, "classifier": "dense"}),
        ("modernbert", "Model", {}),
        (
            "modernbert",
            "ForMaskedLM",
            {"head_transform": "gelu", "head_bias": "trained", "head_transform_bias": False},
        ),
    ],
)
def test_heads_are_those_of_the_architecture(name: str, kind: str, heads: dict[str, Any]):
    config = read(name, kind)
    none = {
        "pooler": False, "pair_head": False, "head_transform": None, "head_transform_bias": True, "head_bias": "none",
        "num_classes": 0, "classifier": "pooler", "classifier_dropout": None,
    }  # fmt: skip
    assert {key: getattr(config, key) for key in none} == none | heads
    assert FAMILIES[name].from_hf(FAMILIES[name].to_hf(config)) == config


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("distilbert", {"tie_weights_": False}, "tie_weights_=False"),
        ("distilbert", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ("distilbert", {"n_heads": 5}, "num_attention_heads=5"),
        ("distilbert", {"architectures": ["DistilBertForTokenClassification"]}, "DistilBertForTokenClassification"),
        ("xlm-roberta", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ("xlm-roberta", {"is_decoder": True}, "is_decoder=True"),
        ("modernbert", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ("modernbert", {"layer_types": [FULL]}, "layer_types="),
        ("modernbert", {"layer_types": ["chunked_attention"] * 5}, "layer_types="),
        ("modernbert", {"rope_parameters": {FULL: {"rope_type": "yarn", "factor": 2.0}}}, "rope_parameters.full_att"),
        ("modernbert", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling="),
        ("modernbert", {"architectures": ["ModernBertForSequenceClassification"]}, "ModernBertForSequenceClassif"),
        ("mt5", {"scale_decoder_outputs": True}, "scale_decoder_outputs=True"),
        ("mt5", {"architectures": ["MT5EncoderModel"]}, "MT5EncoderModel"),
    ],
)
def test_what_is_not_supported_is_named(name: str, change: dict[str, Any], named: str):
    with pytest.raises(UserError, match=named):
        read(name, **change)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("distilbert", {"norm": LayerNorm(1e-6, True)}, r"norm\.eps="),
        ("distilbert", {"num_token_types": 2}, "num_token_types=2"),
        ("distilbert", {"pooler": True}, "pooler=True"),
        ("modernbert", {"embedding_norm": None}, "embedding_norm=None"),
        ("modernbert", {"overrides": ()}, r"overrides=\(\)"),
        ("modernbert", {"feed_forward": MLP(24, "gelu", bias=False)}, "GatedLinearUnit, and this model MLP"),
        ("modernbert", {"dropout": 0.1}, "dropout=0.1"),
        ("mt5", {"logit_scale": 0.5}, "scale_decoder_outputs=True"),
    ],
)
def test_what_a_family_cannot_have_is_not_exported(name: str, change: dict[str, Any], named: str):
    with pytest.raises(UserError, match=named):
        FAMILIES[name].to_hf(dataclasses.replace(read(name), **change))


def test_mt5_is_tied_where_its_file_has_no_head():
    """As transformers 5 writes it: that it is tied, whatever the weights are."""
    config = read("mt5", tie_word_embeddings=True)
    assert config.tie_embeddings
    assert config.logit_scale == 1
    with_head = FAMILIES["mt5"].with_tensors
    assert with_head is not None
    assert with_head(config, {"lm_head.weight"}) == read("mt5")
    without = {key: value for key, value in config_json("mt5").items() if key != "tie_word_embeddings"}
    assert FAMILIES["mt5"].from_hf(without) == read("mt5")


@pytest.fixture(scope="module")
def modernbert() -> LanguageModel:
    return llama_jax.load(GOLDENS / "modernbert", dtype="float32")


@pytest.mark.slow
def test_packed_rows_are_single_texts(modernbert: LanguageModel):
    """The unpadded computation of its paper: several texts, longer and shorter than a window, in one row."""
    lengths = (9, 2, 13)
    rng = np.random.default_rng(0)
    texts = [rng.integers(4, 64, n).astype(np.int32) for n in lengths]
    tokens, segments = np.concatenate(texts)[None], np.repeat([[1, 2, 3]], lengths, axis=1)
    together = np.asarray(modernbert.model(jnp.asarray(tokens), segment_ids=jnp.asarray(segments)))
    rows, mask = np.zeros((3, 13), np.int32), np.zeros((3, 13), np.int32)
    for row, text in enumerate(texts):
        rows[row, : len(text)], mask[row, : len(text)] = text, 1
    apart = np.asarray(modernbert.model(jnp.asarray(rows), mask=jnp.asarray(mask)))
    np.testing.assert_allclose(together[0], apart[mask == 1], atol=2e-5)
    whole = np.asarray(modernbert.model(jnp.asarray(tokens)))
    assert np.abs(whole - together).max() > 0.1, "packing has to matter"


def test_mt5_s_sentinels_are_pieces_of_its_model():
    """They begin with a space there; in a prompt they may be written out, in a text they are text."""
    tokenizer = load_tokenizer(DIRECTORIES / "mt5")
    ids = [tokenizer.special_tokens[f"<extra_id_{i}>"] for i in range(3)]
    assert ids == [5, 4, 3]
    found = tokenizer.encode_prompt("the river <extra_id_0> a <extra_id_1>", special=True)
    apart = [tokenizer.encode(text) for text in ("the river", "a")]
    assert found == [*apart[0], ids[0], *apart[1], ids[1], *tokenizer.eos_ids]
    assert not set(ids) & set(tokenizer.encode("the river <extra_id_0> a"))
    source = Document(np.array(tokenizer.encode(" ".join(["the river sees a house"] * 2)), np.int32))
    objective = SpanCorruption(num_sentinels=3, source_length=32)
    example = objective.example(source, np.random.default_rng(0), Vocabulary.of(tokenizer, objective.special_tokens()))
    assert ids[0] in example["source_tokens"]
