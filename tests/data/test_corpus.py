"""Tokenized once, whole or not at all, and the text is all there."""

import dataclasses
import itertools
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import xxhash
from file_kinds import as_example, write_array_record
from hypothesis import given, strategies as st

from llama_jax.config import UserError
from llama_jax.data import Corpus, DataConfig, TokenStream, prepare_corpus
from llama_jax.data.corpus import files, shards
from llama_jax.data.readers import records
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


@pytest.mark.quick("1000")
@pytest.mark.parametrize("shard_bytes", [1 << 26, 1000])
def test_all_the_text_is_there(config, tokenizer, monkeypatch: pytest.MonkeyPatch, shard_bytes: int):
    monkeypatch.setattr(records, "SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(shards, "BATCH_CHARS", 1000)
    steps = []
    made = prepare_corpus(config, tokenizer, num_workers=1, progress=lambda done, total: steps.append((done, total)))
    for split, stream in (("train", made.train), ("validation", made.validation)):
        texts = list(made.texts(split))
        assert [tokenizer.decode(ids) for ids in documents_of(stream)] == texts
        assert all(ids[0] == 1 and ids[-1] == 2 for ids in documents_of(stream))
        assert made.num_bytes[split] == sum(len(text.encode()) for text in texts)
        assert made.num_documents[split] == stream.num_documents == len(texts) > 0
        assert made.num_tokens[split] == stream.num_tokens
        assert len(stream.shards) > 1 or shard_bytes > 1000
    assert sorted([*made.texts("train"), *made.texts("validation")]) == sorted(TEXTS)
    assert made.train.shards[0].tokens.dtype == np.uint16
    assert made.tokenizer == tokenizer.fingerprint
    assert len(steps) > 3
    assert steps == sorted(steps)
    assert steps[-1] == (sum(map(len, TEXTS)),) * 2


def test_large_vocabularies_take_four_bytes(config, tokenizer):
    wide = Counting(tokenizer)
    wide.vocab_size, wide.fingerprint = 1 << 17, "wide"
    assert prepare_corpus(config, wide).train.shards[0].tokens.dtype == np.uint32


def test_tokenizes_once_and_again_for_each_change(config, tokenizer, tmp_path: Path):
    counting = Counting(tokenizer)
    first = prepare_corpus(config, counting)
    assert counting.count == len(TEXTS)
    again = prepare_corpus(config, counting)
    assert counting.count == len(TEXTS)
    assert again.directory == first.directory
    (tmp_path / "texts").rename(tmp_path / "moved")
    moved = DataConfig(path=(str(tmp_path / "moved"),), validation_fraction=0.1, cache_dir=config.cache_dir)
    assert prepare_corpus(moved, counting).directory == first.directory
    seen = {first.content_hash}
    for change in (
        {"document_chars": 30},
        {"validation_fraction": 0.2},
        {"fields": ("body",)},
        {"max_record_bytes": 999},
    ):
        made = prepare_corpus(DataConfig(**{**vars(moved), **change}), counting)
        seen.add(made.content_hash)
    (tmp_path / "moved" / "000.txt").write_text("changed")
    seen.add(prepare_corpus(moved, counting).content_hash)
    counting.fingerprint = "another"
    seen.add(prepare_corpus(moved, counting).content_hash)
    assert len(seen) == 7


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full")])
def test_a_failure_leaves_nothing(config, tokenizer, monkeypatch: pytest.MonkeyPatch, error: BaseException):
    monkeypatch.setattr(shards, "BATCH_CHARS", 1000)
    with pytest.raises(type(error)):
        prepare_corpus(config, Counting(tokenizer, fails_at=100, error=error))
    assert list(Path(config.cache_dir).glob("corpora/*/*")) == []


@pytest.mark.parametrize("name", ["train-00000.tokens", "validation-00000.documents", "index.json"])
def test_a_damaged_cache_is_made_again(config, tokenizer, name: str):
    made = prepare_corpus(config, tokenizer)
    expected = documents_of(made.train)
    file = made.directory / name
    file.write_bytes(file.read_bytes()[:-2])
    assert documents_of(prepare_corpus(config, tokenizer).train) == expected


@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(1, 30))
def test_checksums_do_not_depend_on_how_the_bytes_come(pieces: list[bytes], block: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BLOCK", block)
        hasher, content = shards.BlockHasher(), b"".join(pieces)
        for piece in pieces:
            hasher.update(np.frombuffer(piece, np.uint8))
        parts = [content[i : i + block] for i in range(0, len(content), block)]
        assert hasher.text() == "".join(xxhash.xxh3_64_hexdigest(part) for part in parts)


@pytest.mark.parametrize("array", ["tokens", "documents"])
def test_a_flipped_byte_is_found_where_it_is_read(config, tokenizer, monkeypatch: pytest.MonkeyPatch, array: str):
    """In every place; what is in other blocks is read as before."""
    monkeypatch.setattr(shards, "BLOCK", 64)
    file = prepare_corpus(config, tokenizer).directory / f"train-00000.{array}"
    content = file.read_bytes()
    expected = Corpus(file.parent, config).train.read(0, 1 << 20)
    for place in [*range(0, len(content), max(1, len(content) // 7)), len(content) - 1]:
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        stream = Corpus(file.parent, config).train
        if array == "tokens":  # of 2 bytes each
            before, after = place // 64 * 32, (place // 64 + 1) * 32
            assert np.array_equal(stream.read(0, before), expected[:before])
            assert np.array_equal(stream.read(after, len(expected)), expected[after:])
        with pytest.raises(UserError, match=rf"train-00000.{array}' is not what was written to it"):
            stream.read(0, len(expected))
    file.write_bytes(content)
    stream = Corpus(file.parent, config).train
    os.truncate(file, len(content) - 8)  # while it is mapped
    with pytest.raises(UserError, match="was cut to"):
        stream.read(0, 9)


def test_nothing_held_out(config, tokenizer):
    made = prepare_corpus(DataConfig(**{**vars(config), "validation_fraction": 0.0}), tokenizer)
    assert made.num_documents == {"train": len(TEXTS), "validation": 0}
    assert made.validation.num_tokens == 0


def test_empty_splits_and_corpora(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.txt"
    file.write_text("one line\n" * 50)
    for fraction, empty in ((1 - 1e-9, "train"), (1e-9, "validation")):
        with pytest.raises(UserError, match=f"leaves no document for {empty} among 1"):
            prepare_corpus(DataConfig(path=(str(file),), validation_fraction=fraction), tokenizer)
    file.write_text("")
    with pytest.raises(UserError, match="has no text"):
        prepare_corpus(DataConfig(path=(str(file),)), tokenizer)
    with pytest.raises(UserError, match="cannot be a directory, because"):
        prepare_corpus(DataConfig(path=(str(file),), cache_dir=str(file / "below")), tokenizer)
    assert not [p for p in (tmp_path / "cache").glob("corpora/*") if p.suffix != ".lock"]


def test_skipped_files_are_counted(config, tokenizer, tmp_path: Path):
    (tmp_path / "texts" / "noise").write_bytes(b"\xff\xfe")
    assert prepare_corpus(config, tokenizer).skipped == [f"{tmp_path / 'texts' / 'noise'}: not UTF-8"]


def documents_and_parts(stream: TokenStream) -> list[tuple[list[int], list[int]]]:
    """Every document's tokens, and where in it its later parts begin."""
    found = []
    for shard in stream.shards:
        for a, b in itertools.pairwise([*shard.documents, len(shard.tokens)]):
            parts = shard.parts[(shard.parts >= a) & (shard.parts < b)] - a
            found.append((shard.tokens[a:b].tolist(), parts.tolist()))
    return found


@pytest.mark.parametrize("batch_chars", [1, 1 << 20])
def test_parts(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch, batch_chars: int):
    monkeypatch.setattr(shards, "BATCH_CHARS", batch_chars)
    pairs = [("a word", "ein Wort"), ("one", "eins zwei"), ("end", "x")]
    lines = [json.dumps({"de": b, "en": a}) for a, b in pairs]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = DataConfig(path=(str(tmp_path / "a.jsonl"),), fields=("en", "de"), validation_fraction=0.0)
    config = dataclasses.replace(config, cache_dir=str(tmp_path / "cache"))
    made = prepare_corpus(config, tokenizer)
    expected = [[tokenizer.encode(a, bos=True), tokenizer.encode(b, eos=True)] for a, b in pairs]
    assert documents_and_parts(made.train) == [(a + b, [len(a)]) for a, b in expected]
    assert made.num_bytes["train"] == sum(len(a) + len(b) for a, b in pairs)
    assert prepare_corpus(dataclasses.replace(config, fields=("de", "en")), tokenizer).content_hash != made.content_hash
    assert next(iter(made.texts("train"))) == "a word"


def arrays_of(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in directory.iterdir() if f.suffix in (".tokens", ".documents", ".parts")}


def test_text_and_its_tokens_are_the_same_shards(tmp_path: Path, tokenizer):
    """In every format that holds ids, with and without the BOS and EOS that they may have."""
    ids = [tokenizer.encode(text) for text in TEXTS]
    marked = [tokenizer.encode(text, bos=True, eos=True) for text in TEXTS]
    make = {
        "text.jsonl": lambda f: f.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS)),
        "ids.jsonl": lambda f: f.write_text("\n".join(json.dumps({"text": i}) for i in ids)),
        "marked.jsonl": lambda f: f.write_text("\n".join(json.dumps({"text": i}) for i in marked)),
        "text.parquet": lambda f: parquet.write_table(pyarrow.table({"text": TEXTS}), f, row_group_size=50),
        "ids.parquet": lambda f: parquet.write_table(pyarrow.table({"text": ids}), f, row_group_size=50),
        "ids.array_record": lambda f: write_array_record(f, [as_example({"text": i}) for i in ids]),
        "nanogpt.bin": lambda f: np.concatenate([i[1:] for i in marked]).astype("<u2").tofile(f),
        "llmc.bin": lambda f: np.concatenate([i[:-1] for i in marked]).astype("<u2").tofile(f),
    }
    found = {}
    for name, write in make.items():
        write(tmp_path / name)
        config = DataConfig(path=(str(tmp_path / name),), validation_fraction=0.0, cache_dir=str(tmp_path / "cache"))
        made = prepare_corpus(config, tokenizer)
        found[name] = arrays_of(made.directory)
        assert made.num_bytes["train"] == (sum(map(len, TEXTS)) if name.startswith("text") else 0)
    assert found["text.jsonl"].keys() == {"train-00000.tokens", "train-00000.documents"}
    assert [name for name, arrays in found.items() if arrays != found["text.jsonl"]] == []


def test_ids_outside_the_vocabulary(tmp_path: Path, tokenizer):
    for wrong in (290, -1):
        (tmp_path / "a.jsonl").write_text(f'{{"text": [1, 289]}}\n{{"text": [5, {wrong}]}}')
        with pytest.raises(UserError, match=f"line 2 of .*a.jsonl' has the id {wrong}, outside .* vocabulary of 290"):
            prepare_corpus(DataConfig(path=(str(tmp_path / "a.jsonl"),), cache_dir=str(tmp_path / "cache")), tokenizer)


def test_chats_need_a_template(tmp_path: Path, tokenizer):
    (tmp_path / "a.jsonl").write_text(
        '{"text": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}'
    )
    with pytest.raises(UserError, match="holds the messages of a chat: set chat_template"):
        prepare_corpus(DataConfig(path=(str(tmp_path / "a.jsonl"),), cache_dir=str(tmp_path / "cache")), tokenizer)


def test_bad_records_up_to_a_limit(tmp_path: Path, tokenizer):
    lines = ['{"text": "good"}', "{", '{"txt": 1}', '{"text": "half \\ud800"}', '{"text": "fine"}', "{"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = DataConfig(path=(str(tmp_path / "a.jsonl"),), validation_fraction=0.0, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"line 2 of .* is not JSON .*: repair it, or raise max_bad_records=0"):
        prepare_corpus(config, tokenizer)
    with pytest.raises(UserError, match=r"4 records are bad, first line 2 of .*; line 3 of .*; line 4 of [^;]* repair"):
        prepare_corpus(dataclasses.replace(config, max_bad_records=3), tokenizer)
    for limit in (4, None):
        made = prepare_corpus(dataclasses.replace(config, max_bad_records=limit), tokenizer)
        assert list(made.texts("train")) == ["good", "fine"]
        assert made.num_documents["train"] == 2
        reasons = {"has half a surrogate pair": 1, "is not JSON": 2, "lacks a field": 1}
        assert made.bad_records["reasons"] == reasons
        assert len(made.bad_records["first"]) == 4
    with pytest.raises(UserError, match="4 records are bad"):  # the tokenized corpus is there, and its limit is lower
        prepare_corpus(dataclasses.replace(config, max_bad_records=3), tokenizer)


def test_contents_are_hashed_once(config, tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    old = 1_000_000_000
    for file in (tmp_path / "texts").iterdir():
        os.utime(file, (old, old))
    first = prepare_corpus(config, tokenizer)
    opened, open_file = [], files.open_file
    monkeypatch.setattr(files, "open_file", lambda path: opened.append(path) or open_file(path))
    assert prepare_corpus(config, tokenizer).content_hash == first.content_hash
    assert opened == []
    file = tmp_path / "texts" / "007.txt"
    file.write_text("changed")  # its time is so new that it may change again unseen
    for _ in range(2):
        assert prepare_corpus(config, tokenizer).content_hash != first.content_hash
    assert opened == [str(file)] * 2


def test_a_store_is_known_by_its_tags(tokenizer, tmp_path: Path):
    store = fsspec.filesystem("memory")
    config = DataConfig(path=("memory://tagged",), validation_fraction=0.0, cache_dir=str(tmp_path / "cache"))
    try:
        store.pipe("/tagged/a.txt", b"one text")
        first = prepare_corpus(config, tokenizer)
        assert list(first.texts("train")) == ["one text"]
        assert prepare_corpus(config, tokenizer).directory == first.directory
        store.pipe("/tagged/a.txt", b"two text")
        assert prepare_corpus(config, tokenizer).directory != first.directory
    finally:
        store.rm("/tagged", recursive=True)
