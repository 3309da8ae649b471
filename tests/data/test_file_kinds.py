"""What a file is by name and content: read, or refused by its name; never silently text."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import pickle
import sqlite3
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard
from file_kinds import as_example, write_array_record
from hypothesis import given, strategies as st

from llama_jax.config import UserError
from llama_jax.data import DataConfig
from llama_jax.data.corpus.files import find_files
from llama_jax.data.readers import read_unit, units_by_shard
from llama_jax.data.readers.json_file import JsonProblem, json_values
from llama_jax.data.readers.records import BadRecord, Item, SkippedFile

BOM = b"\xef\xbb\xbf"
RECORDS = [{"text": "one"}, {"text": 'tw"o\n, [naïve]'}, {"text": "😀 } \\"}]
TEXTS = [record["text"] for record in RECORDS]


def items(*path: str | Path, **options) -> list[Item]:
    config = DataConfig(path=tuple(map(str, path)), **options)
    return [
        i for shard in units_by_shard(find_files(config), config) for unit in shard for i in read_unit(unit, config)
    ]


def texts(*path: str | Path, **options) -> list[str]:
    found = items(*path, **options)
    assert not [item for item in found if isinstance(item, BadRecord | SkippedFile)]
    return [item.parts[0] for item in found]


def jsonl(newline: str = "\n") -> bytes:
    return newline.join(map(json.dumps, RECORDS)).encode()


def csv_of(separator: str) -> bytes:
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    return "".join(f"{n}{separator}{text}\r\n" for n, text in [("n", "text"), *enumerate(quoted)]).encode()


FORMS = {
    "lines": jsonl(),
    "lines with CRLF": jsonl("\r\n") + b"\r\n",
    "lines with marks": BOM + jsonl("\n\ufeff"),
    "blank lines": b"\n\r\n" + jsonl("\n\n\n") + b"\n \n",
}
JSON_FORMS = FORMS | {
    "array": json.dumps(RECORDS).encode(),
    "array over lines": BOM + json.dumps(RECORDS, indent=2, ensure_ascii=False).replace("\n", "\r\n").encode(),
    "array with a record a line": b"[\n" + jsonl(",\n") + b"\n]\n",
    "objects over lines": b"\n".join(json.dumps(record, indent=1).encode() for record in RECORDS),
    "texts": json.dumps(TEXTS).encode(),
    "two arrays": json.dumps(RECORDS[:1]).encode() + json.dumps(RECORDS[1:]).encode(),
}
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.jsonlines", "a.ndjson", "a.NDJson"])
def test_json_lines(tmp_path: Path, name: str):
    for (form, data), (end, pack) in itertools.product(FORMS.items(), PACK.items()):
        for suffix in (end, end.upper()):
            file = tmp_path / f"{name}{suffix}"
            file.write_bytes(pack(data))
            assert texts(file) == TEXTS, (form, suffix)
            file.unlink()


def test_json_files(tmp_path: Path):
    for (form, data), name in itertools.product(JSON_FORMS.items(), ("a.json", "a.JSON.Gz")):
        (tmp_path / name).write_bytes(PACK[".gz"](data) if name.endswith("Gz") else data)
        assert texts(tmp_path / name) == TEXTS, (form, name)
    for data in (b"", b" \n", b"[]", b"[ ]\n", BOM):
        (tmp_path / "a.json").write_bytes(data)
        assert texts(tmp_path / "a.json") == []


def test_one_object_that_was_only_found_is_no_record(tmp_path: Path):
    for name, data in {
        "package.json": '{"name": "x",\n "version": 1}', "one-line.json": '{"name": "x"}', "number.json": "3\n",
        "comments.json": "{\n // none\n}", "good.json": '{"text":\n"good"}',
    }.items():  # fmt: skip
        (tmp_path / name).write_text(data)
    found = items(tmp_path)
    skipped = [item for item in found if isinstance(item, SkippedFile)]
    assert len(skipped) == 4
    assert skipped[-1].reason == "lacks a field ('text'; it has name, version: set fields)"
    assert [item.parts for item in found if item not in skipped] == [("good",)]
    for item in skipped:
        (named,) = items(item.path)
        assert str(named).startswith(f"record 1 of '{item.path}' ")


def test_bad_json_is_named_and_what_is_read_stays(tmp_path: Path):
    file = tmp_path / "a.json"
    for data, reason in (
        (b'[{"text": "a"}, {"text": 3}, {"text": "b"}]', "has a field of another type"),
        (b'[{"text": "a"}, {"text": "\xff"}, {"text": "b"}]', "is not UTF-8"),
        (b'[{"text": "a"}, {"text": "' + b"x" * 300 + b'"}, {"text": "b"}]', "is longer than max_record_bytes"),
        (b'[{"text": "a"}, {"text": }, {"text": "b"}]', "is not JSON"),
        (b'[{"text": "a"}, {"text": "c"', "is not JSON"),
        (b'[{"text": "a"}', "is not JSON"),
        (b'[{"text": "a"} {"text": "c"}]', "is not JSON"),
        (b'[{"text": "a"},]', "is not JSON"),
        (b'[{"text": "a"}, ' + b"[" * 99_999, "is not JSON"),
    ):
        file.write_bytes(data)
        good, bad, *rest = items(file, max_record_bytes=200 if b"xxx" in data else 1 << 28)
        assert (good.parts, bad.reason, bad.where) == (("a",), reason, f"record 2 of '{file}'"), data
        assert [item.parts for item in rest] == [("b",)] * (bad.detail == "" or "text, no list" in bad.detail)


class Slow(io.BytesIO):
    """Gives little at a time, and counts."""

    step, asked = 1, 0

    def read(self, size: int | None = -1) -> bytes:
        self.asked += 1
        return super().read(self.step)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES, st.integers(1, 5), st.sampled_from([None, 2]), st.booleans())
def test_json_in_any_pieces(value: object, step: int, indent: int | None, ascii_only: bool):
    content = Slow(json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode(errors="surrogatepass"))
    content.step = step
    expected = value if isinstance(value, list) else [value]
    found = list(json_values(content, 1 << 20))
    problem = [found for found, _ in found if isinstance(found, JsonProblem)]
    if not problem:  # half a surrogate pair is no UTF-8
        assert [v for v, _ in found] == expected
        assert all(in_array == isinstance(value, list) for _, in_array in found)
    else:
        assert not ascii_only
        assert any("\ud800" <= c <= "\udfff" for c in str(value) + json.dumps(value, ensure_ascii=False))


def test_a_large_array_is_not_held(tmp_path: Path):
    file = tmp_path / "large.json"
    with file.open("w") as out:
        out.write("[")
        for i in range(3000):
            out.write(("," if i else "") + json.dumps({"text": "x" * 5000}))
        out.write("]")
    tracemalloc.start()
    assert sum(1 for _ in read_unit(units_by_shard(find_files(DataConfig((str(file),))), DataConfig(()))[0][0],
                                    DataConfig((str(file),)))) == 3000  # fmt: skip
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20 < file.stat().st_size


def test_marks_and_line_ends_of_text(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_bytes(BOM + b"one\r\n" + BOM + b"two \xef\xbb\xbf\r\n")
    assert texts(file) == ["one\r\ntwo \ufeff\r\n"]
    assert texts(file, document_chars=4) == ["one\r\n", "two \ufeff\r\n"]
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(BOM + b"one\n") + gzip.compress(BOM + b"two"))
    assert texts(tmp_path / "b.txt.gz") == ["one\ntwo"]


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.CSV.gz", ","), ("a.tsv", "\t"), ("a.tab", "\t")])
def test_tables_of_text(tmp_path: Path, name: str, separator: str):
    file = tmp_path / name
    for data in (csv_of(separator), BOM + csv_of(separator).replace(b"\r\n", b"\n")):
        file.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        assert texts(file) == TEXTS
        assert [item.parts[1] for item in items(file, fields=("text", "n"))] == ["0", "1", "2"]
    with pytest.raises(UserError, match=r"a\..* has no column 'body' \(it has n, text\): set fields"):
        items(file, fields=("body",))
    assert items(tmp_path, fields=("body",)) == [SkippedFile(str(file), "has no column 'body' (it has n, text)")]


def test_bad_rows_of_tables(tmp_path: Path):
    file = tmp_path / "a.csv"
    rows = [b"n,text", b"1,good", b"2,a,b", b"3", b'4,"a"b', b"5,\xff", b"6,", b"7,,,", b"", b"8,last"]
    file.write_bytes(b"\n".join(rows))
    good, *bad, last = items(file, max_record_bytes=100)
    assert (good.parts, last.parts) == (("good",), ("last",))
    table = "is no row of the table"
    assert [item.reason for item in bad] == [table, table, table, "is not UTF-8", table]
    assert [item.where for item in bad] == [f"row {n} of '{file}'" for n in (2, 3, 4, 5, 7)]
    file.write_bytes(b'n,text\n1,good\n2,"open\n' + b"x\n" * 99)
    good, bad = items(file, max_record_bytes=50)
    assert bad.reason == "is longer than max_record_bytes"


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return out.getvalue()


def test_members_of_archives_are_files(tmp_path: Path):
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["row"]}), parquet)
    members = {
        "./z/a.txt": BOM + b"first", "b.jsonl": jsonl(), ".hidden": b"no", "x/._b.jsonl": b"\0\5",
        "c.txt.gz": gzip.compress(b"zipped"),
        "d.png": b"\x89PNG\r\n\x1a\n", "e.parquet": parquet.getvalue(), "f.json": b'{"name": 1}',
        "g.tar": tar_of({"h.txt": b"inner"}),
    }  # fmt: skip
    for name, data in (
        ("a.tar", tar_of(members)), ("a.TAR.gz", tar_of(members, "w:gz")), ("a.tgz", tar_of(members, "w:gz")),
        ("a.tar.zst", zstandard.compress(tar_of(members))), ("a.tbz2", tar_of(members, "w:bz2")),
        ("a.tar.xz", tar_of(members, "w:xz")),
    ):  # fmt: skip
        file = tmp_path / name
        file.write_bytes(data)
        found = items(file)
        skipped = {item.path: item.reason for item in found if isinstance(item, SkippedFile)}
        assert [item.parts[0] for item in found if not isinstance(item, SkippedFile)] == [
            "first", *TEXTS, "zipped", "row", "inner",
        ]  # fmt: skip
        assert list(skipped) == [f"{file}/{name}" for name in ("d.png", "f.json", "g.tar/link.txt", "link.txt")]
        assert found[0].where == f"'{file}/z/a.txt'"
        file.write_bytes(data[: len(data) // 2])
        with pytest.raises(UserError, match=r"a\.[^/]* is a damaged \w+( archive)?") as error:
            items(file)
        assert "\n" not in str(error.value)


def test_members_that_were_packed_from_elsewhere(tmp_path: Path):
    file = tmp_path / "a.tar"
    file.write_bytes(tar_of({"../up/a.txt": b"a", "/abs/b.txt": b"b", "./c.txt": b"c", "d/../.git/x": b"no"}))
    assert [item.parts[0] for item in items(file) if not isinstance(item, SkippedFile)] == ["a", "b", "c"]


def made_by_libraries(directory: Path) -> dict[str, bytes]:
    """Files of kinds that are no text, or have lost the end of their name."""
    table = pyarrow.table({"text": ["a"]})
    with zipfile.ZipFile(directory / "zip", "w") as archive:
        archive.writestr("a.txt", "a")
    pyarrow.parquet.write_table(table, directory / "parquet")
    pyarrow.feather.write_feather(table, directory / "feather")
    with pyarrow.OSFile(str(directory / "arrow"), "wb") as out, pyarrow.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    write_array_record(directory / "array_record", [as_example({"text": b"a"})])
    np.save(directory / "numpy.npy", np.zeros(3))
    with sqlite3.connect(directory / "sqlite") as database:
        database.execute("create table a (b)")
    made = {file.name: file.read_bytes() for file in directory.iterdir()}
    return made | {
        "png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff\xe0JFIF", "gif": b"GIF89a", "pdf": b"%PDF-1.7\n",
        "elf": b"\x7fELF\x02\x01", "gzip": gzip.compress(b"text"), "zstd": zstandard.compress(b"text"),
        "xz": lzma.compress(b"text"), "bzip2": bz2.compress(b"text"), "7z": b"7z\xbc\xaf\x27\x1c",
        "rar": b"Rar!\x1a\x07\x00",
        "hdf5": b"\x89HDF\r\n\x1a\n", "tar": tar_of({"a.txt": b"a"}), "gguf": b"GGUF\x03\0\0\0",
        "safetensors": (12).to_bytes(8, "little") + b'{"a":      }', "pickle": pickle.dumps([1, 2]),
        "utf-16": "text".encode("utf-16"), "utf-16-be": b"\xfe\xff" + "text".encode("utf-16-be"),
        "utf-32": "text".encode("utf-32"), "warc": b"WARC/1.0\r\n", "nuls": b"text\0text",
        "mp4": b"\0\0\0\x20ftypisom\0\0\2\0", "doc": bytes.fromhex("d0cf11e0a1b11ae1"),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["a", "a.txt", "a.jsonl", "a.json", "a.csv", "a.txt.gz"])
def test_what_is_no_text_is_refused_by_name(tmp_path_factory, name: str):
    directory = tmp_path_factory.mktemp("kinds")
    for kind, data in made_by_libraries(tmp_path_factory.mktemp("made")).items():
        file = directory / name
        file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        with pytest.raises(UserError, match=rf"{name}' is .*, which is not read: .*") as error:
            items(file)
        assert "\n" not in str(error.value)
        if kind != "nuls":
            assert "binary" not in str(error.value), kind
        (skipped,) = items(directory)
        assert skipped == SkippedFile(str(file), str(error.value).split("' is ")[1].split(", which is")[0])


def test_text_that_begins_like_another_kind_is_text(tmp_path: Path):
    for text in (
        "the ftyp box comes first", "PAR1 is a gene", "PAR1\n", "GIF89a is a format", f"{'x' * 257}ustar and more",
        "RIFF, WAVE", "PK and 7z", "BZh9", "Obj", "Rar! said he", "WARC/1.0", "SQLite format 3", "ID3 tags", "II*MM",
    ):  # fmt: skip
        (tmp_path / "a.txt").write_text(text)
        assert texts(tmp_path / "a.txt") == [text]


def test_weights_are_no_token_ids(tmp_path: Path):
    made = made_by_libraries(tmp_path)
    for kind in ("zip", "gguf", "safetensors", "numpy.npy", "png"):
        (tmp_path / "pytorch_model.bin").write_bytes(made[kind])
        with pytest.raises(UserError, match=r"pytorch_model.bin' is .*, which is not read"):
            items(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("document_chars", [None, 8])
def test_nuls_far_behind_the_beginning(tmp_path: Path, document_chars: int | None):
    file = tmp_path / "a.txt"
    file.write_bytes(b"a line\n" * 1000 + b"\0")
    assert items(tmp_path, document_chars=document_chars) == [SkippedFile(str(file), "a binary file")]
    (bad,) = items(file, document_chars=document_chars)
    assert str(bad) == f"'{file}' is no text: it has NUL bytes"
