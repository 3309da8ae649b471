"""Adapters in the files of PEFT: its own give its logits, and it reads ours."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import llama_jax
from llama_jax.__main__ import main
from llama_jax.checkpoint.formats import read_safetensors, write_safetensors
from llama_jax.config import UserError
from llama_jax.models import ADAPTERS, Compute, abstract_params, from_params
from llama_jax.nn import LoRA
from llama_jax.tokenizers import load_tokenizer, train_tokenizer

GOLDENS = Path(__file__).parent / "goldens"
ASK = Path(__file__).parent / "ask_peft.py"
TOKENS = ((np.arange(24).reshape(2, 12) * 7 + 3) % 64).astype(np.int32)
FAMILIES = ["llama", "llama_with_biases", "gpt2", "mixtral", "glm"]


def adapted(family: str, adapters: LoRA) -> llama_jax.LanguageModel:
    """The family's base with random adapters."""
    base = llama_jax.load(GOLDENS / family / "base", dtype="float32")
    config = dataclasses.replace(base.config, adapters=adapters)
    params, rng = base.model.params(), np.random.default_rng(0)
    for name, a in abstract_params(config).items():
        if name.endswith(ADAPTERS):
            params[name] = jnp.asarray(0.2 * rng.normal(size=a.shape), jnp.float32)
    return dataclasses.replace(base, config=config, model=from_params(config, params, Compute(dtype="float32")))


OURS = {
    "llama": LoRA(rank=3, alpha=5, targets=("q_proj", "down_proj"), rslora=True),
    "gpt2": LoRA(rank=2, alpha=5, targets=("q_proj", "v_proj", "o_proj", "up_proj")),  # two of three in c_attn
    "mixtral": LoRA(rank=2, alpha=5, targets=("all-linear",)),
    "glm": LoRA(rank=2, alpha=5, targets=("gate_proj", "up_proj", "k_proj")),
}


@pytest.mark.quick("llama_with_biases", "mixtral")
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_peft_give_its_logits(family: str):
    lm = llama_jax.load(GOLDENS / family / "adapter", dtype="float32")
    assert lm.config == llama_jax.load(GOLDENS / family / "base", dtype="float32").config
    np.testing.assert_allclose(lm.model(TOKENS), np.load(GOLDENS / family / "logits.npy"), atol=5e-5)


@pytest.mark.parametrize(
    "family", ["gpt2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama", "mixtral", "glm"))]
)
def test_ours_written_and_read_again(family: str, tmp_path: Path):
    lm = adapted(family, OURS[family])
    llama_jax.save_adapters(lm, tmp_path / "adapter", base=GOLDENS / family / "base")
    again = llama_jax.load(tmp_path / "adapter", dtype="float32")
    np.testing.assert_allclose(again.model(TOKENS), lm.model(TOKENS), atol=1e-5)
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    }


@pytest.mark.slow
def test_peft_reads_ours(tmp_path: Path):
    python = os.environ.get("LLAMA_JAX_REFERENCE_PYTHON")
    if not python:
        pytest.skip("LLAMA_JAX_REFERENCE_PYTHON names no python that has torch, transformers and peft")
    models = {family: adapted(family, adapters) for family, adapters in OURS.items()}
    for family, lm in models.items():
        llama_jax.save_adapters(lm, tmp_path / family, base=GOLDENS / family / "base")
        np.save(tmp_path / family / "tokens.npy", TOKENS)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "JAX", "XLA"))}
    folders = [str(tmp_path / family) for family in models]
    subprocess.run([python, str(ASK), *folders], check=True, env=environment, stdout=sys.stderr)
    for family, lm in models.items():
        np.testing.assert_allclose(np.load(tmp_path / family / "logits.npy"), lm.model(TOKENS), atol=5e-5)


@pytest.mark.slow
def test_an_export_is_merged_and_a_native_copy_is_not(tmp_path: Path):
    lm = adapted("llama", OURS["llama"])
    llama_jax.save(lm, tmp_path / "hf", format="hf")
    llama_jax.save(lm, tmp_path / "native")
    assert main(["convert", str(tmp_path / "native"), str(tmp_path / "adapter"), "--to", "peft"]) == 0
    assert main(["convert", str(tmp_path / "native"), str(tmp_path / "converted"), "--to", "hf"]) == 0
    base = GOLDENS / "llama" / "base"
    read = [
        llama_jax.load(tmp_path / "hf"),
        llama_jax.load(tmp_path / "converted"),
        llama_jax.load(tmp_path / "adapter", base=base),
    ]
    for found in read:
        assert found.config.adapters is None
        np.testing.assert_allclose(found.model(TOKENS), lm.model(TOKENS), atol=1e-5)
    assert llama_jax.load(tmp_path / "native").config.adapters == OURS["llama"]


def test_commands_take_an_adapter(tmp_path: Path, capsys):
    adapter = str(GOLDENS / "gpt2" / "adapter")
    assert main(["convert", adapter, str(tmp_path / "merged"), "--to", "hf"]) == 0
    np.testing.assert_allclose(
        llama_jax.load(tmp_path / "merged").model(TOKENS), np.load(GOLDENS / "gpt2" / "logits.npy"), atol=5e-5
    )
    assert main(["sample", adapter, "--base", str(tmp_path), "--prompt", "x"]) == 2
    assert "config.json" in capsys.readouterr().err


def test_files_of_a_tokenizer_are_passed_on(tmp_path: Path):
    """Of a directory with tokenizer.json and tokenizer.model the first is read, and other programs read the second."""
    given, alone = tmp_path / "given", tmp_path / "alone"
    for name, content in train_tokenizer(["the cat sat"] * 9, vocab_size=270).export_files().items():
        for folder in (given, alone):
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
    (alone / "tokenizer.model").unlink()
    base, native, exported = (str(path) for path in (GOLDENS / "llama" / "base", tmp_path / "n", tmp_path / "e"))
    assert main(["convert", base, native, "--to", "native", "--tokenizer", str(given)]) == 0
    assert main(["convert", native, exported, "--to", "hf"]) == 0
    assert Path(exported, "tokenizer.model").read_bytes() == (given / "tokenizer.model").read_bytes()
    tokenizer, expected = (load_tokenizer(path) for path in (exported, alone))
    assert tokenizer.encode("the cat") == expected.encode("the cat")
    assert load_tokenizer(given).fingerprint == expected.fingerprint


@pytest.mark.slow
def test_weights_keep_their_type_and_adapters_their_precision(tmp_path: Path):
    """Of a base in bfloat16: loaded as float32 the sum is not rounded, converted it is in bfloat16, once."""
    shutil.copytree(GOLDENS / "llama", tmp_path / "llama")
    file = tmp_path / "llama" / "base" / "model.safetensors"
    tensors = {name: np.array(t.read()).astype(ml_dtypes.bfloat16) for name, t in read_safetensors(file).items()}
    write_safetensors(file, tensors)
    lm = llama_jax.load(tmp_path / "llama" / "adapter", dtype="float32")
    weight = np.asarray(lm.model.params()["layers.attention.v_proj.weight"])
    assert not np.array_equal(weight, weight.astype(ml_dtypes.bfloat16))
    llama_jax.convert(tmp_path / "llama" / "adapter", tmp_path / "merged", to="native")
    found = llama_jax.load(tmp_path / "merged").model.params()["layers.attention.v_proj.weight"]
    np.testing.assert_array_equal(found, weight.astype(ml_dtypes.bfloat16).astype(np.float32))


def changed(key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))

    return change


def renamed(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        write_safetensors(file, {k.replace(old, new): np.array(t.read()) for k, t in read_safetensors(file).items()})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("use_dora", True), "use_dora=True, which is not supported.*merge_and_unload"),
        (changed("peft_type", "IA3"), "peft_type=IA3, and only LORA"),
        (changed("peft_type", None), "no peft_type"),
        (changed("target_parameters", ["mlp.experts.down_proj"]), "target_parameters"),
        (changed("init_lora_weights", "pissa_niter_4"), "init_lora_weights=pissa_niter_4, which changes"),
        (changed("base_model_name_or_path", "meta-llama/Llama-2-7b-hf"), "'meta-llama/Llama-2-7b-hf', is no directory"),
        (renamed("layers.1", "layers.7"), "adapts 'model.layers.7.*does not have"),
        (renamed("q_proj", "k_proj"), "adapts '.*k_proj.weight' with matrices for"),
        (renamed("lora_A", "lora_magnitude"), "lora_magnitude.*not supported"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "neither adapter_model.safetensors nor .bin"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(change: Callable[[Path], None], message: str, tmp_path: Path):
    shutil.copytree(GOLDENS / "llama", tmp_path / "llama")
    change(tmp_path / "llama" / "adapter")
    with pytest.raises(UserError, match=message):
        llama_jax.load(tmp_path / "llama" / "adapter")


def test_a_base_is_for_adapters_and_adapters_for_a_model_that_has_them(tmp_path: Path):
    with pytest.raises(UserError, match=r"base=.* is for an adapter"):
        llama_jax.load(GOLDENS / "llama" / "base", base=GOLDENS / "llama" / "base")
    with pytest.raises(UserError, match=r"no adapters: train it with model\.adapters"):
        llama_jax.save_adapters(llama_jax.load(GOLDENS / "llama" / "base"), tmp_path / "adapter")
    (tmp_path / "x.bin").write_bytes(b"weights")
    with pytest.raises(UserError, match=r"x\.bin is no Hugging Face directory.*convert it"):
        llama_jax.save_adapters(adapted("llama", OURS["llama"]), tmp_path / "adapter", base=tmp_path / "x.bin")
