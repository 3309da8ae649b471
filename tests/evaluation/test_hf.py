"""The scores and texts of lm-evaluation-harness's own `hf` model, from the same directories.

goldens.json is what `ask_hf.py` beside this file writes, of the folders that it names:

    python tests/evaluation/ask_hf.py tests/evaluation/goldens.json tests/directories/goldens/{llama2,gpt2,...}
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ask_hf
import pytest

import llama_jax
from llama_jax.evaluation import HarnessLM

HERE = Path(__file__).parent
DIRECTORIES = HERE.parent / "directories" / "goldens"
GOLDENS: dict[str, Any] = json.loads((HERE / "goldens.json").read_text(encoding="utf-8"))
QUICK = ("llama2",)
SLOW = [name for name in GOLDENS if name not in QUICK]
SHAPES = ("llama2", "gpt2", "mixtral", "deepseek_v2")


def harness(path: Path, **options: Any) -> HarnessLM:
    return HarnessLM(llama_jax.load(path, dtype="float32", **options), batch_size=16)


def check(found: dict[str, Any], golden: dict[str, Any]) -> None:
    """Log-likelihoods equal to 1e-6 of their size, the same greedy flags and the same texts."""
    for ours, theirs in zip(found["loglikelihood"], golden["loglikelihood"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
    assert found["rolling"] == pytest.approx(golden["rolling"], rel=1e-6, abs=1e-6)
    for exact in ("generated", "max_length", "chats"):
        assert found.get(exact) == golden.get(exact)


def answers(lm: HarnessLM) -> dict[str, Any]:
    return ask_hf.answers(lm) | ({"chats": ask_hf.chats(lm)} if lm.text_tokenizer.chat_templates else {})


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_scores_of_hf(name: str):
    lm = harness(DIRECTORIES / name)
    check(answers(lm), GOLDENS[name])
    # Fourteen requests and four texts are few shapes: those that differ in the last id alone are one row.
    assert len(lm.scorer.shapes) <= 3


@pytest.mark.slow
def test_scores_of_hf_on_a_mesh():
    check(answers(harness(DIRECTORIES / "llama2", mesh={"data": 2, "fsdp": 2, "tensor": 2})), GOLDENS["llama2"])


@pytest.mark.slow
def test_hf_scores_our_exports_as_the_originals(tmp_path: Path):
    """What `hf` answers from our exports are the goldens, which are what we answer."""
    python = os.environ.get("LLAMA_JAX_REFERENCE_PYTHON")
    if not python:
        pytest.skip("LLAMA_JAX_REFERENCE_PYTHON names no python that has torch, transformers and lm_eval")
    for name in SHAPES:
        llama_jax.save(llama_jax.load(DIRECTORIES / name, dtype="float32"), tmp_path / name, format="hf")
    output = tmp_path / "answers.json"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "JAX", "XLA"))}
    command = [python, str(HERE / "ask_hf.py"), str(output), *(str(tmp_path / name) for name in SHAPES)]
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    for name, found in json.loads(output.read_text(encoding="utf-8")).items():
        check(found, GOLDENS[name])
