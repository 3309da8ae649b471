"""Tokenized once, whole or not at all, and the text is all there."""

import argparse
import itertools
import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llama_jax.config import UserError
from llama_jax.data import DataConfig, TokenStream, cli, corpus, prepare, read_documents
from llama_jax.tokenizers import Tokenizer, train_tokenizer

TEXTS = [f"document {i}: " + "word " * (i % 13) + "\nend" for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=290)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{i:03}.txt").write_text(text)
    return DataConfig(path=(str(tmp_path / "texts"),), validation_fraction=0.1, cache_dir=str(tmp_path / "cache"))


def documents_of(stream: TokenStream) -> list[list[int]]:
    starts = [*stream.document_starts(0, stream.num_tokens), stream.num_tokens]
    return [stream.read(int(a), int(b)).tolist() for a, b in itertools.pairwise(starts)]


class Counting(Tokenizer):
    """Another tokenizer that counts the texts it encodes and may be killed on the way."""

    def __init__(self, inner: Tokenizer, *, fails_at: int | None = None, error: BaseException | None = None):
        self.__dict__ |= {k: v for k, v in inner.__dict__.items() if not k.startswith("_")}
        self.inner, self.count, self.fails_at, self.error = inner, 0, fails_at, error

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        self.count += len(texts)
        if self.fails_at is not None and self.count >= self.fails_at:
            if self.error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise self.error
        return [self.inner.encode(text) for text in texts]

    def stream(self):
        return self.inner.stream()


@pytest.mark.parametrize("shard_tokens", [1 << 28, 100])
def test_all_the_text_is_there(config, tokenizer, monkeypatch: pytest.MonkeyPatch, shard_tokens: int):
    monkeypatch.setattr(corpus, "SHARD_TOKENS", shard_tokens)
    monkeypatch.setattr(corpus, "BATCH_CHARS", 1000)
    steps = []
    made = prepare(config, tokenizer, progress=lambda done, total: steps.append((done, total)))
    for split, stream in (("train", made.train), ("validation", made.validation)):
        texts = list(made.texts(split))
        assert [tokenizer.decode(ids) for ids in documents_of(stream)] == texts
        assert all(ids[0] == 1 and ids[-1] == 2 for ids in documents_of(stream))
        assert made.num_bytes[split] == sum(len(text.encode()) for text in texts)
        assert made.num_documents[split] == stream.num_documents == len(texts) > 0
        assert made.num_tokens[split] == stream.num_tokens
        assert len(stream.shards) > 1 or shard_tokens > 100
    assert sorted([*made.texts("train"), *made.texts("validation")]) == sorted(TEXTS)
    assert made.train.shards[0].tokens.dtype == np.uint16
    assert made.tokenizer == tokenizer.fingerprint
    assert len(steps) > 3
    assert steps[-1] == (sum(map(len, TEXTS)),) * 2


def test_large_vocabularies_take_four_bytes(config, tokenizer):
    wide = Counting(tokenizer)
    wide.vocab_size, wide.fingerprint = 1 << 17, "wide"
    assert prepare(config, wide).train.shards[0].tokens.dtype == np.uint32


def test_tokenizes_once_and_again_for_each_change(config, tokenizer, tmp_path: Path):
    counting = Counting(tokenizer)
    first = prepare(config, counting)
    assert counting.count == len(TEXTS)
    again = prepare(config, counting)
    assert counting.count == len(TEXTS)
    assert again.directory == first.directory
    (tmp_path / "texts").rename(tmp_path / "moved")
    moved = DataConfig(path=(str(tmp_path / "moved"),), validation_fraction=0.1, cache_dir=config.cache_dir)
    assert prepare(moved, counting).directory == first.directory
    seen = {first.content_hash}
    for change in ({"document_chars": 30}, {"validation_fraction": 0.2}, {"text_field": "body"}):
        made = prepare(DataConfig(**{**vars(moved), **change}), counting)
        seen.add(made.content_hash)
    (tmp_path / "moved" / "000.txt").write_text("changed")
    seen.add(prepare(moved, counting).content_hash)
    counting.fingerprint = "another"
    seen.add(prepare(moved, counting).content_hash)
    assert len(seen) == 6


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full")])
def test_a_failure_leaves_nothing(config, tokenizer, monkeypatch: pytest.MonkeyPatch, error: BaseException):
    monkeypatch.setattr(corpus, "BATCH_CHARS", 1000)
    with pytest.raises(type(error)):
        prepare(config, Counting(tokenizer, fails_at=100, error=error))
    assert [p for p in Path(config.cache_dir).rglob("*") if p.suffix != ".lock" and p.name != "corpora"] == []


def test_killed_and_started_again(config, tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(corpus, "BATCH_CHARS", 1000)
    whole = prepare(DataConfig(**{**vars(config), "cache_dir": str(tmp_path / "whole")}), tokenizer)
    process = multiprocessing.get_context("spawn").Process(target=killed_half_way, args=(config, dict(tokenizer.files)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (Path(config.cache_dir) / "corpora" / whole.directory.name).exists()
    made = prepare(config, tokenizer)
    assert not list(made.directory.parent.glob("*.partial"))
    files = {file.name: file.read_bytes() for file in whole.directory.iterdir()}
    assert {file.name: file.read_bytes() for file in made.directory.iterdir()} == files


def killed_half_way(config: DataConfig, files: dict[str, bytes]) -> None:
    from llama_jax.tokenizers.sentencepiece import SentencePieceTokenizer

    corpus.BATCH_CHARS = 1000
    prepare(config, Counting(SentencePieceTokenizer(files["tokenizer.model"]), fails_at=100))


@pytest.mark.parametrize("name", ["train-00000.bin", "validation.documents", "index.json"])
def test_a_damaged_cache_is_made_again(config, tokenizer, name: str):
    made = prepare(config, tokenizer)
    expected = documents_of(made.train)
    file = made.directory / name
    file.write_bytes(file.read_bytes()[:-2])
    assert documents_of(prepare(config, tokenizer).train) == expected


def test_nothing_held_out(config, tokenizer):
    made = prepare(DataConfig(**{**vars(config), "validation_fraction": 0.0}), tokenizer)
    assert made.num_documents == {"train": len(TEXTS), "validation": 0}
    assert made.validation.num_tokens == 0


def test_empty_splits_and_corpora(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.txt"
    file.write_text("one line\n" * 50)
    for fraction, empty in ((1e-9, "validation"), (1 - 1e-9, "train")):
        with pytest.raises(UserError, match=f"leaves no document for {empty} among 1"):
            prepare(DataConfig(path=(str(file),), validation_fraction=fraction), tokenizer)
    file.write_text("")
    with pytest.raises(UserError, match="has no text"):
        prepare(DataConfig(path=(str(file),)), tokenizer)
    with pytest.raises(UserError, match="cannot be made"):
        prepare(DataConfig(path=(str(file),), cache_dir=str(file / "below")), tokenizer)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.suffix != ".lock" and p.name != "corpora"]


def test_skipped_files_are_counted(config, tokenizer, tmp_path: Path):
    (tmp_path / "texts" / "noise").write_bytes(b"\xff\xfe")
    assert prepare(config, tokenizer).skipped == [f"{tmp_path / 'texts' / 'noise'}: not UTF-8"]


def test_command(config, tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser.add_subparsers())
    path = tokenizer.save(tmp_path / "tokenizer")
    words = ["prepare", *config.path, "--tokenizer", str(path), "--validation-fraction", "0.1"]
    words += ["--cache-dir", str(config.cache_dir), "--exclude", "00*"]
    assert cli.main(parser.parse_args(words)) == 0
    directory, *lines = capsys.readouterr().out.splitlines()
    made = prepare(DataConfig(**{**vars(config), "exclude": ("00*",)}), tokenizer)
    assert Path(directory) == made.directory
    assert sum(made.num_documents.values()) == 190 == len(list(read_documents(config))) - 10
    assert lines[0].startswith(f"train: {made.num_documents['train']} documents, {made.num_tokens['train']} tokens")
