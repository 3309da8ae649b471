"""A file that is four times as long takes about four times as long to read, in processor time."""

import io
import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hostile_cases import GOLDENS, a_tensor, as_zip, safetensors, text
from hostile_fuzz import weights
from hostile_texts import ModelProto, reads

from llama_jax.checkpoint.generation import read_generation
from llama_jax.gguf_header import read_header
from llama_jax.tokenizers import load_tokenizer

RATIO = 8.0
SECONDS = 0.1  # that the shorter file has to take at least: less is noise
MOST = 1 << 20  # of what is counted, however fast a reader is: longer records are refused


def of_tensors(n: int) -> bytes:
    entries = {f"w{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(n)}
    return safetensors(entries, bytes(4 * n))


def of_state(n: int) -> bytes:
    return as_zip(b"\x80\x02}" + b"".join(text(f"w{i}") + a_tensor() + b"s" for i in range(n)) + b".")


def of_gguf(n: int) -> bytes:
    def string(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    keys = b"".join(string(f"k{i}") + struct.pack("<II", 4, i) for i in range(n))
    return b"GGUF" + struct.pack("<IQQ", 3, 0, n) + keys


def of_pieces(n: int) -> bytes:
    model = ModelProto.FromString((GOLDENS / "t5_v1_1" / "spiece.model").read_bytes())
    for i in range(n):
        model.pieces.add(piece=f"x{i}", score=-float(i))
    return model.SerializeToString()


def of_vocabulary(n: int) -> bytes:
    data = json.loads((GOLDENS / "gpt2" / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    for i in range(n):
        vocabulary.setdefault(f"x{i}", len(vocabulary))
    return json.dumps(data).encode()


def table(n: int) -> pyarrow.Table:
    return pyarrow.table({"text": ["a b c"] * n})


def of_parquet(n: int) -> bytes:
    held = io.BytesIO()
    pyarrow.parquet.write_table(table(n), held)
    return held.getvalue()


def of_arrow(n: int) -> bytes:
    held = io.BytesIO()
    with pyarrow.ipc.new_stream(held, table(n).schema) as writer:
        writer.write_table(table(n))
    return held.getvalue()


def array_records(n: int, file: Path) -> None:
    records = ArrayRecordWriter(str(file), "group_size:1")
    for _ in range(n):
        records.write(b'{"text": "a"}')
    records.close()


READERS: dict[str, tuple[str, Callable[[int], bytes], Callable[[Path], object]]] = {
    "safetensors": ("model.safetensors", of_tensors, weights),
    "pickle": ("pytorch_model.bin", of_state, weights),
    "GGUF": ("model.gguf", of_gguf, read_header),
    "generation_config.json": (
        "generation_config.json",
        lambda n: json.dumps({"eos_token_id": [*range(n)]}).encode(),
        lambda path: read_generation(path.parent),
    ),
    "tokenizer.json": ("tokenizer.json", of_vocabulary, load_tokenizer),
    "SentencePiece": ("spiece.model", of_pieces, load_tokenizer),
    "vocab.txt": (
        "vocab.txt",
        lambda n: "\n".join(["[UNK]", "[CLS]", "[SEP]", *(f"x{i}" for i in range(n))]).encode(),
        load_tokenizer,
    ),
    "JSONL": ("a.jsonl", lambda n: b'{"text": "hello"}\n' * n, reads),
    "a line of JSONL": ("a.jsonl", lambda n: b'{"text": "' + b"hello\\n" * n + b'"}\n', reads),
    "JSON": ("a.json", lambda n: b"[" + b'{"text": "a"},' * n + b'{"text": "a"}]', reads),
    "a value of JSON": ("a.json", lambda n: b'[{"text": "' + b"hello\\n" * n + b'"}]', reads),
    "CSV": ("a.csv", lambda n: b"text,b\n" + b'"a ""b""",c\n' * n, reads),
    "a cell of CSV": ("a.csv", lambda n: b'text,b\n"' + b'a ""b""\n' * n + b'",c\n', reads),
    "text": ("a.txt", lambda n: b"a b c\n" * n, reads),
    "Parquet": ("a.parquet", of_parquet, reads),
    "Arrow": ("a.arrow", of_arrow, reads),
    "ArrayRecord": ("a.array_record", lambda n: b"", reads),
}


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_time_grows_with_the_size(reader: str, tmp_path: Path, tally: Any):
    name, make, enter = READERS[reader]

    def seconds(n: int) -> float:
        file = tmp_path / name
        array_records(n, file) if reader == "ArrayRecord" else file.write_bytes(make(n))
        times = []
        for _ in range(2):
            began = time.process_time()
            enter(file)
            times.append(time.process_time() - began)
        return min(times)

    seconds(10)  # what is done once
    n = 1000
    while (short := seconds(n)) < SECONDS and n < MOST:
        n *= 4
    ratio = seconds(4 * n) / short
    tally(
        f"time of a reader: {reader}",
        f"four times the size takes less than {RATIO:.0f} times the time",
        tried=1,
        held=int(ratio < RATIO),
        figures=f"{ratio:.1f} times, from {short:.2f} s",
    )
