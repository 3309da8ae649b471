"""BART, Marian and the Transformer that they are made from: sizes, released files, and what is refused by name."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

import llama_jax
from llama_jax import zoo
from llama_jax.checkpoint.formats import read_directory, write_safetensors
from llama_jax.config import UserError
from llama_jax.models import num_parameters
from llama_jax.nn import CrossAttention, GroupedQuery, RMSNorm, SinusoidalPositions

bart = zoo.family("bart")
marian = zoo.family("marian")
transformer = zoo.all_presets()["transformer"]

GOLDENS = Path(__file__).resolve().parent.parent / "parity" / "goldens"
PAPER = {"transformer_base": 65e6, "transformer_big": 213e6}


def by_hand(vocab: int, width: int, inside: int, layers: int, *, tables: int = 0, embedding_norms: int = 0) -> int:
    """Parameters of as many layers on either side: matrices with their biases, norms of two vectors."""
    attention, feed_forward, norm = 4 * (width + 1) * width, 2 * width * inside + inside + width, 2 * width
    encoder, decoder = attention + feed_forward + 2 * norm, 2 * attention + feed_forward + 3 * norm
    return (vocab + tables) * width + embedding_norms * norm + layers * (encoder + decoder)


COUNTS = {
    "transformer_base": by_hand(37_000, 512, 2048, 6),
    "transformer_big": by_hand(37_000, 1024, 4096, 6),
    "bart_base": by_hand(50_265, 768, 3072, 6, tables=2 * 1026, embedding_norms=2),
    "bart_large": by_hand(50_265, 1024, 4096, 12, tables=2 * 1026, embedding_norms=2),
    "opus_mt_en_de": by_hand(58_101, 512, 2048, 6),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_those_counted_by_hand(name: str):
    assert num_parameters(zoo.presets()[name]) == COUNTS[name]


def test_published_numbers_of_parameters():
    presets = zoo.presets()
    assert {name: num_parameters(presets[name]) for name in bart.presets} == {
        "bart_base": 139_420_416,
        "bart_large": 406_291_456,
    }
    for name, millions in PAPER.items():
        assert num_parameters(presets[name]) == pytest.approx(millions, rel=0.04)


@pytest.mark.parametrize("family", [bart, marian])
def test_presets_survive_hugging_face_config(family):
    for config in family.presets.values():
        assert family.from_hf(family.to_hf(config)) == config


def test_the_paper_s_recipe():
    """Equation 3 at every turn of it, with the batch that the paper speaks of."""
    config = llama_jax.load_config("transformer_base")
    rates = llama_jax.training.learning_rate
    for step in (1, 7, 3999, 4000, 4001, 99_999):
        expected = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
        found = float(rates(step - 1, config.optimizer.hyper(config.num_steps)))
        assert found == pytest.approx(expected, rel=1e-6), step
    assert config.optimizer.label_smoothing == 0.1
    assert config.global_batch_size * config.sequence_length == pytest.approx(25_000, rel=0.05)


# -- config.json


def config_of(name: str) -> dict:
    return json.loads((GOLDENS / name / "config.json").read_text())


def test_every_dropout_has_its_place():
    rates = {"dropout": 0.11, "attention_dropout": 0.12, "activation_dropout": 0.13}
    for name, family in (("bart", bart), ("marian", marian)):
        config = family.from_hf(config_of(name) | rates)
        assert config.dropout == 0.11
        for mixer, feed_forward in config.layer_pieces():
            assert (mixer.dropout, feed_forward.dropout) == (0.12, 0.13)
        assert config.cross_attention.dropout == 0.12
        assert config.final_dropout == 0
        assert family.to_hf(config).items() >= rates.items()


def test_encoders_of_another_size_are_expressed():
    sizes = {"encoder_attention_heads": 2, "encoder_ffn_dim": 56, "encoder_layers": 3}
    config = bart.from_hf(config_of("bart") | sizes)
    (encoder, *_), (decoder, *_) = config.stacks().values()
    assert (encoder[0].num_heads, encoder[0].head_dim, encoder[1].intermediate_size) == (2, 12, 56)
    assert (decoder[0].num_heads, decoder[0].head_dim, decoder[1].intermediate_size) == (4, 6, 40)
    assert config.cross_attention.num_heads == 4
    assert len(set(config.stacks()["encoder_layers"])) == 1
    assert bart.to_hf(config).items() >= sizes.items()


@pytest.mark.parametrize("name", ["bart", "marian"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("normalize_before", True),
        ("add_final_layer_norm", True),
        ("add_bias_logits", True),
        ("tie_word_embeddings", False),
        ("is_decoder", True),
        ("num_hidden_layers", 7),
        ("activation_function", "mish"),
        ("decoder_attention_heads", 5),
        ("encoder_attention_heads", 7),
        ("vocab_size", None),
        ("decoder_start_token_id", 64),
        ("architectures", ["BartForSequenceClassification"]),
    ],
)
def test_what_neither_can_be_is_refused_by_name(name: str, key: str, value):
    # A head count has another name here.
    wanted = key.replace("decoder_attention_heads", "num_heads").replace("attention_heads", "heads")
    wanted = wanted.replace("decoder_start_token_id", "decoder_start_(token_)?id")
    with pytest.raises(UserError, match=wanted) as error:
        zoo.family(name).from_hf(config_of(name) | {key: value})
    assert value is None or re.search(re.escape(str(value)), str(error.value))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("bart", "static_position_embeddings", True),
        ("bart", "normalize_embedding", False),
        ("bart", "extra_pos_embeddings", 1),
        ("marian", "static_position_embeddings", False),
        ("marian", "normalize_embedding", True),
        ("marian", "share_encoder_decoder_embeddings", False),
        ("marian", "decoder_vocab_size", 65),
        ("marian", "pad_token_id", 1),
    ],
)
def test_what_one_cannot_be_is_refused_by_name(name: str, key: str, value):
    with pytest.raises(UserError, match=key):
        zoo.family(name).from_hf(config_of(name) | {key: value})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"norm_placement": "pre"}, "norm_placement"),
        ({"tie_embeddings": False}, "tie_embeddings"),
        ({"embedding_scale": 2.0}, "embedding_scale"),
        ({"norm": RMSNorm(eps=1e-5)}, "norm"),
        ({"head_bias": "trained"}, "head_bias"),
        ({"final_dropout": 0.2}, "final_dropout"),
        ({"cross_attention": CrossAttention(3, 3, 8, True, True, dropout=0.1)}, "cross_attention"),
        ({"attention": GroupedQuery(4, 2, 6, None, True, True, dropout=0.1)}, "attention"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
@pytest.mark.parametrize("name", ["bart", "marian"])
def test_what_has_no_place_in_a_config_is_refused_by_name(name: str, change: dict, named: str):
    family = zoo.family(name)
    config = family.from_hf(config_of(name))
    assert family.to_hf(config)
    with pytest.raises(UserError, match=rf"\b{named}[.=]"):
        family.to_hf(dataclasses.replace(config, **change))


def test_one_family_s_model_is_not_the_other_s():
    own = {name: zoo.family(name).from_hf(config_of(name)) for name in ("bart", "marian")}
    with pytest.raises(UserError, match="positions=SinusoidalPositions"):
        bart.to_hf(dataclasses.replace(own["marian"], never_written=()))
    with pytest.raises(UserError, match="positions=LearnedPositions"):
        marian.to_hf(own["bart"])
    # The paper's sinusoids are not Marian's.
    config = dataclasses.replace(own["marian"], positions=SinusoidalPositions())
    with pytest.raises(UserError, match=r"positions\.layout=interleaved"):
        marian.to_hf(config)
    assert transformer.presets["transformer_base"].positions == SinusoidalPositions()


# -- files


def written(name: str, folder: Path, change, **config) -> llama_jax.LanguageModel:
    """A golden with its tensors changed, loaded."""
    tensors = change({key: tensor.read() for key, tensor in read_directory(GOLDENS / name).items()})
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(name) | config))
    write_safetensors(folder / "model.safetensors", tensors)
    return llama_jax.load(folder, dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["BartModel", "BartForConditionalGeneration"])
def test_a_file_of_the_trunk_alone(architecture: str, tmp_path):
    """As bart-base was released: names without a prefix, and no bias of the logits."""
    with np.load(GOLDENS / "bart" / "expected.npz") as golden:
        expected = dict(golden)
    bias = {}

    def trunk(tensors: dict) -> dict:
        bias["value"] = tensors.pop("final_logits_bias")
        return {key.removeprefix("model."): value for key, value in tensors.items()}

    lm = written("bart", tmp_path / "trunk", trunk, architectures=[architecture])
    logits = lm.model(expected["source"], expected["target"], source_mask=expected["source_mask"])
    assert np.abs(bias["value"]).max() > 0.1
    np.testing.assert_allclose(logits, expected["logits"] - bias["value"], atol=5e-5)
    llama_jax.save(lm, tmp_path / "again", format="hf")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == ["BartModel"]
    assert llama_jax.load(tmp_path / "again").config == lm.config


@pytest.mark.slow
def test_marian_never_writes_padding(tmp_path):
    """Not with the highest logit of all; what else it writes stays the same."""

    def padding_wins(tensors: dict) -> dict:
        bias = tensors["final_logits_bias"].copy()
        bias[0, 63] = 1e4
        return tensors | {"final_logits_bias": bias}

    with np.load(GOLDENS / "marian" / "expected.npz") as golden:
        source, mask, expected = golden["source"], golden["source_mask"], golden["generated"]
    lm = written("marian", tmp_path / "padding", padding_wins)
    found = llama_jax.generate(lm.model, source, source_mask=mask, max_new_tokens=20)
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(UserError, match="never_written"):
        dataclasses.replace(lm.config, never_written=(64,))
