"""Files to documents: what is found, cut, skipped, held out and refused."""

import gzip
import itertools
import json
from pathlib import Path

import fsspec
import pytest
import zstandard
from hypothesis import given, strategies as st

from llama_jax.config import UserError
from llama_jax.data import DataConfig, read_texts
from llama_jax.data.corpus.documents import split_of
from llama_jax.data.corpus.files import find_files
from llama_jax.data.readers import read_unit, units_by_shard
from llama_jax.data.readers.records import BadRecord, Record, SkippedFile
from llama_jax.tokenizers import train_tokenizer


def make_files(directory: Path) -> Path:
    (directory / "sub" / "deep").mkdir(parents=True)
    (directory / "b.txt").write_bytes("naïve\r\nline 2\n".encode())
    (directory / "sub" / "a.py").write_text("x = 1\n")
    (directory / "sub" / "deep" / "c.txt").write_text("deep\x0cpage\n\n")
    (directory / "sub" / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (directory / "empty.txt").write_text("")
    records = [{"text": "one", "body": "un"}, {"text": "two\nlines", "body": "deux"}, {"text": "", "body": ""}]
    lines = "\n\n".join(json.dumps(record) for record in records)
    (directory / "d.jsonl").write_text(lines)
    (directory / "e.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (directory / "f.txt.gz").write_bytes(gzip.compress(b"zipped\n"))
    (directory / "g.json.zst").write_bytes(zstandard.compress(lines.encode()))
    (directory / "h.json").write_text('{\n "text": "no lines",\n "body": "aucune"\n}\n')
    return directory


def items(*path: str | Path, **options) -> list[Record | BadRecord | SkippedFile]:
    config = DataConfig(path=tuple(map(str, path)), **options)
    shards = units_by_shard(find_files(config), config)
    return [item for shard in shards for unit in shard for item in read_unit(unit, config)]


def texts(*path: str | Path, **options) -> list[str]:
    return list(read_texts(DataConfig(path=tuple(map(str, path)), validation_fraction=0.0, **options), "train"))


TWO = ["one", "two\nlines"]
LATER = ["zipped\n", *TWO, "no lines", "x = 1\n", "deep\x0cpage\n\n"]
ALL = ["naïve\r\nline 2\n", *TWO, *TWO, *LATER]


def test_files_directories_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    top = make_files(tmp_path)
    assert texts(top) == ALL
    assert texts(top / "sub" / "a.py", top) == ["x = 1\n", *(t for t in ALL if t != "x = 1\n")]  # each file once
    assert texts(top / "**" / "*.txt") == ["naïve\r\nline 2\n", "deep\x0cpage\n\n"]
    assert texts(top, fields=("body",), exclude=("*.txt*", "sub/*", "h.json")) == ["un", "deux"] * 3
    assert texts(top, exclude=("sub/*", "*/?.json*")) == ["naïve\r\nline 2\n", "zipped\n"]
    monkeypatch.setenv("CORPUS", str(top / "sub"))
    monkeypatch.chdir(top / "sub")
    assert texts("$CORPUS") == texts(".") == texts("a.py", "deep")


def test_object_stores_are_as_disks(tmp_path: Path):
    top = make_files(tmp_path)
    store = fsspec.filesystem("memory")
    store.put(f"{top}/", "/corpus", recursive=True)
    try:
        assert texts("memory://corpus") == ALL
        assert texts("memory://corpus/sub/*.py") == ["x = 1\n"]
        assert texts("memory://corpus/d.jsonl") == TWO
        assert texts("memory://corpus", exclude=("sub/*", "*/?.json*")) == ["naïve\r\nline 2\n", "zipped\n"]
        with pytest.raises(UserError, match="is no file, no directory"):
            texts("memory://nowhere")
    finally:
        store.rm("/corpus", recursive=True)


@pytest.mark.parametrize(("url", "package"), [("abfs://bucket/key", "adlfs"), ("gs://bucket/key", "gcsfs")])
def test_a_store_whose_package_is_missing(url: str, package: str):
    with pytest.raises(UserError, match=f"needs a package that is not installed .*{package}") as error:
        texts(url)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no file system that fsspec knows"):
        texts("nonsense://x")


def test_several_fields_are_parts(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"en": "one", "de": "eins"}\n{"en": "two", "de": ""}\n{"de": "drei", "en": "3"}')
    found = items(tmp_path / "a.jsonl", fields=("en", "de"))
    assert [item.parts for item in (found[0], found[2])] == [("one", "eins"), ("3", "drei")]
    assert [str(item.where) for item in found[1:]] == [f"line {n} of '{tmp_path / 'a.jsonl'}'" for n in (2, 3)]
    assert found[1].reason == "has a part without tokens"


@given(text=st.text("ab\n\r\x0cé"), document_chars=st.integers(1, 8))
def test_cut_at_line_ends(tmp_path_factory, text: str, document_chars: int):
    directory = tmp_path_factory.mktemp("cut")
    (directory / "a.txt").write_bytes(text.encode())
    (directory / "a.jsonl").write_text(json.dumps({"text": text}))
    parts = texts(directory / "a.txt", document_chars=document_chars)
    assert parts == texts(directory / "a.jsonl", document_chars=document_chars)
    assert "".join(parts) == text
    assert all(part.endswith("\n") for part in parts[:-1])
    assert all(len(part) <= document_chars or part.count("\n", 0, -1) == 0 for part in parts)
    assert all(len(a + b.split("\n")[0]) >= document_chars for a, b in itertools.pairwise(parts))


@pytest.mark.parametrize("document_chars", [None, 4])
def test_what_is_no_text_is_skipped_or_bad(tmp_path: Path, document_chars: int | None):
    top = make_files(tmp_path)
    late = top / "late.txt"
    late.write_bytes(b"a good line\n" * 50_000 + b"\xff")
    found = items(top, document_chars=document_chars)
    skipped = [item for item in found if isinstance(item, SkippedFile)]
    assert skipped == [SkippedFile(str(file), "not UTF-8") for file in (late, top / "sub" / "picture.png")]
    assert not any(isinstance(item, BadRecord) or "a good line" in str(item) for item in found)
    picture = top / "sub" / "picture.png"
    assert list(map(str, items(picture, document_chars=document_chars))) == [f"'{picture}' is not UTF-8"]


def test_a_number_is_a_label_as_its_digits_and_no_text(tmp_path: Path):
    file = tmp_path / "labels.jsonl"
    file.write_text('{"text": "a", "label": 12}\n{"text": "b", "label": true}\n{"text": 3, "label": 4}\n')
    good, *bad = items(file, fields=("text", "label"))
    assert good.parts == ("a", "12")
    assert ["has a field of another type" in str(item) for item in bad] == [True, True]


def test_bad_records_are_named(tmp_path: Path):
    file = tmp_path / "bad.jsonl"
    lines = [
        b'{"text": "good"}', b'{"text": "\xff"}', b'{"text": ', b'{"txt": "a", "n": 1}', b"[1]", b'{"text": 3}',
        b'{"text": null}', b'{"text": [1, "a"]}', b'{"text": [true]}', b'{"text": "' + b"x" * 300 + b'"}',
        b"[" * 99_999,
        b'{"text": "last"}',
    ]  # fmt: skip
    file.write_bytes(b"\n".join(lines))
    good, *bad, last = items(file, max_record_bytes=200)
    assert (good.parts, last.parts) == (("good",), ("last",))
    assert [str(item).replace(f"of '{file}' ", "")[5:] for item in bad] == [
        "2 is not UTF-8",
        "3 is not JSON (Expecting value: line 2 column 1 (char 10))",
        "4 lacks a field ('text'; it has txt, n: set fields)",
        "5 lacks a field (it has no fields at all)",
        "6 has a field of another type ('text' is no text, no list of token ids and no list of messages)",
        "7 lacks a field ('text' is null)",
        "8 has a field of another type ('text' is no text, no list of token ids and no list of messages)",
        "9 has a field of another type ('text' is no text, no list of token ids and no list of messages)",
        "10 is longer than max_record_bytes",
        "11 is longer than max_record_bytes",
    ]
    assert "is not JSON" in str(items(file, max_record_bytes=100_000)[10])


@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
def test_long_files_are_bad_records(tmp_path: Path, end: str):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[end]
    (tmp_path / f"a.txt{end}").write_bytes(pack(b"x" * 100 + b"\nshort"))
    (tmp_path / f"b.txt{end}").write_bytes(pack(b"x" * 99))
    a, b = items(tmp_path, max_record_bytes=99)
    assert str(a) == f"'{tmp_path / 'a.txt'}{end}' is longer than max_record_bytes"
    assert b.parts == ("x" * 99,)
    a, *rest = items(tmp_path, max_record_bytes=99, document_chars=3)
    assert str(a) == f"the line at byte 0 of '{tmp_path / 'a.txt'}{end}' is longer than max_record_bytes"
    assert [record.parts[0] for record in rest] == ["short", "x" * 99]


def test_zstd_in_several_frames(tmp_path: Path):
    frames = [zstandard.compress(line) for line in (b'{"text": "a', b'b"}\n{"text": "c"}\n', b"", b'{"text": "d"}')]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert texts(tmp_path) == ["ab", "c", "d"]


def test_wrong_inputs(tmp_path: Path):
    top = make_files(tmp_path)
    (top / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (top / "half.jsonl").write_text('{"text": "a"}\n{"text": "half \\ud800"}\n')
    (top / "cut.txt.gz").write_bytes(gzip.compress(b"zipped " * 1000)[:-9])
    (top / "no.txt.gz").write_bytes(b"zipped")
    (top / "cut.txt.zst").write_bytes(zstandard.compress(b"zipped " * 1000)[:-1])
    (top / "no.jsonl.zst").write_bytes(b"zipped")
    (top / "hollow").mkdir()
    for name, options, message in (
        ("nowhere", {}, "nowhere' is no file"),
        ("*.nothing", {}, "no glob that matches"),
        ("hollow", {}, "no directory with files"),
        ("b.txt", {"exclude": ("*",)}, "leaves no file"),
        ("d.jsonl", {"fields": ("txt",)}, "line 1 of .* lacks a field .'txt'; it has text, body: set fields.*repair"),
        ("broken.jsonl", {}, "line 2 of .* is not JSON"),
        ("half.jsonl", {}, "line 2 of .* has half a surrogate pair"),
        ("sub/picture.png", {}, "picture.png' is not UTF-8.*max_bad_records"),
        ("cut.txt.gz", {}, "damaged gzip"),
        ("no.txt.gz", {}, "damaged gzip"),
        ("cut.txt.zst", {}, "damaged zstd"),
        ("no.jsonl.zst", {}, "damaged zstd"),
    ):
        with pytest.raises(UserError, match=message) as error:
            texts(top / name, **options)
        assert "\n" not in str(error.value)
    for options in (
        {"validation_fraction": 1.0}, {"document_chars": 0}, {"num_prefetch": -1}, {"fields": ()},
        {"fields": ("a", "a")}, {"max_record_bytes": 0}, {"max_bad_records": -1},
        {"document_chars": 9, "fields": ("a", "b")},
    ):  # fmt: skip
        with pytest.raises(UserError, match=next(iter(options))):
            DataConfig(path=("x",), **options)
    with pytest.raises(UserError, match="path is empty"):
        texts()


def test_what_is_wrong_is_told_while_a_tokenizer_is_trained(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{')
    with pytest.raises(UserError, match=r"line 2 of .* is not JSON"):
        train_tokenizer(read_texts(DataConfig(path=(str(tmp_path),)), "train"), vocab_size=280)


def test_held_out_by_content_alone(tmp_path: Path):
    names = [f"text number {i}" for i in range(2000)]
    config = DataConfig(path=(str(tmp_path),), validation_fraction=0.1)
    share = sum(split_of(name.encode(), config) == "validation" for name in names) / len(names)
    assert 0.08 < share < 0.12
    wider = DataConfig(path=(str(tmp_path),), validation_fraction=0.2)
    held_out = [name for name in names if split_of(name.encode(), config) == "validation"]
    assert all(split_of(name.encode(), wider) == "validation" for name in held_out)
    for i, name in enumerate(names[:100]):
        (tmp_path / f"{i:03}.txt").write_text(name)
    before = set(read_texts(config, "validation"))
    (tmp_path / "000a.txt").write_text("another")
    assert set(read_texts(config, "validation")) - {"another"} == before
    assert len(list(read_texts(config, "train"))) + len(list(read_texts(config, "validation"))) == 101
