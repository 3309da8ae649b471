"""`load` and `save`: what comes back is what went in, and every mistake is a sentence."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import convert, load, save
from llama_jax.checkpoint import GenerationSettings, LanguageModel
from llama_jax.config import UserError
from llama_jax.models import Compute, DecoderConfig, abstract_params, from_params
from llama_jax.nn import SwiGLU
from llama_jax.parallel import make_mesh
from llama_jax.tokenizers import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["one fish, two fish", "red fish, blue fish"] * 4, vocab_size=276)


@pytest.fixture(scope="module")
def lm(two_layers: DecoderConfig, random_params: Callable, tokenizer: Tokenizer) -> LanguageModel:
    config = DecoderConfig(**(two_layers.__dict__ | {"vocab_size": tokenizer.vocab_size}))
    return LanguageModel(config, from_params(config, random_params(config), Compute()), tokenizer)


@pytest.fixture(scope="module")
def native(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save(lm, folder)
    return folder


def test_a_native_copy_keeps_the_rule_of_prompts(lm: LanguageModel, tmp_path: Path):
    assert lm.tokenizer is not None
    text, rule = lm.tokenizer.encode("two fish"), ((), lm.tokenizer.eos_ids)
    save(dataclasses.replace(lm, tokenizer=lm.tokenizer.with_rule(*rule)), tmp_path / "model")
    again = load(tmp_path / "model").tokenizer
    assert again is not None
    assert again.encode_prompt("two fish") == [*text, *rule[1]]
    # A copy of an earlier version has no file for it: prompts begin as documents do.
    (tmp_path / "model" / "tokenizer" / "prompt_rule.json").unlink()
    again = load(tmp_path / "model").tokenizer
    assert again is not None
    assert again.encode_prompt("two fish") == again.encode("two fish", bos=True)


@pytest.mark.quick("None", "{'fsdp': 2, 'tensor': 4}")
@pytest.mark.parametrize("mesh", [None, {"fsdp": 8}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_native_and_back_is_the_identity(lm: LanguageModel, native: Path, mesh: Any):
    again = load(native, mesh=mesh)
    assert again.config == lm.config
    assert again.tokenizer is not None
    assert again.tokenizer.encode("two blue fish") == lm.tokenizer.encode("two blue fish")  # type: ignore[union-attr]
    assert again.tokenizer.fingerprint == lm.tokenizer.fingerprint  # type: ignore[union-attr]
    params = lm.model.params()
    for name, value in again.model.params().items():
        assert np.array_equal(value, params[name]), name
    tokens = jnp.asarray([[1, 5, 9, 30, 7]])
    np.testing.assert_allclose(again.model(tokens), lm.model(tokens), atol=1e-4)


def test_a_mesh_may_be_a_jax_mesh_or_the_current_one(lm: LanguageModel, native: Path):
    mesh = make_mesh({"data": 2, "tensor": 4})
    given = load(native, mesh=mesh).model
    with jax.set_mesh(mesh):
        entered = load(native).model
    for model in (given, entered):
        assert model.mesh == mesh
        assert not model.params()["lm_head.weight"].sharding.is_fully_replicated


def test_bfloat16(lm: LanguageModel, native: Path):
    model = load(native, dtype="bfloat16").model
    assert {value.dtype for value in model.params().values()} == {jnp.dtype(jnp.bfloat16)}
    logits = model(jnp.asarray([[1, 5, 9]]))
    assert logits.dtype == jnp.float32
    assert not np.array_equal(logits, lm.model(jnp.asarray([[1, 5, 9]])))


def test_without_tokenizer_and_with_another(lm: LanguageModel, tokenizer: Tokenizer, tmp_path: Path):
    save(LanguageModel(lm.config, lm.model, None), tmp_path / "bare")
    assert load(tmp_path / "bare").tokenizer is None
    file = tokenizer.save(tmp_path / "tokenizer")
    for given in (file, file.parent, tokenizer):
        found = load(tmp_path / "bare", tokenizer=given).tokenizer
        assert found is not None
        assert found.fingerprint == tokenizer.fingerprint


def test_a_piece_from_outside_the_package(lm: LanguageModel, tmp_path: Path):
    class Mine(SwiGLU):
        pass

    config = DecoderConfig(**(lm.config.__dict__ | {"feed_forward": Mine(24, bias=False)}))
    params = {name: jnp.ones(a.shape) for name, a in abstract_params(config).items()}
    save(LanguageModel(config, from_params(config, params, Compute()), None), tmp_path / "mine")
    with pytest.raises(UserError, match=r"feed_forward names the class 'Mine'.*components=\(Mine,\)"):
        load(tmp_path / "mine")
    assert load(tmp_path / "mine", components=(Mine,)).config == config


def test_generation_settings_and_the_rule_of_prompts_come_back(lm: LanguageModel, tmp_path: Path):
    """From an own model, an export and a native copy of it: the same prompts, stops and what is forbidden."""
    assert lm.tokenizer is not None
    tokenizer = lm.tokenizer.with_rule((1, 4), (2,))
    settings = GenerationSettings(
        eos_ids=(2, 7, 9), pad_id=0, min_length=3, bad_words_ids=((5, 6),), others='{"x": [1]}'
    )
    told = dataclasses.replace(lm, tokenizer=tokenizer, generation=settings)
    save(told, tmp_path / "native")
    save(told, tmp_path / "hf", format="hf")
    convert(tmp_path / "hf", tmp_path / "converted", to="native")
    convert(tmp_path / "native", tmp_path / "exported", to="hf")
    for form in ("native", "hf", "converted", "exported"):
        again = load(tmp_path / form)
        assert again.tokenizer is not None
        assert again.tokenizer.encode_prompt("one fish") == tokenizer.encode_prompt("one fish"), form
        expected = settings if form == "native" else dataclasses.replace(settings, bos_id=1)
        assert again.generation == expected, form
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, [2, 7, 9], 0]


def test_a_native_copy_knows_its_family(lm: LanguageModel, tmp_path: Path):
    save(dataclasses.replace(lm, model_type="llama"), tmp_path / "saved")
    save(lm, tmp_path / "own")
    save(lm, tmp_path / "hf", format="hf")
    convert(tmp_path / "hf", tmp_path / "converted", to="native")
    assert [load(tmp_path / name).model_type for name in ("saved", "own", "converted")] == ["llama", None, "llama"]


def test_an_export_of_an_own_model_says_where_its_texts_end(lm: LanguageModel, tmp_path: Path):
    save(lm, tmp_path / "hf", format="hf")
    written = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": [2, 1]}  # BOS begins another document
    assert load(tmp_path / "hf").generation.eos_ids == (2, 1)


def test_nothing_is_written_over(lm: LanguageModel, native: Path):
    before = {file: file.read_bytes() for file in native.rglob("*") if file.is_file()}
    for form in ("native", "hf"):
        with pytest.raises(UserError, match="exists already"):
            save(lm, native, format=form)  # type: ignore[arg-type]
    assert {file: file.read_bytes() for file in native.rglob("*") if file.is_file()} == before


def test_wrong_ways_to_load(native: Path, tmp_path: Path):
    with pytest.raises(UserError, match="'nowhere' does not exist"):
        load("nowhere")
    with pytest.raises(UserError, match="dtype='float16' must be float32 or bfloat16"):
        load(native, dtype="float16")
    with pytest.raises(UserError, match="mesh axis 'model' does not exist"):
        load(native, mesh={"model": 8})
    with pytest.raises(UserError, match="takes 3 devices and there are 8"):
        load(native, mesh={"tensor": 3})
    with pytest.raises(UserError, match="no checkpoint of step 4: there are 0"):
        load(native, step=4)
    config = json.loads((native / "config.json").read_text())
    assert config["type"] == "DecoderConfig"
