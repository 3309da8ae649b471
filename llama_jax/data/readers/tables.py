"""Parquet files, Arrow files as `save_to_disk` of Hugging Face writes them, and datasets of its Hub."""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

from llama_jax.config import UserError
from llama_jax.data.config import DataConfig
from llama_jax.data.readers.opening import open_file
from llama_jax.data.readers.records import NO_FIELD, SHARD_BYTES, BadRecord, CorpusFile, Item, Unit, as_record

BATCH_ROWS = 256


@contextlib.contextmanager
def _arrow(path: str) -> Iterator[ModuleType]:
    """Yield the module pyarrow. Raises UserError where it is missing and for a damaged file."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"'{path}' needs the package pyarrow: pip install 'llama_jax[parquet]'") from None
    try:
        yield pyarrow
    except (pyarrow.ArrowException, OSError, EOFError, MemoryError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"'{path}' is a damaged file ({reason}): get it again or leave it out") from None


def read_parquet(unit: Unit, config: DataConfig) -> Iterator[Item]:
    """Yield a record for each row of the unit's row groups; only the columns of `fields` are read."""
    with open_file(unit.file.place) as content, _arrow(unit.file.path) as pyarrow:
        parquet = pyarrow.parquet.ParquetFile(content)
        _check_columns(unit.file.path, parquet.schema_arrow.names, config)
        first, end = unit.range_of(parquet.num_row_groups)
        before = sum(parquet.metadata.row_group(i).num_rows for i in range(first))
        batches = parquet.iter_batches(BATCH_ROWS, row_groups=range(first, end), columns=list(config.fields))
        yield from _rows(pyarrow, batches, before, unit.file.path, config)


def read_arrow(unit: Unit, config: DataConfig) -> Iterator[Item]:
    """Yield a record for each row of a stream of record batches."""
    with open_file(unit.file.place) as content, _arrow(unit.file.path) as pyarrow:
        batches = pyarrow.ipc.open_stream(content)
        _check_columns(unit.file.path, batches.schema.names, config)
        yield from _rows(pyarrow, batches, 0, unit.file.path, config)


def _check_columns(path: str, names: Iterable[str], config: DataConfig) -> None:
    for field in config.fields:
        if field not in names:
            raise UserError(f"'{path}' has no column '{field}' (it has {', '.join(names)}): set fields")


def _rows(pyarrow: ModuleType, batches: Iterable[Any], row: int, path: str, config: DataConfig) -> Iterator[Item]:
    """Yield the records of `batches`, which follow `row` others."""
    for batch in batches:
        columns = [_column(pyarrow, batch.column(field)) for field in config.fields]
        for values in zip(*columns, strict=True):
            row += 1
            yield as_record(dict(zip(config.fields, values, strict=True)), f"row {row} of '{path}'", config)


def _column(pyarrow: ModuleType, column: Any) -> Iterator[object]:
    """Yield a column's values: bytes of text, arrays of ids, lists of messages."""
    types = pyarrow.types
    if types.is_string(column.type) or types.is_large_string(column.type):
        # As bytes: a text that is not UTF-8 makes its own record bad, and not its whole batch.
        column = column.view(pyarrow.binary() if types.is_string(column.type) else pyarrow.large_binary())
    column.validate(full=True)  # its offsets: the library would follow them out of the file
    is_list = types.is_list(column.type) or types.is_large_list(column.type)
    if is_list and types.is_integer(column.type.value_type):
        return (value.values.to_numpy(zero_copy_only=False) if value.is_valid else None for value in column)
    return (value.as_py() for value in column)


def is_dataset(path: str) -> bool:
    """Return True where `path` names a Hugging Face dataset, and not a file of the Hub's file system."""
    return path.startswith("hf://") and not path.startswith(("hf://datasets/", "hf://buckets/"))


def find_dataset(entry: str) -> CorpusFile:
    """Return the dataset `hf://NAME[/CONFIG]:SPLIT`; NAME is `user/name`, or the path of a folder with data files.

    It comes in as many pieces as it has files. Raises UserError where it cannot be found.
    """
    name, config, split = _parse(entry)
    with _hub(entry) as datasets:
        builder = datasets.load_dataset_builder(name, config)
        stream = datasets.load_dataset(name, config, split=split, streaming=True)
    files = (builder.config.data_files or {}).get(split)
    stamp = hashlib.sha256(repr([builder.hash, split, getattr(files, "origin_metadata", None)]).encode()).hexdigest()
    size = getattr((builder.info.splits or {}).get(split), "num_bytes", 0) or SHARD_BYTES * stream.num_shards
    return CorpusFile(entry, size, named=True, stamp=stamp, pieces=stream.num_shards)


def read_dataset(unit: Unit, config: DataConfig) -> Iterator[Item]:
    """Yield a record for each row of one of the dataset's files."""
    entry = unit.file.path
    name, subset, split = _parse(entry)
    with _hub(entry) as datasets:
        stream = datasets.load_dataset(name, subset, split=split, streaming=True)
        for number, row in enumerate(stream.shard(unit.count, unit.index), 1):
            item = as_record(row, f"row {number} of file {unit.index + 1} of '{entry}'", config)
            if isinstance(item, BadRecord) and item.reason == NO_FIELD:
                _check_columns(entry, row, config)
            yield item


@contextlib.contextmanager
def _hub(entry: str) -> Iterator[ModuleType]:
    """Yield the module datasets. Raises UserError where it is missing, and for its errors."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"'{entry}' needs the package datasets: pip install 'llama_jax[datasets]'") from None
    try:
        yield datasets
    except UserError:
        raise
    except Exception as error:  # of the package, of the network and of many file formats
        reason = " ".join(str(error).split())
        raise UserError(f"dataset '{entry}' cannot be read ({reason}): write it hf://NAME[/CONFIG]:SPLIT") from None


def _parse(entry: str) -> tuple[str, str | None, str]:
    """Return (name, config or None, split) of an entry."""
    name, colon, split = entry.removeprefix("hf://").rpartition(":")
    if not colon or not name or not split:
        raise UserError(f"path '{entry}' must name its split: hf://NAME[/CONFIG]:SPLIT")
    user, *rest = name.split("/")
    if not user or name.startswith("."):  # a folder on disk
        return name, None, split
    return "/".join([user, *rest[:1]]), rest[1] if len(rest) > 1 else None, split
