"""Files to records, one reader for each kind of file.

In: a `Unit`, a piece of a file that is known by its name, place and size. Out: `Record`s with a document's parts, and
`BadRecord`s and `SkippedFile`s in their places. A kind is a line of `KINDS`, from outside one that `add_reader` adds.
All files are opened by `opening.open_file`, so that object stores are read like disks; text is read through
`opening.opened`, which refuses content that is not text.
"""

import dataclasses
import functools
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llama_jax.config import UserError
from llama_jax.data.config import DataConfig
from llama_jax.data.readers import records
from llama_jax.data.readers.binary import read_array_record, read_tokens
from llama_jax.data.readers.json_file import read_json
from llama_jax.data.readers.opening import OtherContentError, members, packing_of
from llama_jax.data.readers.records import (
    EMPTY_PART,
    BadRecord as BadRecord,
    CorpusFile,
    Item,
    Record as Record,
    SkippedFile as SkippedFile,
    Unit as Unit,
)
from llama_jax.data.readers.tables import is_dataset, read_arrow, read_dataset, read_parquet
from llama_jax.data.readers.text import cut, read_delimited, read_jsonl, read_text
from llama_jax.remote import is_remote

MAX_SHARDS = 4096  # above, shards grow: every shard is some memory maps, of which Linux gives a process 65,530

type Reader = Callable[..., Iterator[Any]]
"""A function of a unit and the config that yields items. `read_tokens` takes the ids between documents too."""


@dataclasses.dataclass(frozen=True)
class FileKind:
    """A kind of file, by a regular expression that its name has to match in any case.

    `splits`: units of it can be read without what is before them.
    """

    name: str
    pattern: str
    read: Reader
    splits: bool = False

    def matches(self, path: str) -> bool:
        """Return True where the file at `path` is of this kind."""
        return re.search(self.pattern, path, re.IGNORECASE) is not None


_PACKED = r"(\.(gz|zst|bz2|xz))?$"
KINDS = [
    FileKind("jsonl", r"\.(jsonl|jsonlines|ndjson)" + _PACKED, read_jsonl, splits=True),
    FileKind("json_file", r"\.json" + _PACKED, read_json, splits=True),
    FileKind("csv", r"\.csv" + _PACKED, functools.partial(read_delimited, dialect="excel")),
    FileKind("tsv", r"\.(tsv|tab)" + _PACKED, functools.partial(read_delimited, dialect="excel-tab")),
    FileKind("tar", r"\.(tar" + _PACKED + r"|t(gz|zst|bz2?|xz)$)", members),
    FileKind("parquet", r"\.parquet$", read_parquet, splits=True),
    FileKind("arrow", r"\.arrow$", read_arrow),
    FileKind("array_record", r"\.array_?record(-\d+-of-\d+)?$", read_array_record, splits=True),
    FileKind("tokens", r"\.bin$", read_tokens, splits=True),
]
_DATASET = FileKind("dataset", "", read_dataset)
_TEXT = FileKind("text", "", read_text)
_NUM_OWN = len(KINDS)


def add_reader(name: str, pattern: str, read: Reader, *, splits: bool = False) -> None:
    """Add a kind of file: those whose names match the regular expression `pattern` are read by `read`.

    `read(unit, config)` yields a `Record`, a `BadRecord` or a `SkippedFile` for each record of the unit. `splits`: a
    file comes in several units, which have to give each of its records once. Raises ValueError for a name in use.
    """
    if name in {kind.name for kind in (*KINDS, _DATASET, _TEXT)}:
        raise ValueError(f"there is a kind of file with the name {name!r}")
    KINDS.append(FileKind(name, pattern, read, splits))


def added_readers() -> list[FileKind]:
    """Return the kinds that `add_reader` has added."""
    return KINDS[_NUM_OWN:]


def kind_of(path: str) -> FileKind:
    """Return the kind of a file, by its name; text where no other matches."""
    if is_dataset(path):
        return _DATASET
    return next((kind for kind in KINDS if kind.matches(path)), _TEXT)


def _splits(path: str, config: DataConfig) -> bool:
    kind = kind_of(path)
    if packing_of(path) or (kind.name == "array_record" and is_remote(path)):
        return False  # the latter's reader takes local files alone: each piece would be copied with all of it
    return kind.splits or (kind is _TEXT and config.document_chars is not None)


def units_by_shard(files: Sequence[CorpusFile], config: DataConfig) -> list[list[Unit]]:
    """Return the units of every shard: consecutive ones, together about SHARD_BYTES.

    They follow from the names and sizes of the files alone, so that every process finds the same.
    """
    shard_bytes = max(records.SHARD_BYTES, sum(file.size for file in files) // MAX_SHARDS)
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


def read_unit(unit: Unit, config: DataConfig, separators: Sequence[int] = ()) -> Iterator[Item]:
    """Yield all records of a unit, in order, without the empty ones.

    `separators` are the ids between documents in files of tokens. Raises UserError for a damaged file, and
    for one that was named and is of a kind that is not read; one that was only found is skipped.
    """
    file = unit.file
    if file.problem:
        yield SkippedFile(file.path, file.problem)
        return
    try:
        if kind_of(file.path).name != "tar":
            yield from _documents(unit, config, separators)
            return
        for member in members(file):
            if isinstance(member, SkippedFile):
                yield member
            else:
                yield from read_unit(Unit(member, 0, 1), config, separators)
    except OtherContentError as error:
        if file.named:
            raise UserError(f"'{file.path}' is {error.what}, which is not read: {error.advice}") from None
        yield SkippedFile(file.path, error.what)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"'{file.path}' cannot be read ({reason}): get it again or leave it out") from None


def _documents(unit: Unit, config: DataConfig, separators: Sequence[int]) -> Iterator[Item]:
    """Yield a unit's items, texts cut to `document_chars`."""
    kind, limit = kind_of(unit.file.path), config.document_chars
    for item in kind.read(unit, config, separators) if kind.name == "tokens" else kind.read(unit, config):
        if not isinstance(item, Record):
            yield item
        elif isinstance(text := item.parts[0], str) and limit is not None and len(text) > limit:
            yield from (Record((part,), item.where) for part in cut(io.StringIO(text, newline="\n"), limit))
        elif all(map(len, item.parts)):
            yield item
        elif any(map(len, item.parts)):
            yield BadRecord(item.where, EMPTY_PART)
