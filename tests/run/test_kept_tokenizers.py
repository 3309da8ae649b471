"""A tokenizer is trained once for the same texts and options, and again where one of them is another."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run

from llama_jax.data import DataConfig
from llama_jax.run import preparing
from llama_jax.run.preparing import keep_trained, kept_directory, trained_tokenizer
from llama_jax.tokenizers import Tokenizer, TokenizerConfig
from llama_jax.tokenizers.config import Kind


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    texts = tiny_run.write_texts(tmp_path / "texts")
    return dataclasses.replace(tiny_run.get_config().data, path=(str(texts),), cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds that have been trained."""
    train, made = preparing.train_tokenizer, []
    monkeypatch.setattr(
        preparing, "train_tokenizer", lambda *args, kind, **k: made.append(kind) or train(*args, kind=kind, **k)
    )
    return made


def trained(config: TokenizerConfig, data: DataConfig) -> Tokenizer:
    kept = kept_directory(config, data)
    tokenizer = trained_tokenizer(config, data, kept, quiet=True)
    keep_trained(tokenizer, kept)
    return tokenizer


@pytest.mark.parametrize(
    ("kind", "size"), [("bpe", 290), ("unigram", 290), ("byte_bpe", 270), ("wordpiece", 60), ("whitespace", 30)]
)
def test_what_is_kept_is_what_was_trained(kind: Kind, size: int, data: DataConfig, trainings: list[str]):
    config = TokenizerConfig(path=None, kind=kind, vocab_size=size, special_tokens=("<x>",))
    made, kept = (trained(config, data) for _ in range(2))
    assert trainings == [kind]
    assert (kept.files, kept.special_tokens) == (made.files, made.special_tokens)
    text = "To be, or not to be <x> 123"
    assert kept.encode(text) == made.encode(text)


def longer(data: DataConfig) -> DataConfig:
    file = next(file for file in Path(data.path[0]).rglob("*") if file.is_file())
    file.write_text(file.read_text() + "\nMore of it.\n")
    return data


def damaged(data: DataConfig) -> DataConfig:
    for file in Path(data.cache_dir or "", "tokenizers").glob("*/*token*"):
        file.write_bytes(file.read_bytes()[:-7])
    return data


@pytest.mark.parametrize(
    "change",
    [longer, damaged, lambda data: dataclasses.replace(data, validation_fraction=0.3)],
    ids=["text", "damaged", "split"],
)
def test_another_text_is_trained_on(change: Callable[[DataConfig], DataConfig], data: DataConfig, trainings: list[str]):
    config = TokenizerConfig(path=None, kind="whitespace", vocab_size=30)
    trained(config, data)
    again = trained(config, change(data))
    assert len(trainings) == 2
    assert trained(config, data).files == again.files or change is not damaged


def test_another_training_has_its_own(data: DataConfig, trainings: list[str]):
    config = TokenizerConfig(path=None, kind="whitespace", vocab_size=30)
    sizes = [
        trained(own, data).vocab_size
        for own in (
            config,
            dataclasses.replace(config, vocab_size=31),
            dataclasses.replace(config, special_tokens=("<x>",)),
        )
    ]
    assert sizes[:2] == [30, 31]
    assert len(trainings) == 3
