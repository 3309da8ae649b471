"""Files to documents: what is read, cut, skipped, held out and refused."""

import gzip
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.config import UserError
from llama_jax.data import DataConfig, read_documents, read_texts
from llama_jax.data.documents import split_of


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
    return directory


def texts(*path: str | Path, **options) -> list[str]:
    return [d.text for d in read_documents(DataConfig(path=tuple(map(str, path)), **options))]


ALL = ["naïve\r\nline 2\n", "one", "two\nlines", "one", "two\nlines", "zipped\n", "x = 1\n", "deep\x0cpage\n\n"]


def test_files_directories_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    top = make_files(tmp_path)
    assert texts(top) == ALL
    assert texts(top / "sub" / "a.py", top) == ["x = 1\n", *(t for t in ALL if t != "x = 1\n")]  # each file once
    assert texts(top / "**" / "*.txt") == ["naïve\r\nline 2\n", "deep\x0cpage\n\n"]
    assert texts(top, text_field="body", exclude=("*.txt*", "sub/*")) == ["un", "deux"] * 2
    assert texts(top, exclude=("sub/*", "*/?.jsonl*")) == ["naïve\r\nline 2\n", "zipped\n"]
    monkeypatch.setenv("CORPUS", str(top / "sub"))
    monkeypatch.chdir(top / "sub")
    assert texts("$CORPUS") == texts(".") == texts("a.py", "deep")


def test_positions_reach_the_files_size(tmp_path: Path):
    top = make_files(tmp_path)
    positions = [d.position for d in read_documents(DataConfig(path=(str(top),), document_chars=3))]
    assert positions == sorted(positions)
    assert 0 < positions[-1] <= sum(f.stat().st_size for f in top.rglob("*") if f.is_file())


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


def test_what_is_no_text_is_skipped_or_refused(tmp_path: Path):
    top = make_files(tmp_path)
    (top / "late.txt").write_bytes(b"a good line\n" * 50_000 + b"\xff")
    (top / "g.jsonl").write_text('{"text": "half \\ud800"}\n{"text": "whole"}\n')
    for document_chars in (None, 4):
        skipped: dict[Path, str] = {}
        config = DataConfig(path=(str(top),), document_chars=document_chars)
        found = [d.text for d in read_documents(config, on_skip=skipped.__setitem__)]
        assert skipped == {
            top / "g.jsonl": "line 1 has half a surrogate pair",
            top / "late.txt": "not UTF-8",
            top / "sub" / "picture.png": "not UTF-8",
        }
        assert "whole" in "".join(found)
        assert "a good line" not in "".join(found)
        with pytest.raises(UserError, match=r"picture.png' is not UTF-8 text"):
            texts(top / "sub" / "picture.png", document_chars=document_chars)


def test_wrong_inputs(tmp_path: Path):
    top = make_files(tmp_path)
    (top / "list.jsonl").write_text("[1]\n")
    (top / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (top / "cut.txt.gz").write_bytes(gzip.compress(b"zipped " * 1000)[:-9])
    (top / "no.txt.gz").write_bytes(b"zipped")
    (top / "hollow").mkdir()
    for name, options, message in (
        ("nowhere", {}, "nowhere' is no file"),
        ("*.nothing", {}, "no glob that matches"),
        ("hollow", {}, "no directory with files"),
        ("b.txt", {"exclude": ("*",)}, "leaves no file"),
        ("d.jsonl", {"text_field": "txt"}, "line 1 of .* no text in 'txt' .it has text, body.: set text_field"),
        ("list.jsonl", {}, "line 1 of .* no fields at all"),
        ("broken.jsonl", {}, "line 2 of .* is not JSON"),
        ("cut.txt.gz", {}, "damaged gzip"),
        ("no.txt.gz", {}, "damaged gzip"),
    ):
        with pytest.raises(UserError, match=message) as error:
            texts(top / name, **options)
        assert "\n" not in str(error.value)
    for options in ({"validation_fraction": 1.0}, {"document_chars": 0}, {"num_prefetch": -1}):
        with pytest.raises(UserError, match=next(iter(options))):
            DataConfig(path=("x",), **options)
    with pytest.raises(UserError, match="path is empty"):
        texts()


def test_held_out_by_content_alone(tmp_path: Path):
    names = [f"text number {i}" for i in range(2000)]
    config = DataConfig(path=(str(tmp_path),), validation_fraction=0.1)
    share = sum(split_of(name, config) == "validation" for name in names) / len(names)
    assert 0.08 < share < 0.12
    wider = DataConfig(path=(str(tmp_path),), validation_fraction=0.2)
    assert all(split_of(n, wider) == "validation" for n in names if split_of(n, config) == "validation")
    for i, name in enumerate(names[:100]):
        (tmp_path / f"{i:03}.txt").write_text(name)
    before = set(read_texts(config, "validation"))
    (tmp_path / "000a.txt").write_text("another")
    assert set(read_texts(config, "validation")) - {"another"} == before
    assert len(list(read_texts(config, "train"))) + len(list(read_texts(config, "validation"))) == 101
