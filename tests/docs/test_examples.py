"""The scripts in examples/ run, and are short enough to be read at a glance."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MAX_LINES = 40  # that are not blank


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[str, ...]:
    """Texts, a run directory, and the keys that make a run take seconds."""
    texts = tiny_run.write_texts(tmp_path / "texts")
    keys = {
        "model.hidden_size": 16, "model.num_layers": 1, "num_steps": 2, "global_batch_size": 8, "sequence_length": 16,
        "data.cache_dir": tmp_path / "cache", "data.validation_fraction": 0.2, "tokenizer.vocab_size": 300,
        "compute.preflight": "false",
    }  # fmt: skip
    return str(texts), str(tmp_path / "run"), *(f"{key}={value}" for key, value in keys.items())


def main_of(name: str) -> Callable[..., None]:
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_short(example: Path):
    assert sum(line.strip() != "" for line in example.read_text("utf-8").splitlines()) < MAX_LINES


@pytest.mark.slow
def test_train_on_own_text(tiny: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    main_of("train_on_own_text")(*tiny)
    printed = capsys.readouterr().out
    assert "'val_loss'" in printed
    assert printed.splitlines()[-1].startswith("The ")


@pytest.mark.slow
def test_own_attention(tiny: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    main_of("own_attention")(*tiny)
    assert "loss [" in capsys.readouterr().out.splitlines()[-1]


def test_sample_released_model(capsys: pytest.CaptureFixture[str]):
    main_of("sample_released_model")(str(ROOT / "tests" / "directories" / "goldens" / "llama2"), "Hello")
    printed = capsys.readouterr().out
    assert "14,800 parameters" in printed
    assert printed.count("\nHello") == 3


@pytest.mark.slow
def test_shard_on_mesh(capsys: pytest.CaptureFixture[str]):
    main_of("shard_on_mesh")()
    printed = capsys.readouterr().out
    assert "a device has (2, 64, 2, 64)" in printed
    assert float(printed.split()[-1]) < 1e-5


def test_every_example_is_run():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES} <= tested
