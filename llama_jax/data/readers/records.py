"""Files and pieces of files to read, and the records that readers yield."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from llama_jax.config import Json
from llama_jax.data.config import DataConfig

BUFFER = 1 << 20  # bytes
SHARD_BYTES = 1 << 26  # of input; also the size of a unit


@dataclasses.dataclass(frozen=True)
class CorpusFile:
    """A file of the corpus; one that a directory or glob brought (not `named`) is skipped where it is not text.

    `path` is a local path or a URL; `stamp` changes when the content does (a file's time, a store's tag); `pieces` is
    the number of pieces that it comes in by itself (the files of a dataset), or None. `copy` is the path of the content
    where it is not `path` (a member of an archive); `problem` is the reason why a file cannot be read (a dangling
    link).
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
        """Path or URL of the content."""
        return self.copy or self.path


@dataclasses.dataclass(frozen=True)
class Unit:
    """Piece `index` of `count` of a file: bytes, row groups or records, as its kind has them."""

    file: CorpusFile
    index: int
    count: int

    def range_of(self, total: int) -> tuple[int, int]:
        """Return (first, end) of this unit's share of `total` things."""
        return self.index * total // self.count, (self.index + 1) * total // self.count

    @property
    def size(self) -> int:
        """Bytes of the file that belong to this unit."""
        first, end = self.range_of(self.file.size)
        return end - first


type Part = str | np.ndarray | list[Json]
"""A text, token ids, or the messages of a chat."""


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """A document's parts, one for each of the config's fields, and its place: "line 3 of 'file'"."""

    parts: tuple[Part, ...]
    where: str


@dataclasses.dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be used; `reason` is one of a few, by which they are counted."""

    where: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where} {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclasses.dataclass(frozen=True, slots=True)
class SkippedFile:
    """A file that a directory, a glob or an archive brought and that cannot be read, for `reason`."""

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
    """Return the record of a mapping from field to value, or of a text alone where the only field is `text`.

    A value that is bytes is text in UTF-8.
    """
    if isinstance(values, str) and config.fields == ("text",):
        return Record((values,), where)
    if not isinstance(values, Mapping):
        return BadRecord(where, NO_FIELD, "it has no fields at all")
    parts = []
    for i, field in enumerate(config.fields):
        value = values.get(field)
        if value is None:
            names = ", ".join(map(str, values))
            detail = f"'{field}' is null" if field in values else f"'{field}'; it has {names}: set fields"
            return BadRecord(where, NO_FIELD, detail)
        if isinstance(value, bytes):
            if len(value) > config.max_record_bytes:
                return BadRecord(where, TOO_LONG)
            try:
                value = value.decode()
            except UnicodeDecodeError:
                return BadRecord(where, NOT_UTF8)
        if (part := _as_part(value, is_label=i > 0)) is None:
            return BadRecord(where, WRONG_TYPE, f"'{field}' is no text, no list of token ids and no list of messages")
        parts.append(part)
    return Record(tuple(parts), where)


def _as_part(value: object, *, is_label: bool) -> Part | None:
    """Return `value` as a part of a document, or None where it is not one; a number as a label is its digits."""
    if isinstance(value, str):
        return value
    if is_label and isinstance(value, int | np.integer) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, Sequence | np.ndarray):
        return None
    if not len(value):
        return np.zeros(0, np.int64)
    if all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value):
        return [dict(message) for message in value]
    try:
        ids = np.asarray(value)
    except ValueError:  # lists of several lengths
        return None
    return ids.astype(np.int64) if ids.ndim == 1 and ids.dtype.kind in "iu" else None
