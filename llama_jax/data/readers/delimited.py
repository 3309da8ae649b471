"""Tables of text: CSV and TSV with a header."""

import csv
import io
import sys
from collections.abc import Iterator

from llama_jax.config import UserError
from llama_jax.data.config import DataConfig
from llama_jax.data.readers.lines import as_text, lines_of
from llama_jax.data.readers.packed import opened
from llama_jax.data.readers.record import NOT_TABLE, NOT_UTF8, TOO_LONG, BadRecord, Item, Record, SkippedFile
from llama_jax.data.readers.units import Unit, kind_of

_REST = "the rows behind it are left out"


def read_delimited(unit: Unit, config: DataConfig) -> Iterator[Item]:
    """A record a row; the header names the columns, of which only those of `fields` are taken."""
    path, limit = unit.file.path, config.max_record_bytes
    csv.field_size_limit(min(limit, sys.maxsize))
    too_long: list[str] = []
    with opened(unit.file) as content:
        rows = csv.reader(
            _lines(content, unit, limit, too_long), "excel-tab" if kind_of(path) == "tsv" else "excel", strict=True
        )
        header: list[str] | None = None
        number = 0
        while True:
            where = f"row {number + 1} of '{path}'" if header else f"the header of '{path}'"
            try:
                if (row := next(rows, None)) is None:
                    break
            except csv.Error as error:
                number += 1
                if "field limit" in str(error):  # a quote that nothing closes
                    yield BadRecord(where, TOO_LONG, _REST)
                    return
                yield BadRecord(where, NOT_TABLE, str(error))
                continue
            if not row:
                continue
            if header is None:
                header = row
                missing = [field for field in config.fields if field not in header]
                if missing:
                    has = f"has no column '{missing[0]}' (it has {', '.join(header)[:200]})"
                    if unit.file.named:
                        raise UserError(f"'{path}' {has}: set fields")
                    yield SkippedFile(path, has)
                    return
                columns = [header.index(field) for field in config.fields]
                continue
            number += 1
            yield _record(row, columns, len(header), where, limit)
    for where in too_long:
        yield BadRecord(where, TOO_LONG, _REST)


def _lines(content: io.BufferedIOBase, unit: Unit, limit: int, too_long: list[str]) -> Iterator[str]:
    """The lines up to one that is too long: no quote is known to be open or closed behind it."""
    for begin, line in lines_of(content, unit, limit):
        if line is None:
            too_long.append(f"the line at byte {begin} of '{unit.file.path}'")
            return
        # What is no UTF-8 becomes half a surrogate pair, and is told of its own row.
        yield as_text(line, "surrogateescape")


def _record(row: list[str], columns: list[int], width: int, where: str, limit: int) -> Item:
    if len(row) != width:
        return BadRecord(where, NOT_TABLE, f"it has {len(row)} cells, and the header {width}")
    parts = tuple(row[column] for column in columns)
    try:
        size = sum(len(part.encode()) for part in parts)
    except UnicodeEncodeError:
        return BadRecord(where, NOT_UTF8)
    return BadRecord(where, TOO_LONG) if size > limit else Record(parts, where)
