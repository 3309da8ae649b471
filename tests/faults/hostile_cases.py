# ruff: noqa: E501
"""Files that were made to harm: for each format what its reader must refuse, all made here.

A case writes a few files into an empty folder and returns what the public entrance of its format is called with.
"""

import dataclasses
import io
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from llama_jax.checkpoint import load

GOLDENS = Path(__file__).parents[1] / "directories" / "goldens"
LLAMA = GOLDENS / "llama2"
ModelProto: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]
CANARY = "import pathlib; pathlib.Path('canary').touch()"
DEEP = b"[" * 200_000 + b"]" * 200_000
HUGE = "9" * 10_000


@dataclasses.dataclass(frozen=True)
class Hostile:
    """An input: `make(folder)` writes it and returns the path, `enter(path)` reads it; `refused` is what must happen."""

    format: str
    name: str
    make: Callable[[Path], Path]
    enter: Callable[[Path], object] = load
    refused: bool = True


def copied(folder: Path, source: Path = LLAMA) -> Path:
    return Path(shutil.copytree(source, folder / "model"))


def with_file(name: str, content: bytes | str, source: Path = LLAMA, *, without: tuple[str, ...] = ()):
    """Return the maker of a copy of `source` with another file in it."""

    def make(folder: Path) -> Path:
        model = copied(folder, source)
        for other in without:
            (model / other).unlink()
        (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return model

    return make


def alone(name: str, content: bytes | Callable[[], bytes]):
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content())
        return folder / name

    return make


# Safetensors.
def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def of_weights() -> tuple[dict[str, Any], bytes]:
    """Return header and data of the model that all cases change."""
    content = (LLAMA / "model.safetensors").read_bytes()
    (size,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    return header, content[8 + size :]


def changed_weights(change: Callable[[dict[str, Any], bytearray], Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        header, data = of_weights()
        held = bytearray(data)
        found = change(header, held)
        content = safetensors(header if found is None else found, bytes(held))
        return with_file("model.safetensors", content)(folder)

    return make


def safetensors_cases() -> Iterator[Hostile]:
    kind = "safetensors"

    def case(name: str, change: Callable[[dict[str, Any], bytearray], Any]) -> Hostile:
        return Hostile(kind, name, changed_weights(change))

    def overlap(header: dict[str, Any], data: bytearray) -> None:
        first, second = [name for name in header if "q_proj" in name]
        header[second]["data_offsets"] = header[first]["data_offsets"]

    def hole(header: dict[str, Any], data: bytearray) -> None:
        data += bytes(64)
        last = max(header, key=lambda name: header[name]["data_offsets"])
        header[last]["data_offsets"] = [offset + 64 for offset in header[last]["data_offsets"]]

    def entry(key: str, value: Any) -> Callable[[dict[str, Any], bytearray], None]:
        def change(header: dict[str, Any], data: bytearray) -> None:
            header["model.norm.weight"][key] = value

        return change

    def twice(header: dict[str, Any], data: bytearray) -> bytes:
        text = json.dumps(header)
        return (text[:-1] + f', "model.norm.weight": {json.dumps(header["model.norm.weight"])}}}').encode()

    def number(value: float, name: str = "model.norm.weight") -> Callable[[dict[str, Any], bytearray], None]:
        def change(header: dict[str, Any], data: bytearray) -> None:
            begin, _ = header[name]["data_offsets"]
            data[begin + 4 : begin + 8] = struct.pack("<f", value)

        return change

    yield case("two tensors in one place", overlap)
    yield case("a hole between tensors", hole)
    yield case("a tensor twice", twice)
    yield case("an offset beyond the end", entry("data_offsets", [1 << 40, (1 << 40) + 64]))
    yield case("a negative offset", entry("data_offsets", [-64, 0]))
    yield case("offsets as texts", entry("data_offsets", ["0", "64"]))
    yield case("no offsets", entry("data_offsets", []))
    yield case("a negative size", entry("shape", [-4, -4]))
    yield case("a size that is true", entry("shape", [True, 16]))
    yield case("a size of fractions", entry("shape", [16.0]))
    yield case("a million dimensions", entry("shape", [2] * 1_000_000))
    yield case("a size with 300 digits", entry("shape", [10**300]))
    yield case("a dtype that is a list", entry("dtype", ["F32"]))
    yield case("an unknown dtype", entry("dtype", "F33"))
    yield case("an entry that is null", lambda header, data: header.update({"model.norm.weight": None}))
    yield case("NaN in a norm", number(float("nan")))
    yield case("infinity in a matrix", number(float("inf"), "model.layers.1.self_attn.q_proj.weight"))
    yield case(
        "a name with terminal escapes", lambda header, data: header.update({"\x1b[2J": header.pop("model.norm.weight")})
    )
    headers = {
        "a header that is longer than the file": struct.pack("<Q", 1 << 40) + b"{}",
        "the longest header": struct.pack("<Q", (1 << 64) - 1) + b"{}",
        "a header of deep JSON": safetensors(DEEP),
        "a header with a long number": safetensors(b'{"a": ' + HUGE.encode() + b"}"),
        "a header that is a list": safetensors(b"[]"),
        "a header that is no UTF-8": safetensors(b'{"\xff": 1}'),
        "an empty file": b"",
    }
    for name, content in headers.items():
        yield Hostile(kind, name, with_file("model.safetensors", content))

    def index(places: Any) -> Callable[[Path], Path]:
        content = places if isinstance(places, bytes) else json.dumps({"weight_map": places})
        return with_file("model.safetensors.index.json", content, without=("model.safetensors",))

    for name, place in {
        "a file above": "../model.safetensors", "an absolute file": "/etc/passwd", "a file with NUL": "a\0b",
        "a name of 300 letters": "a" * 300, "the folder": ".", "a number": 3,
    }.items():  # fmt: skip
        yield Hostile("index of shards", name, index({"model.norm.weight": place}))
    yield Hostile("index of shards", "a million entries", index({f"a{i}": f"b{i}" for i in range(1_000_000)}))
    yield Hostile("index of shards", "deep JSON", index(DEEP))
    yield Hostile("index of shards", "a list", index([1]))

    def linked(name: str) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            model = copied(folder)
            (model / name).rename(folder / "outside")
            (model / name).symlink_to(folder / "outside")
            return model

        return make

    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        yield Hostile("links", f"{name} links to outside", linked(name))


# PyTorch's pickles.
def as_zip(state: bytes, *, compression: int = zipfile.ZIP_STORED, storage: bytes = bytes(64)) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("archive/data.pkl", state, compression)
        archive.writestr("archive/data/0", storage)
    return held.getvalue()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x10tQ"


def a_tensor(shape: bytes = b"K\x10\x85", strides: bytes = b"K\x01\x85") -> bytes:
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + STORAGE
        + b"K\x00"
        + shape
        + strides
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def torch_cases() -> Iterator[Hostile]:
    before = b"\x80\x02"
    place = b"}" + text("_file") + text("/etc/passwd") + b"s"
    nested = b")" + b"\x85" * 2_000_000
    pickles = {
        "BUILD moves a storage to another file": STORAGE
        + b"}"
        + text("file")
        + text("/etc/passwd")
        + b"sb0}"
        + text("a")
        + b"s.",
        "BUILD changes the type of all storages": b"ctorch\nFloatStorage\n}" + text("dtype") + text("x") + b"sb.",
        "BUILD changes the function of all tensors": b"ctorch._utils\n_rebuild_tensor_v2\n}"
        + text("x")
        + text("y")
        + b"sb.",
        "BUILD sets attributes of a function": b"ctorch._utils\n_rebuild_tensor_v2\nN}"
        + text("__name__")
        + text("y")
        + b"s\x86b.",
        "BUILD changes a tensor": b"}" + text("w") + a_tensor() + place + b"bs.",
        "SETITEM on a type": b"ctorch\nFloatStorage\n" + text("a") + text("b") + b"s.",
        "a memo with a huge index": b"}r\xff\xff\xff\xff.",
        "a memo with a large index": b"}r\x00\x00\x00\x10.",
        "a list that repeats": b"]" + b"q\x00" + b"h\x00" * 100_000 + b".",
        "dictionaries of one long list": b"]("
        + (b"K\x01K\x02\x86" * 30_000)
        + b"eq\x000"
        + b"]"
        + b"ccollections\nOrderedDict\nq\x010"
        + b"h\x01h\x00\x85Ra" * 3_000
        + b".",
        "tuples in tuples as a key": b"}" + nested + b"K\x01s.",
        "lists in lists": b"]" * 500_000 + b"a" * 499_999 + b".",
        "a bytearray of exabytes": b"\x96" + struct.pack("<Q", 1 << 60) + b".",
        "a text of exabytes": b"\x8d" + struct.pack("<Q", 1 << 60) + b".",
        "a frame of exabytes": b"\x95" + struct.pack("<Q", 1 << 60) + b".",
        "a number with many digits": b"I" + b"9" * 1_000_000 + b"\n.",
        "a long number as a size": b"}"
        + text("w")
        + a_tensor(b"\x8b" + struct.pack("<i", 1000) + b"\x7f" * 1000 + b"\x85")
        + b"s.",
        "a tensor that repeats one number": b"}"
        + text("w")
        + a_tensor(b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", b"K\x00K\x00\x86")
        + b"s.",
        "a tensor beyond its storage": b"}" + text("w") + a_tensor(b"K\x11\x85") + b"s.",
        "a call of eval": b"cbuiltins\neval\n(" + text(CANARY) + b"tR.",
        "a call of exec by a stack name": text("builtins") + text("exec") + b"\x93(" + text(CANARY) + b"tR.",
        "an INST of os.system": b"(" + text("touch canary") + b"ios\nsystem\n.",
        "an OBJ": b"(cos\nsystem\n" + text("touch canary") + b"o.",
        "a NEWOBJ of a storage": b"ctorch\nFloatStorage\n)\x81.",
        "an extension": b"\x82\x01.",
        "a call of a dictionary": b"})R.",
        "an unknown opcode": b"\xfe.",
        "no end": b"}" + text("a"),
        "an empty stack": b"0.",
        "a persistent id of another kind": b"(" + text("module") + text("os") + b"tQ.",
        "a name with terminal escapes": b"c\x1b[2J\nx\n.",
    }
    parent = {"config.json": (LLAMA / "config.json").read_bytes()}

    def model(content: bytes) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            for name, data in (parent | {"pytorch_model.bin": content}).items():
                (folder / name).write_bytes(data)
            return folder

        return make

    for name, state in pickles.items():
        yield Hostile("pickle", name, model(as_zip(before + state)))
    yield Hostile("pickle", "an inflating pickle", model(as_zip(b"}" + bytes(500_000_000) + b".", compression=8)))
    yield Hostile("pickle", "two pickles", model(as_zip(b"}.").replace(b"archive/data/0", b"b/data.pkl\0\0\0\0")))
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    machine = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
    for name, more in {
        "ends early": b"", "lists storages without end": before + b"]" + b"q\xff" * 9 + b"]" * 100_000,
        "has a frame of exabytes": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60),
        "names eval": before + b"cbuiltins\neval\n(" + text(CANARY) + b"tR.",
        "has a storage of exabytes": before + b"}" + text("w") + a_tensor().replace(b"K\x10tQ", b"\x8a\x08" + struct.pack("<q", 1 << 62) + b"NtQ") + b"s." + pickle.dumps(["0"], 2),
    }.items():  # fmt: skip
        yield Hostile("old pickle", f"a file that {name}", model(magic + pickle.dumps(1001, 2) + machine + more))
