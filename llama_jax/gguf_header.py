"""Header of a GGUF file: its metadata, and the place of every tensor.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. It is read here and
not by the `gguf` package, whose reader makes an array of every number and believes every count: a damaged one keeps it
busy for ever.
"""

import dataclasses
import math
import mmap
import re
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config import Json, UserError

MAGIC = b"GGUF"
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
# Types of values by number; 8 is a text and 9 an array.
_NUMBERS = dict(zip((*range(8), 10, 11, 12), ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "u1", "<u8", "<i8", "<f8"),
                    strict=True))  # fmt: skip
_FLOAT32, _BOOL, _TEXT, _ARRAY = 6, 7, 8, 9


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of a file: `shape` is in C order, `kind` the number of its type, `offset` in bytes from the start."""

    file: Path
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Header:
    """Metadata by key, and tensors by name, of all shards."""

    metadata: Json
    entries: dict[str, Entry]


def is_gguf(path: Path) -> bool:
    """Return whether `path` is a file that begins as GGUF files do."""
    if not path.is_file():
        return False
    with open(path, "rb") as stream:
        return stream.read(4) == MAGIC


def gguf_file(directory: Path) -> Path | None:
    """Return the GGUF file of `directory`, of a model in shards the first, or None.

    Raises UserError where there are several models.
    """
    found = [file for file in sorted(directory.glob("*.gguf")) if is_gguf(file)]
    models = {match[1] if (match := _SHARD.fullmatch(file.name)) else file.name: file for file in reversed(found)}
    if len(models) > 1:
        raise UserError(f"'{directory}' has {len(models)} GGUF models: give one, such as '{found[0]}'")
    return found[0] if found else None


class _Reader:
    """A position in the bytes of a file, and the values from there on. Raises ValueError beyond the end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError("it ends too early, or a length in it is wrong")
        self.at += size
        return self.data[self.at - size : self.at]

    def integer(self, size: int = 8) -> int:
        return int.from_bytes(self.take(size), "little")

    def count(self, least: int) -> int:
        """Return a number of items, each of at least `least` bytes."""
        number = self.integer()
        if number * least > len(self.data) - self.at:
            raise ValueError(f"it counts {number} items where {len(self.data) - self.at} bytes are left")
        return number

    def text(self) -> str:
        return self.take(self.integer()).decode()

    def value(self, kind: int) -> Any:
        if kind == _ARRAY:
            kind = self.integer(4)
            if kind == _TEXT:
                return [self.text() for _ in range(self.count(8))]
            return self.numbers(kind, self.count(np.dtype(_NUMBERS.get(kind, "u1")).itemsize))
        return self.text() if kind == _TEXT else self.numbers(kind, 1)[0]

    def numbers(self, kind: int, count: int) -> list[Any]:
        if (dtype := _NUMBERS.get(kind)) is None:
            raise ValueError(f"it has a value of type {kind}, which is not known")
        values = np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype)
        if kind == _BOOL:
            return (values != 0).tolist()
        # The shortest number that rounds to the same float32: 1e-5 and not 9.99999974e-06.
        return [float(str(value)) for value in values] if kind == _FLOAT32 and count == 1 else values.tolist()


def read_header(path: Path) -> Header:
    """Return the header of a GGUF file, of all shards where `path` is the first of several.

    Every count, length, shape and offset is compared with the file's size before memory is taken. Raises UserError for
    a damaged or truncated file, another version, and for a missing shard.
    """
    header = _read(path)
    number, total = (header.metadata.get(f"split.{key}", default) for key, default in (("no", 0), ("count", 1)))
    if total in (0, 1):
        return header
    match = _SHARD.fullmatch(path.name)
    if match is None or number != 0 or int(match[3]) != total:
        raise UserError(f"'{path}' is one of {total} shards: give the first, NAME-00001-of-{total:05d}.gguf")
    for i in range(2, total + 1):
        shard = path.with_name(f"{match[1]}-{i:05d}-of-{total:05d}.gguf")
        if not is_gguf(shard):
            raise UserError(f"'{shard}', a shard of the model, is missing or no GGUF file: download it")
        header.entries.update(_read(shard).entries)
    return header


def _read(path: Path) -> Header:
    try:
        with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _Reader(data)
            magic, version = reader.take(4), reader.integer(4)
            if magic != MAGIC or version not in (2, 3):
                raise ValueError(f"it has version {version}, and 2 and 3 are read")
            num_tensors, num_keys = reader.count(0), reader.count(12)
            metadata: Json = {}
            for _ in range(num_keys):
                key = reader.text()
                metadata[key] = reader.value(reader.integer(4))
            entries: dict[str, Entry] = {}
            if num_tensors * 24 > len(data) - reader.at:
                raise ValueError(f"it counts {num_tensors} tensors, more than it has room for")
            for _ in range(num_tensors):
                name, dims = reader.text(), reader.integer(4)
                if dims > 4 or name in entries:
                    raise ValueError(f"'{name}' has {dims} dimensions" if dims > 4 else f"'{name}' is there twice")
                shape = tuple(reversed([reader.integer() for _ in range(dims)]))
                entries[name] = Entry(path, shape, reader.integer(4), reader.integer())
            alignment = metadata.get("general.alignment", 32)
            if type(alignment) is not int or not 0 < alignment < 1 << 20:
                raise ValueError(f"its alignment is {alignment}")
            start = -(-reader.at // alignment) * alignment
            for name, entry in entries.items():
                if start + entry.offset > len(data) or not 0 < math.prod(entry.shape) <= 64 * len(data):
                    raise ValueError(f"'{name}' reaches beyond its end, or has no element")
            return Header(metadata, {n: dataclasses.replace(e, offset=start + e.offset) for n, e in entries.items()})
    except (ValueError, OSError) as error:
        raise UserError(f"'{path}' is no whole GGUF file ({error}): download it again") from None
