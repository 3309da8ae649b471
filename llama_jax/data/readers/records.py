"""Pieces of files to read, and the records that readers yield."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.data.config import DataConfig
from llama_jax.remote import is_remote

BUFFER = 1 << 20


@dataclasses.dataclass(frozen=True)
class CorpusFile:
    """A file of the corpus; one that a directory or glob brought (not `named`) is skipped where it is not text.

    `path` is a local path or a URL; `stamp` changes when the content does (a file's time, a store's tag); `pieces` is
    how many pieces it comes in by itself (the files of a dataset), or None. `copy` is where its content is, if not at
    `path` (a member of an archive); `problem` says why it cannot be read, if it is only named (a dangling link).
    """

    path: str
    size: int
    named: bool
    stamp: str = ""
    pieces: int | None = None
    copy: str = ""
    problem: str = ""

    @property
    def place(self) -> str:
        """Where the content is."""
        return self.copy or self.path


def is_dataset(path: str) -> bool:
    """Whether `path` names a Hugging Face dataset, not a file of the Hub's file system."""
    return path.startswith("hf://") and not path.startswith(("hf://datasets/", "hf://buckets/"))


SHARD_BYTES = 1 << 26  # of input; also the size of a unit
MAX_SHARDS = 4096  # above, shards grow: every shard is some memory maps, of which Linux gives a process 65530

_PACKED = r"(\.(gz|zst|bz2|xz))?$"
KINDS = tuple(
    (re.compile(pattern, re.IGNORECASE), kind)
    for pattern, kind in (
        (r"\.(jsonl|jsonlines|ndjson)" + _PACKED, "jsonl"),
        (r"\.json" + _PACKED, "json_file"),
        (r"\.csv" + _PACKED, "csv"),
        (r"\.(tsv|tab)" + _PACKED, "tsv"),
        (r"\.(tar" + _PACKED + r"|t(gz|zst|bz2?|xz)$)", "tar"),
        (r"\.parquet$", "parquet"),
        (r"\.arrow$", "arrow"),
        (r"\.array_?record(-\d+-of-\d+)?$", "array_record"),
        (r"\.bin$", "tokens"),
    )
)
SPLIT_KINDS = ("jsonl", "json_file", "parquet", "array_record", "tokens")
_PACKING = re.compile(r"\.t?(?:(gz)|(zst)|(bz2|(?<=\.t)bz)|(xz))$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Unit:
    """Piece `index` of `count` of a file: bytes, row groups or records, as its kind has them."""

    file: CorpusFile
    index: int
    count: int

    def range_of(self, total: int) -> tuple[int, int]:
        """(first, end) of this unit's share of `total` things."""
        return self.index * total // self.count, (self.index + 1) * total // self.count

    @property
    def size(self) -> int:
        """Bytes of the file that are this unit's."""
        first, end = self.range_of(self.file.size)
        return end - first


def kind_of(path: str) -> str:
    """The kind of file, by its name."""
    if is_dataset(path):
        return "dataset"
    return next((kind for pattern, kind in KINDS if pattern.search(path)), "text")


def packing_of(path: str) -> str:
    """What the file is compressed by, by its name, or ""."""
    found = _PACKING.search(path)
    return "" if found is None else ("gzip", "zstd", "bzip2", "xz")[found.lastindex - 1]  # type: ignore[operator]


def _splits(path: str, config: DataConfig) -> bool:
    """Whether parts of the file can be read without what is before them."""
    if packing_of(path):
        return False
    kind = kind_of(path)
    if kind == "array_record" and is_remote(path):
        return False  # its reader takes a local file: each piece would be copied with all of it
    return kind in SPLIT_KINDS or (kind == "text" and config.document_chars is not None)


def units_by_shard(files: list[CorpusFile], config: DataConfig) -> list[list[Unit]]:
    """The units of every shard: consecutive ones, together about SHARD_BYTES."""
    shard_bytes = max(SHARD_BYTES, sum(file.size for file in files) // MAX_SHARDS)
    shards: list[list[Unit]] = [[]]
    size = 0
    for file in files:
        count = file.pieces or (max(1, round(file.size / shard_bytes)) if _splits(file.path, config) else 1)
        for index in range(count):
            if size >= shard_bytes:
                shards.append([])
                size = 0
            unit = Unit(file, index, count)
            shards[-1].append(unit)
            size += unit.size
    return shards


type Part = str | np.ndarray | list[dict[str, Any]]
"""A text, token ids, or the messages of a chat."""


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """A document's parts, one for each of the config's fields, and where they stand: "line 3 of 'file'"."""

    parts: tuple[Part, ...]
    where: str


@dataclasses.dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be used; `reason` is one of a few, `detail` its own."""

    where: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where} {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclasses.dataclass(frozen=True, slots=True)
class SkippedFile:
    """A file that a directory, a glob or an archive brought and that cannot be read; `reason` is what it is."""

    path: str
    reason: str


type Item = Record | BadRecord | SkippedFile

NOT_UTF8 = "is not UTF-8"
NOT_JSON = "is not JSON"
NOT_TABLE = "is no row of the table"
HAS_NULS = "is no text: it has NUL bytes"
NO_FIELD = "lacks a field"
WRONG_TYPE = "has a field of another type"
SURROGATE = "has half a surrogate pair"
EMPTY_PART = "has a part without tokens"
TOO_LONG = "is longer than max_record_bytes"


def as_record(values: object, where: str, config: DataConfig) -> Record | BadRecord:
    """The record of a mapping from field to value, or of a text alone where no other field is asked for."""
    if isinstance(values, str) and config.fields == ("text",):
        return Record((values,), where)
    if not isinstance(values, Mapping):
        return BadRecord(where, NO_FIELD, "it has no fields at all")
    parts = []
    for i, field in enumerate(config.fields):
        if values.get(field) is None:
            return BadRecord(where, NO_FIELD, f"'{field}'; it has {', '.join(map(str, values))}: set fields")
        part = as_part(values[field], label=i > 0)
        if part is None:
            return BadRecord(where, WRONG_TYPE, f"'{field}' is no text, no list of token ids and no list of messages")
        parts.append(part)
    return Record(tuple(parts), where)


def as_part(value: object, *, label: bool = False) -> Part | None:
    """`value` as a part of a document, or None where it is no such thing; a `label` may be a number, as its digits."""
    if isinstance(value, str):
        return value
    if label and isinstance(value, int | np.integer) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, bytes):
        if not len(value):
            return np.zeros(0, np.int64)
        if all_messages(value):
            return [dict(message) for message in value]
        try:
            ids = np.asarray(value)
        except ValueError:  # lists of several lengths
            return None
        if ids.ndim == 1 and ids.dtype.kind in "iu":
            return ids.astype(np.int64)
    return None


def all_messages(value: Sequence | np.ndarray) -> bool:
    """Whether it is a chat: mappings with a role and a content."""
    return isinstance(value[0], Mapping) and all(
        isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in value
    )
