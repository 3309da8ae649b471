"""Every kind of file gives the same documents, whole or in any number of pieces."""

import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from file_kinds import as_example, write_array_record
from hypothesis import given, strategies as st

from llama_jax.config import UserError
from llama_jax.data import DataConfig, readers
from llama_jax.data.corpus.files import find_files
from llama_jax.data.readers import read_unit, records, units_by_shard
from llama_jax.data.readers.binary import example
from llama_jax.data.readers.records import BadRecord, CorpusFile, Record, Unit

EOS = 50256
IDS = [[1, 2, 3], [70, 40000], [5], [9] * 30, [0, 65535]]
TEXTS = ["one", "naïve\r\nline\u2028 2\n", "x" * 5000, "{", "last"]


def read(path: Path | str, *, count: int = 1, separators=(EOS,), **options) -> list[Record | BadRecord]:
    """All records of a file that is read in `count` pieces."""
    config = DataConfig(path=(str(path),), **options)
    (file,) = find_files(config)
    return [item for i in range(count) for item in read_unit(Unit(file, i, count), config, separators)]


def ids_of(records: list[Record | BadRecord]) -> list[list[int]]:
    return [record.parts[0].tolist() for record in records]


def texts_of(records: list[Record | BadRecord]) -> list[str]:
    return [record.parts[0] for record in records]


def write_bin(file: Path, documents: list[list[int]], *, after: bool = True) -> Path:
    """As nanoGPT writes it."""
    ids = [i for document in documents for i in ([*document, EOS] if after else [EOS, *document])]
    file.write_bytes(np.array(ids, "<u2").tobytes())
    return file


@given(
    lines=st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=12),
    count=st.integers(1, 30), ends=st.booleans(), limit=st.integers(1, 14),
)  # fmt: skip
def test_any_cut_of_jsonl_gives_the_same_lines(tmp_path_factory, lines, count: int, ends: bool, limit: int):
    from llama_jax.data.readers.text import lines_of

    data = b"\n".join(lines) + b"\n" * ends
    file = tmp_path_factory.mktemp("cut") / "a.jsonl"
    file.write_bytes(data)
    unit = CorpusFile(str(file), len(data), named=True)
    found = []
    for i in range(count):
        with file.open("rb") as content:
            found += lines_of(content, Unit(unit, i, count), limit)
    place, expected = 0, []
    for line in data.splitlines(keepends=True) if b"\r" not in data else data.replace(b"\r", b"r").splitlines(True):
        whole = data[place : place + len(line)]
        expected.append((place, whole if len(whole.removesuffix(b"\n")) <= limit else None))
        place += len(line)
    assert found == expected


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_jsonl_pieces(tmp_path: Path, count: int):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": text, "tokens": ids}) for text, ids in zip(TEXTS, IDS, strict=True)))
    assert texts_of(read(file, count=count)) == TEXTS
    assert ids_of(read(file, count=count, fields=("tokens",))) == IDS
    last = read(file, count=count)[-1].where
    begin = file.read_bytes().rindex(b"\n") + 1
    assert last == (f"line 5 of '{file}'" if count == 1 else f"the line at byte {begin} of '{file}'")


def test_text_pieces(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_text("".join(f"line {i} naïve\n" for i in range(200)))
    whole = read(file, document_chars=100)
    for count in (2, 5):
        pieces = read(file, count=count, document_chars=100)
        assert "".join(texts_of(pieces)) == "".join(texts_of(whole)) == file.read_text()
        assert len(whole) <= len(pieces) <= len(whole) + count
    assert f"part 2 of 5 of '{file}'" in {record.where for record in pieces}


def table() -> pyarrow.Table:
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    ids = pyarrow.array(IDS, pyarrow.list_(pyarrow.int32()))
    return pyarrow.table({"text": TEXTS, "tokens": ids, "chat": chats, "n": range(5)})


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_parquet(tmp_path: Path, count: int):
    file = tmp_path / "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(table(), file, row_group_size=2)
    assert texts_of(read(file, count=count)) == TEXTS
    assert ids_of(read(file, count=count, fields=("tokens",))) == IDS
    chats = [record.parts[0] for record in read(file, count=count, fields=("chat",))]
    assert chats == [[{"role": "user", "content": text}] for text in TEXTS]
    assert read(file, count=count)[-1].where == f"row 5 of '{file}'"
    with pytest.raises(UserError, match=r"has no column 'body' .it has text, tokens, chat, n.: set fields"):
        read(file, fields=("body",))


def test_bad_rows(tmp_path: Path):
    file = tmp_path / "a.parquet"
    binary = pyarrow.array([b"good", b"\xff", None, b"too long"])
    pyarrow.parquet.write_table(pyarrow.table({"text": binary, "n": [1, 2, 3, 4]}), file)
    good, *bad = read(file, max_record_bytes=5)
    assert good.parts == ("good",)
    assert [item.reason for item in bad] == ["is not UTF-8", "lacks a field", "is longer than max_record_bytes"]
    assert {item.reason for item in read(file, fields=("n",))} == {"has a field of another type"}
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a.parquet' is a damaged file") as error:
        read(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_array_record(tmp_path: Path, count: int):
    pairs = list(zip(TEXTS, IDS, strict=True))
    examples = [as_example({"text": t.encode(), "tokens": i, "score": 0.5}, packed=len(i) > 1) for t, i in pairs]
    objects = [json.dumps({"text": text, "tokens": ids}).encode() for text, ids in pairs]
    for written in (examples, objects):
        file = write_array_record(tmp_path / "a.array_record-00000-of-00001", written)
        assert texts_of(read(file, count=count)) == TEXTS
        assert ids_of(read(file, count=count, fields=("tokens",))) == IDS
    assert read(file, count=count)[-1].where == f"record 5 of '{file}'"


def test_bad_array_records(tmp_path: Path):
    good = as_example({"text": b"good", "tokens": [-1, 300, 2**62], "score": 1.0})
    records = [good, b"", b"plain", good[:-1], as_example({"text": b"\xff"}), as_example({"other": b"a"}), b"{"]
    file = write_array_record(tmp_path / "a.arrayrecord", records)
    found = read(file)
    assert found[0].parts == ("good",)
    reasons = ["lacks a field", "is not JSON", "is not JSON", "is not UTF-8", "lacks a field", "is not JSON"]
    assert [item.reason for item in found[1:]] == reasons
    assert read(file, fields=("score",))[0].reason == "lacks a field"
    assert ids_of(read(file, fields=("tokens",))[:1]) == [[-1, 300, 2**62]]
    whole = file.read_bytes()
    for size in (len(whole) // 2, len(whole) - 1, 100):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match="is a damaged ArrayRecord file"):
            read(file)


@given(st.lists(st.integers(-(2**63), 2**63 - 1)), st.booleans())
def test_integers_of_an_example(values: list[int], packed: bool):
    ((name, found),) = example(as_example({"ids": values}, packed=packed)).items()
    assert name == "ids"
    assert isinstance(found, np.ndarray)
    assert found.tolist() == values


@given(
    documents=st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=9), count=st.integers(1, 40),
    after=st.booleans(), batch=st.integers(1, 9),
)  # fmt: skip
def test_token_files_in_any_pieces(tmp_path_factory, documents, count: int, after: bool, batch: int):
    file = write_bin(tmp_path_factory.mktemp("tokens") / "a.bin", documents, after=after)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_jax.data.readers.binary.BATCH_TOKENS", batch)
        assert ids_of(read(file, count=count)) == [document for document in documents if document]


def test_llm_c_files(tmp_path: Path):
    file = tmp_path / "a.bin"
    for magic, version, dtype in ((20240520, 1, "<u2"), (20240801, 7, "<u4")):
        ids = np.array([i for document in IDS for i in (EOS, *document)], dtype)
        header = np.zeros(256, "<i4")
        header[:3] = magic, version, len(ids)
        file.write_bytes(header.tobytes() + ids.tobytes())
        for count in (1, 4):
            assert ids_of(read(file, count=count)) == IDS
        file.write_bytes(file.read_bytes()[:-4])
        with pytest.raises(UserError, match="its header has"):
            read(file)
    file.write_bytes(b"odd")
    with pytest.raises(UserError, match="odd number of bytes"):
        read(file)
    with pytest.raises(UserError, match="needs a tokenizer with a token that ends"):
        read(file, separators=())
    write_bin(file, [[1], [2] * 9, [3]])
    one, long, three = read(file, max_record_bytes=8)
    assert ids_of([one, three]) == [[1], [3]]
    assert str(long) == f"the document at token 2 of '{file}' is longer than max_record_bytes"


def test_all_kinds_in_an_object_store(tmp_path: Path):
    pyarrow.parquet.write_table(table(), tmp_path / "a.parquet")
    write_array_record(tmp_path / "a.array_record", [as_example({"text": text.encode()}) for text in TEXTS])
    write_bin(tmp_path / "a.bin", IDS[:3])
    store = fsspec.filesystem("memory")
    store.put(f"{tmp_path}/", "/kinds", recursive=True)
    try:
        for name in ("a.parquet", "a.array_record"):
            assert texts_of(read(f"memory://kinds/{name}", count=2)) == TEXTS
        assert ids_of(read("memory://kinds/a.bin", count=2)) == IDS[:3]
    finally:
        store.rm("/kinds", recursive=True)


def test_hugging_face_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset(table())
    made.save_to_disk(tmp_path / "saved", num_shards=2)
    config = DataConfig(path=(str(tmp_path / "saved"),))
    (shard,) = units_by_shard(find_files(config), config)
    assert [record.parts[0] for unit in shard for record in read_unit(unit, config)] == TEXTS
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match="splits train, test: name one"):
        read(tmp_path / "both")
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(2):
        made.select(range(2 * i, 2 * i + 2 + i)).to_parquet(folder / f"train-{i}.parquet")
    config = DataConfig(path=(f"hf://{folder}:train",))
    (file,) = find_files(config)
    assert file.pieces == 2
    found = [record for shard in units_by_shard([file], config) for u in shard for record in read_unit(u, config)]
    assert texts_of(found) == TEXTS
    assert found[-1].where == f"row 3 of file 2 of 'hf://{folder}:train'"
    assert ids_of(list(read_unit(Unit(file, 0, 2), DataConfig(path=config.path, fields=("tokens",))))) == IDS[:2]
    with pytest.raises(UserError, match="must name its split"):
        read("hf://some/dataset")
    with pytest.raises(UserError, match="cannot be read"):
        read(f"hf://{tmp_path}/absent:train")
    with pytest.raises(UserError, match="has no column 'body'"):
        read_all(DataConfig(path=config.path, fields=("body",)))


def read_all(config: DataConfig) -> list[Any]:
    return [r for s in units_by_shard(find_files(config), config) for unit in s for r in read_unit(unit, config)]


def test_units_follow_from_names_and_sizes(monkeypatch: pytest.MonkeyPatch):
    config = DataConfig(path=("x",))
    sizes = {"a.jsonl": 1000, "b.txt": 10, "c.txt": 10, "d.jsonl.gz": 500, "e.parquet": 250, "f.bin": 99, "g.txt": 1}
    monkeypatch.setattr(records, "SHARD_BYTES", 100)
    shards = units_by_shard([CorpusFile(name, size, named=True) for name, size in sizes.items()], config)
    names = [[f"{unit.file.path} {unit.index}/{unit.count}" for unit in shard] for shard in shards]
    assert names == [
        *([f"a.jsonl {i}/10"] for i in range(10)),
        ["b.txt 0/1", "c.txt 0/1", "d.jsonl.gz 0/1"],
        ["e.parquet 0/2"], ["e.parquet 1/2"], ["f.bin 0/1", "g.txt 0/1"],
    ]  # fmt: skip
    assert sum(unit.size for shard in shards for unit in shard) == sum(sizes.values())
    monkeypatch.setattr(readers, "MAX_SHARDS", 4)
    assert len(units_by_shard([CorpusFile("a.jsonl", 1000, named=True)], config)) == 4
