"""What every reader yields: records, and those that are bad."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.data.config import DataConfig

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
