"""Files to records, one reader for each kind of file.

In: a `Unit`, a piece of a file that is known by its name, place and size. Out: `Record`s with a document's parts, and
`BadRecord`s and `SkippedFile`s in their places. A new kind is a module with a reader and a line in `READERS` and
`units.KINDS`. All opening goes through `files.open_file`, so that object stores are read like disks; what is read as
text goes through `packed.opened`, which refuses what is none (`content.py`).
"""

import io
from collections.abc import Iterator, Sequence

from llama_jax.config import UserError
from llama_jax.data.config import DataConfig
from llama_jax.data.readers.binary import read_array_record, read_tokens
from llama_jax.data.readers.json_file import read_json
from llama_jax.data.readers.opening import OtherContentError, members
from llama_jax.data.readers.records import (
    EMPTY_PART,
    SURROGATE,
    BadRecord,
    Item,
    Part,
    Record,
    SkippedFile,
    Unit,
    kind_of,
    packing_of,
    units_by_shard,
)
from llama_jax.data.readers.tables import read_arrow, read_dataset, read_parquet
from llama_jax.data.readers.text import cut, read_delimited, read_jsonl, read_text

__all__ = [
    "EMPTY_PART",
    "SURROGATE",
    "BadRecord",
    "Item",
    "Part",
    "Record",
    "SkippedFile",
    "Unit",
    "kind_of",
    "packing_of",
    "read_unit",
    "units_by_shard",
]

READERS = {
    "array_record": read_array_record,
    "arrow": read_arrow,
    "dataset": read_dataset,
    "csv": read_delimited,
    "json_file": read_json,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "text": read_text,
    "tsv": read_delimited,
}


def read_unit(unit: Unit, config: DataConfig, separators: Sequence[int] = ()) -> Iterator[Item]:
    """All records of a unit, in order, those left out that are empty.

    `separators` are the ids that stand between documents in files of tokens. Raises UserError for a damaged file, and
    for one that was named and is of a kind that is not read; one that was only found is skipped.
    """
    file = unit.file
    if file.problem:
        yield SkippedFile(file.path, file.problem)
        return
    try:
        if kind_of(file.path) != "tar":
            yield from _records(unit, config, separators)
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


def _records(unit: Unit, config: DataConfig, separators: Sequence[int]) -> Iterator[Item]:
    kind, limit = kind_of(unit.file.path), config.document_chars
    for item in read_tokens(unit, config, separators) if kind == "tokens" else READERS[kind](unit, config):
        if not isinstance(item, Record):
            yield item
        elif isinstance(text := item.parts[0], str) and limit is not None and len(text) > limit:
            yield from (Record((part,), item.where) for part in cut(io.StringIO(text, newline="\n"), limit))
        elif all(map(len, item.parts)):
            yield item
        elif any(map(len, item.parts)):
            yield BadRecord(item.where, EMPTY_PART)
