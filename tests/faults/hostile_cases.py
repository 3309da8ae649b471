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


# llama2.c, Meta.
def meta_cases() -> Iterator[Hostile]:
    for name, header in {
        "16 million layers": (8, 8, (1 << 24) - 1, 1, 1, 8, 8), "huge sizes": ((1 << 24) - 1,) * 7,
        "negative sizes": (-8, 8, 1, 1, 1, 8, 8), "no heads": (8, 8, 1, 0, 0, 8, 8), "the file is too short": (8, 8, 1, 1, 1, 8, 8),
    }.items():  # fmt: skip
        yield Hostile("llama2.c", name, alone("model.bin", struct.pack("<7i", *header)))
    good = {"dim": 16, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, "vocab_size": 340}
    for name, change in {
        "a billion layers": {"n_layers": 10**9}, "no heads": {"n_heads": 0}, "negative layers": {"n_layers": -1},
        "layers as text": {"n_layers": "2"}, "layers that are true": {"n_layers": True}, "eps of NaN": {"norm_eps": float("nan")},
        "eps of infinity": {"norm_eps": float("inf")}, "a width with 300 digits": {"dim": 10**300}, "a width that is a list": {"dim": [16]},
        "theta of 0": {"rope_theta": 0}, "theta of infinity": {"rope_theta": float("inf")}, "a negative head": {"n_heads": -4},
        "kv heads as text": {"n_kv_heads": "x"},
    }.items():  # fmt: skip

        def make(folder: Path, change: dict[str, Any] = change) -> Path:
            (folder / "params.json").write_text(json.dumps(good | change))
            (folder / "consolidated.00.pth").write_bytes(
                as_zip(b"\x80\x02}" + text("norm.weight") + a_tensor() + b"s.")
            )
            return folder

        yield Hostile("params.json", name, make)
    for name, content in {"deep JSON": DEEP, "a long number": f'{{"dim": {HUGE}}}'.encode(), "a list": b"[]"}.items():

        def raw(folder: Path, content: bytes = content) -> Path:
            (folder / "params.json").write_bytes(content)
            (folder / "consolidated.00.pth").write_bytes(
                as_zip(b"\x80\x02}" + text("norm.weight") + a_tensor() + b"s.")
            )
            return folder

        yield Hostile("params.json", name, raw)


def json_with(source: Path, **values: Any) -> str:
    return json.dumps(json.loads(source.read_text(encoding="utf-8")) | values)


def config_cases() -> Iterator[Hostile]:
    infinite, nan = float("inf"), float("nan")
    changes: dict[str, dict[str, Any]] = {
        "a billion layers": {"num_hidden_layers": 10**9}, "ten million layers": {"num_hidden_layers": 10**7},
        "eps of NaN": {"rms_norm_eps": nan}, "eps of infinity": {"rms_norm_eps": infinite}, "negative eps": {"rms_norm_eps": -1.0},
        "theta of NaN": {"rope_parameters": {"rope_theta": nan, "rope_type": "default"}},
        "theta of infinity": {"rope_parameters": {"rope_theta": infinite, "rope_type": "default"}},
        "negative theta": {"rope_parameters": {"rope_theta": -1.0, "rope_type": "default"}},
        "theta as text": {"rope_parameters": {"rope_theta": "1e4", "rope_type": "default"}},
        "a factor of NaN": {"rope_scaling": {"rope_type": "linear", "factor": nan}},
        "a factor of infinity": {"rope_scaling": {"rope_type": "linear", "factor": infinite}},
        "yarn of infinity": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 10**300}},
        "a width of 0": {"hidden_size": 0}, "a negative width": {"hidden_size": -16}, "a huge width": {"hidden_size": 10**12},
        "a width with 100 digits": {"hidden_size": 10**100}, "a width that is true": {"hidden_size": True},
        "a width as text": {"hidden_size": "16"}, "a huge vocabulary": {"vocab_size": 10**12},
        "a width of NaN": {"hidden_size": nan}, "eps with 400 digits": {"rms_norm_eps": 10**400}, "no heads": {"num_attention_heads": 0},
        "a head of 0": {"head_dim": 0}, "huge positions": {"max_position_embeddings": 10**30},
        "a model_type that is a list": {"model_type": ["llama"]}, "a model_type with escapes": {"model_type": "\x1b[2J\r"},
        "architectures of numbers": {"architectures": [1]}, "an activation that is a list": {"hidden_act": ["silu"]},
        "quantized by a number": {"quantization_config": 3}, "blocks of 0": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 0]}},
        "scaling that is a list": {"rope_scaling": [1]}, "a kind of scaling that is a list": {"rope_scaling": {"rope_type": [1], "factor": 2.0}},
    }  # fmt: skip
    for name, values in changes.items():
        by_default = name in ("a head of 0", "a model_type that is a list")  # as if it were not there
        yield Hostile(
            "config.json",
            name,
            with_file("config.json", json_with(LLAMA / "config.json", **values)),
            refused=not by_default,
        )
    whole = {
        "deep JSON": DEEP,
        "a long number": f'{{"hidden_size": {HUGE}}}',
        "a list": "[]",
        "no UTF-8": b"\xff\xfe",
        "empty": b"",
    }
    for name, content in whole.items():
        yield Hostile("config.json", name, with_file("config.json", content))
    mixtral, deepseek = GOLDENS / "mixtral", GOLDENS / "deepseek_v3"
    for name, source, values in (
        ("a billion experts", mixtral, {"num_local_experts": 10**9}),
        ("a billion experts of DeepSeek", deepseek, {"n_routed_experts": 10**9}),
        ("a billion dense layers", deepseek, {"first_k_dense_replace": 10**9, "num_hidden_layers": 10**9}),
        ("a billion layers of T5", GOLDENS / "t5_v1_1", {"num_layers": 10**9}),
        ("a billion layers of GPT-2", GOLDENS / "gpt2_slow", {"n_layer": 10**9}),
        ("a billion layers of BERT", GOLDENS / "bert", {"num_hidden_layers": 10**9}),
        ("a billion layers of BART", GOLDENS / "bart", {"encoder_layers": 10**9}),
    ):
        yield Hostile(
            "config.json", name, with_file("config.json", json_with(source / "config.json", **values), source)
        )
    generation: dict[str, Any] = {
        "an id with 100 digits": {"eos_token_id": 10**100}, "an id that is text": {"eos_token_id": "x"}, "an id that is true": {"eos_token_id": True},
        "a penalty of NaN": {"repetition_penalty": nan}, "a penalty of infinity": {"repetition_penalty": infinite},
        "a negative length": {"min_length": -1}, "a penalty with 400 digits": {"repetition_penalty": 10**400},
        "words that are a number": {"bad_words_ids": 3}, "suppressed texts": {"suppress_tokens": ["x"]},
    }  # fmt: skip
    for name, values in generation.items():
        yield Hostile("generation_config.json", name, with_file("generation_config.json", json.dumps(values)))
    yield Hostile("generation_config.json", "deep JSON", with_file("generation_config.json", DEEP))
    yield Hostile(
        "generation_config.json", "a long number", with_file("generation_config.json", f'{{"eos_token_id": {HUGE}}}')
    )

    adapter = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": str(LLAMA), "lora_alpha": 4}
    weights = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight": {"dtype": "F32", "shape": shape, "data_offsets": place}
        for side, shape, place in (("A", [2, 16], [0, 128]), ("B", [16, 2], [128, 256]))
    }  # fmt: skip
    for name, values in {
        "a base of 300 letters": {"base_model_name_or_path": "a" * 300}, "a base with NUL": {"base_model_name_or_path": "a\0"},
        "a base that is a list": {"base_model_name_or_path": [1]}, "alpha of NaN": {"lora_alpha": nan}, "alpha as text": {"lora_alpha": "4"},
        "alpha with 400 digits": {"lora_alpha": 10**400}, "a pattern that is no pattern": {"alpha_pattern": {"(": 1}}, "patterns of a list": {"alpha_pattern": [1]},
        "a pattern that takes for ever": {"alpha_pattern": {"(((\\w|\\.)+)+)+!": 1}},
    }.items():  # fmt: skip

        def make(folder: Path, values: dict[str, Any] = values) -> Path:
            (folder / "adapter_config.json").write_text(json.dumps(adapter | values))
            (folder / "adapter_model.safetensors").write_bytes(safetensors(weights, bytes(256)))
            return folder

        yield Hostile("adapter_config.json", name, make)
