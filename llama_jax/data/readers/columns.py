"""Parquet files, and the Arrow files that Hugging Face's `save_to_disk` writes."""

import contextlib
from collections.abc import Iterator
from types import ModuleType

from llama_jax.config import UserError
from llama_jax.data.config import DataConfig
from llama_jax.data.files import open_file
from llama_jax.data.readers.record import (
    NO_FIELD,
    NOT_UTF8,
    TOO_LONG,
    WRONG_TYPE,
    BadRecord,
    Item,
    Part,
    Record,
    as_part,
)  # fmt: skip
from llama_jax.data.readers.units import Unit

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
