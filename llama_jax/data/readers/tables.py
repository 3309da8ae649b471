"""Parquet, Arrow and datasets of the Hugging Face Hub."""

import contextlib
import hashlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from llama_jax.config import UserError
from llama_jax.data.config import DataConfig
from llama_jax.data.readers.opening import open_file
from llama_jax.data.readers.records import (
    NO_FIELD,
    NOT_UTF8,
    SHARD_BYTES,
    TOO_LONG,
    WRONG_TYPE,
    BadRecord,
    CorpusFile,
    Item,
    Part,
    Record,
    Unit,
    as_part,
    as_record,
)

BATCH_ROWS = 256


@contextlib.contextmanager
def _arrow(path: str) -> Iterator[ModuleType]:
    """The module pyarrow. Raises UserError where it is missing and for a damaged file."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"'{path}' needs the package pyarrow: pip install 'llama_jax[parquet]'") from None
    try:
        yield pyarrow
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"'{path}' is a damaged file ({reason}): get it again or leave it out") from None


def read_parquet(unit: Unit, config: DataConfig) -> Iterator[Item]:
    """A record a row, of the unit's row groups; only the columns of `fields` are read."""
    path = unit.file.path
    with open_file(unit.file.place) as content, _arrow(path) as pyarrow:
        parquet = pyarrow.parquet.ParquetFile(content)
        _check_columns(path, parquet.schema_arrow.names, config)
        first, end = unit.range_of(parquet.num_row_groups)
        row = sum(parquet.metadata.row_group(i).num_rows for i in range(first))
        batches = parquet.iter_batches(BATCH_ROWS, row_groups=range(first, end), columns=list(config.fields))
        yield from _rows(pyarrow, batches, row, path, config)


def read_arrow(unit: Unit, config: DataConfig) -> Iterator[Item]:
    """A record a row of a stream of record batches."""
    path = unit.file.path
    with open_file(unit.file.place) as content, _arrow(path) as pyarrow:
        batches = pyarrow.ipc.open_stream(content)
        _check_columns(path, batches.schema.names, config)
        yield from _rows(pyarrow, batches, 0, path, config)


def _check_columns(path: str, names: list[str], config: DataConfig) -> None:
    for field in config.fields:
        if field not in names:
            raise UserError(f"'{path}' has no column '{field}' (it has {', '.join(names)}): set fields")


def _rows(pyarrow: ModuleType, batches, row: int, path: str, config: DataConfig) -> Iterator[Item]:
    for batch in batches:
        columns = [_column(pyarrow, batch.column(field)) for field in config.fields]
        for values in zip(*columns, strict=True):
            row += 1
            yield _record(values, f"row {row} of '{path}'", config)


def _column(pyarrow: ModuleType, column) -> Iterator[object]:
    """A column's values: bytes of text, arrays of ids, lists of messages."""
    types = pyarrow.types
    if types.is_string(column.type) or types.is_large_string(column.type):
        # As bytes: a text that is not UTF-8 is that record's fault, not its batch's.
        column = column.cast(pyarrow.large_binary())
    is_list = types.is_list(column.type) or types.is_large_list(column.type)
    if is_list and types.is_integer(column.type.value_type):
        return (value.values.to_numpy(zero_copy_only=False) if value.is_valid else None for value in column)
    return (value.as_py() for value in column)


def _record(values: tuple, where: str, config: DataConfig) -> Item:
    parts: list[Part] = []
    for i, (field, value) in enumerate(zip(config.fields, values, strict=True)):
        if value is None:
            return BadRecord(where, NO_FIELD, f"'{field}' is null")
        if isinstance(value, bytes):
            if len(value) > config.max_record_bytes:
                return BadRecord(where, TOO_LONG)
            try:
                parts.append(value.decode())
            except UnicodeDecodeError:
                return BadRecord(where, NOT_UTF8)
        elif (part := as_part(value, label=i > 0)) is not None:
            parts.append(part)
        else:
            return BadRecord(where, WRONG_TYPE, f"'{field}' is no text, no list of token ids and no list of messages")
    return Record(tuple(parts), where)


def find_dataset(entry: str) -> CorpusFile:
    """The dataset `hf://NAME[/CONFIG]:SPLIT`, where NAME is `user/name`, or the path of a folder with data files.

    It comes in as many pieces as it has files. Raises UserError where it cannot be found.
    """
    datasets, (name, config, split) = _datasets(entry), _parse(entry)
    try:
        builder = datasets.load_dataset_builder(name, config)
        stream = datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # of the package, of the network and of many file formats
        raise _cannot(entry, error) from None
    files = (builder.config.data_files or {}).get(split)
    stamp = hashlib.sha256(repr([builder.hash, split, getattr(files, "origin_metadata", None)]).encode()).hexdigest()
    size = getattr((builder.info.splits or {}).get(split), "num_bytes", 0) or SHARD_BYTES * stream.num_shards
    return CorpusFile(entry, size, named=True, stamp=stamp, pieces=stream.num_shards)


def read_dataset(unit: Unit, config: DataConfig) -> Iterator[Item]:
    """A record a row, of one of the dataset's files."""
    entry = unit.file.path
    datasets, (name, subset, split) = _datasets(entry), _parse(entry)
    try:
        stream = datasets.load_dataset(name, subset, split=split, streaming=True)
        rows = enumerate(stream.shard(unit.count, unit.index), 1)
        while (found := next(rows, None)) is not None:
            number, row = found
            item = as_record(row, f"row {number} of file {unit.index + 1} of '{entry}'", config)
            if isinstance(item, BadRecord) and item.reason == NO_FIELD and not row.keys() >= set(config.fields):
                raise UserError(f"'{entry}' has no column '{config.fields[0]}' (it has {', '.join(row)}): set fields")
            yield item
    except UserError:
        raise
    except Exception as error:
        raise _cannot(entry, error) from None


def _cannot(entry: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"dataset '{entry}' cannot be read ({reason}): write it hf://NAME[/CONFIG]:SPLIT")


def _datasets(entry: str) -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise UserError(f"'{entry}' needs the package datasets: pip install 'llama_jax[datasets]'") from None
    return datasets


def _parse(entry: str) -> tuple[str, Any, str]:
    """(name, config or None, split) of an entry."""
    name, colon, split = entry.removeprefix("hf://").rpartition(":")
    if not colon or not name or not split:
        raise UserError(f"path '{entry}' must say its split: hf://NAME[/CONFIG]:SPLIT")
    user, *rest = name.split("/")
    if not user or name.startswith("."):  # a folder on disk
        return name, None, split
    return "/".join([user, *rest[:1]]), rest[1] if len(rest) > 1 else None, split
