"""What version 0.1.0 wrote is read bit for bit and continued: runs, checkpoints, corpora, packing, saved models.

`make_artifacts.py` is the program that wrote the archive, run with that version.
"""

import hashlib
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from before.reading import LAST, STOPPED, digests, read_stopped

import llama_jax

ARCHIVE = Path(__file__).parent / "artifacts.tar.xz"
RUNS = ("llama", "experts", "translation")


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def expected(before: Path) -> dict[str, Any]:
    return json.loads((before / "expected.json").read_text())


@pytest.fixture
def stopped(request: pytest.FixtureRequest, before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a run that stopped after 4 of its 6 steps; the folder that it was started in is the current one."""
    shutil.copytree(before / request.param, tmp_path / request.param)
    monkeypatch.chdir(tmp_path / request.param)
    return request.param


@pytest.mark.parametrize("stopped", RUNS, indirect=True)
def test_a_run_is_read(stopped: str, expected: dict[str, Any]):
    assert read_stopped(llama_jax.open_run("run"), STOPPED) == expected[stopped]["stopped"]


@pytest.mark.parametrize(
    "stopped", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in RUNS[1:])], indirect=True
)
def test_a_run_is_continued(stopped: str, expected: dict[str, Any]):
    quick = {"compute.preflight": False, "logging.sample_prompts": ()}
    run = llama_jax.train(llama_jax.override(llama_jax.open_run("run").config, quick), "run")
    final = run.load(step=LAST).model.params()
    # The balance loss of the experts has counted other tokens since, those of DeepSeek-V3's equation 18.
    close, close_lines = (1e-3, 1e-3) if stopped == "experts" else (1e-4, 1e-5)
    assert final.keys() == expected[stopped]["means"].keys()
    for name, value in final.items():
        if name.endswith("k_proj.bias"):  # without a gradient in exact arithmetic: its steps are of rounding
            continue
        mean = float(np.abs(np.asarray(value)).mean())
        assert mean == pytest.approx(expected[stopped]["means"][name], rel=close, abs=1e-7), name
    metrics = {"step", "loss", "val_loss", "grad_norm", "learning_rate"}
    lines = [{key: value for key, value in line.items() if key in metrics} for line in run.metrics()]
    assert len(lines) == len(expected[stopped]["metrics"])
    for line, old in zip(lines, expected[stopped]["metrics"], strict=True):
        assert line == pytest.approx(old, rel=close_lines)

    # The corpus and its packing were found, not made again, and not one byte of them changed.
    old_files = {
        name: value
        for name, value in expected["files"].items()
        if name.startswith(f"{stopped}/cache/corpora") and not name.endswith(".lock")
    }
    files = [path for path in Path("cache/corpora").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert {f"{stopped}/{f}": hashlib.sha256(f.read_bytes()).hexdigest() for f in files} == old_files


@pytest.mark.parametrize("folder", ["native", "hf"])
def test_a_saved_model_is_read(folder: str, before: Path, expected: dict[str, Any]):
    lm = llama_jax.load(before / folder)
    assert digests(lm.model.params()) == expected["native"]["params"]
    tokens = np.array([[1, 5, 9, 40]], np.int32)
    assert np.asarray(llama_jax.generate(lm, tokens, max_new_tokens=8)).tolist() == expected["native"]["greedy"]
