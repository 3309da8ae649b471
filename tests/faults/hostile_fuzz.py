"""Small whole files of every format with bytes flipped, cut off, put in and taken from elsewhere."""

import io
import json
import pickle
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from array_record.python.array_record_module import ArrayRecordWriter
from gguf_maker import write_gguf
from hostile_cases import GOLDENS, Hostile, a_tensor, as_zip, text
from hostile_texts import reads, tries

from llama_jax.checkpoint import config_of
from llama_jax.checkpoint.formats import read_directory, read_llama2c
from llama_jax.checkpoint.generation import read_generation
from llama_jax.gguf_header import read_header
from llama_jax.tokenizers import render

ROOT = Path(__file__).resolve().parents[2]
LLAMA, SLOW, GPT2 = (GOLDENS / name for name in ("llama2", "llama_slow", "gpt2_slow"))


def weights(path: Path) -> None:
    """Read every tensor of a directory."""
    for tensor in read_directory(path.parent).values():
        tensor.read()


def whole(directory: Path, name: str, enter: Callable[[Path], object] = tries) -> "Seed":
    return Seed(
        {
            file.name: file.read_bytes()
            for file in directory.iterdir()
            if name == "config.json" or file.suffix != ".safetensors"
        },
        name,
        enter,
    )


class Seed:
    """Files by name, which of them is changed, and what reads it."""

    def __init__(self, files: dict[str, bytes], name: str, enter: Callable[[Path], object]):
        self.files, self.name, self.enter = files, name, enter


def of_file(name: str, content: bytes, enter: Callable[[Path], object]) -> Seed:
    return Seed({name: content}, name, enter)


def old_pickle() -> bytes:
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    state = b"\x80\x02}" + text("w") + a_tensor().replace(b"K\x10tQ", b"K\x10NtQ") + b"s."
    first = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, machine)]
    return b"".join([*first, state, pickle.dumps(["0"], 2), struct.pack("<q", 16), bytes(64)])


def llama2c() -> bytes:
    header = (4, 8, 1, 2, 1, 8, 4)
    return struct.pack("<7i", *header) + np.ones(32 + 4 + 16 + 8 + 8 + 16 + 4 + 96 + 4 + 8, "<f4").tobytes()


def seeds(folder: Path) -> dict[str, Seed]:
    """Return a valid input for each reader, made in `folder` where a library writes it."""
    table = pyarrow.table({"text": ["a b c", "d e f"]})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    stream = io.BytesIO()
    with pyarrow.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    records = ArrayRecordWriter(str(folder / "a.array_record"), "group_size:1")
    for record in (b"\x0a\x11\x0a\x0f\x0a\x04text\x12\x07\x0a\x05\x0a\x03a b", b'{"text": "a"}'):
        records.write(record)
    records.close()
    gguf = write_gguf(LLAMA, folder / "model.gguf").read_bytes()
    index = json.dumps({"weight_map": {"w": "model.safetensors"}}).encode()
    safetensors = struct.pack("<Q", 56) + b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  ' + bytes(8)
    lines = b'{"text": "hello"}\n{"text": [1, 2]}\n' * 3
    template = (GOLDENS / "llama3" / "chat_template.jinja").read_bytes()
    messages = [{"role": "user", "content": "hi"}]
    return {
        "safetensors": of_file("model.safetensors", safetensors, weights),
        "index of shards": Seed(
            {"model.safetensors": safetensors, "model.safetensors.index.json": index},
            "model.safetensors.index.json",
            weights,
        ),
        "pickle": of_file("pytorch_model.bin", as_zip(b"\x80\x02}" + text("w") + a_tensor() + b"s."), weights),
        "old pickle": of_file("pytorch_model.bin", old_pickle(), weights),
        "llama2.c": of_file("model.bin", llama2c(), read_llama2c),
        "GGUF": of_file("model.gguf", gguf, read_header),
        "GGUF's tokenizer": of_file("model.gguf", gguf, tries),
        "config.json": whole(LLAMA, "config.json", lambda path: config_of(path.parent)),
        "generation_config.json": whole(LLAMA, "generation_config.json", lambda path: read_generation(path.parent)),
        "tokenizer.json": whole(LLAMA, "tokenizer.json"),
        "tokenizer_config.json": whole(SLOW, "tokenizer_config.json", lambda path: tries(path.parent)),
        "SentencePiece": whole(SLOW, "tokenizer.model"),
        "SentencePiece of T5": whole(GOLDENS / "t5_v1_1", "spiece.model"),
        "vocab.json": whole(GPT2, "vocab.json"),
        "merges.txt": whole(GPT2, "merges.txt"),
        "vocab.txt": whole(GOLDENS / "bert", "vocab.txt"),
        "chat template": of_file(
            "a.jinja",
            template,
            lambda path: render(path.read_bytes().decode(errors="replace"), messages, {"bos_token": "<s>"}),
        ),
        "JSONL": of_file("a.jsonl", lines, reads),
        "JSON": of_file("a.json", b"[" + lines[:17] + b", " + lines[:17] + b"]", reads),
        "CSV": of_file("a.csv", b'text,b\n"a ""b""",c\nd,e\n', reads),
        "text": of_file("a.txt", "a b c \u4e2d\u6587\n".encode() * 4, reads),
        "Parquet": of_file("a.parquet", (folder / "a.parquet").read_bytes(), reads),
        "Arrow": of_file("a.arrow", stream.getvalue(), reads),
        "ArrayRecord": of_file("a.array_record", (folder / "a.array_record").read_bytes(), reads),
    }


def changed(content: bytes, rng: random.Random) -> bytes:
    """Return the content with one to four changes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 64))
        change = rng.randrange(6)
        if change == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[place : place + size] = rng.choice((b"\xff", b"\x00", b"\x7f", b"9", b"[")) * size
        elif change == 2:
            del data[place : place + size]
        elif change == 3:
            other = rng.randrange(len(data) + 1)
            data[place:place] = data[other : other + size]
        elif change == 4:
            data[place : place + size] = rng.randbytes(size)
        elif rng.random() < 0.2:
            del data[place:]
    return bytes(data)


def cases(folder: Path, count: int) -> Iterator[Hostile]:
    """Yield `count` changed files for each reader, the same every time."""
    for reader, seed in seeds(folder).items():
        for number in range(count):

            def make(place: Path, seed: Seed = seed, key: str = f"{reader} {number}") -> Path:
                for name, content in seed.files.items():
                    rng = random.Random(zlib.crc32(key.encode()))
                    (place / name).write_bytes(changed(content, rng) if name == seed.name else content)
                return place / seed.name

            yield Hostile(reader, str(number), make, seed.enter, refused=False)
