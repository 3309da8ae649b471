"""Text, JSONL, CSV and TSV files."""

import codecs
import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator

from llama_jax.config import UserError
from llama_jax.data.config import DataConfig
from llama_jax.data.readers.opening import opened
from llama_jax.data.readers.records import (
    BUFFER,
    HAS_NULS,
    NOT_JSON,
    NOT_TABLE,
    NOT_UTF8,
    TOO_LONG,
    BadRecord,
    Item,
    Record,
    SkippedFile,
    Unit,
    as_record,
    kind_of,
)

_BOM = "\ufeff"


def lines_of(content: io.BufferedIOBase, unit: Unit, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """(where it begins, the line with its end) of the lines that begin in the unit's bytes; None for one longer.

    A line's end is a newline alone, whatever Unicode says; no line is held that is longer than `limit`.
    """
    begin, end = unit.range_of(unit.file.size) if unit.count > 1 else (0, None)
    if begin:
        content.seek(begin - 1)  # the line that has this byte belongs to who owns its beginning
        begin += _skip_line(content) - 1
    while end is None or begin < end:
        line = content.readline(limit + 1)
        if not line:
            return
        size = len(line)
        if size > limit and not line.endswith(b"\n"):
            size += _skip_line(content)
            yield begin, None
        else:
            yield begin, line
        begin += size


def _skip_line(content: io.BufferedIOBase) -> int:
    """Reads to the line's end; how many bytes that was."""
    skipped = 0
    while piece := content.readline(BUFFER):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def as_text(data: bytes, errors: str = "strict") -> str:
    """`data` from UTF-8, without the marks that begin a UTF-8 file where one stands at the beginning or, as in files
    that were put together, at a line's."""
    text = data.decode(errors=errors)
    return text.removeprefix(_BOM).replace("\n" + _BOM, "\n") if _BOM in text else text


def read_jsonl(unit: Unit, config: DataConfig) -> Iterator[Item]:
    """A record a line."""
    path, whole = unit.file.path, unit.index == 0
    with opened(unit.file) as content:
        for number, (begin, line) in enumerate(lines_of(content, unit, config.max_record_bytes), 1):
            where = f"line {number} of '{path}'" if whole else f"the line at byte {begin} of '{path}'"
            if line is None:
                yield BadRecord(where, TOO_LONG)
            elif not line.isspace():
                yield _parsed(line, where, config)


def _parsed(line: bytes, where: str, config: DataConfig) -> Item:
    try:
        values = json.loads(as_text(line))
    except UnicodeDecodeError:
        return BadRecord(where, NOT_UTF8)
    except (ValueError, RecursionError) as error:
        return BadRecord(where, NOT_JSON, str(error))
    return as_record(values, where, config)


def read_text(unit: Unit, config: DataConfig) -> Iterator[Item]:
    """One document, or with `document_chars` several."""
    file, limit = unit.file, config.max_record_bytes
    where = f"'{file.path}'" if unit.count == 1 else f"part {unit.index + 1} of {unit.count} of '{file.path}'"

    def no_text(reason: str, found: str) -> Item:
        return BadRecord(where, reason) if file.named else SkippedFile(file.path, found)

    if config.document_chars is None:
        with opened(file) as content:
            data = content.read(limit + 1)
        try:
            if len(data) > limit:
                codecs.getincrementaldecoder("utf-8")().decode(data[:BUFFER])
                yield BadRecord(where, TOO_LONG)
            elif b"\0" in data:
                yield no_text(HAS_NULS, "a binary file")
            else:
                yield Record((as_text(data),), where)
        except UnicodeDecodeError:
            yield no_text(NOT_UTF8, "not UTF-8")
        return
    with opened(file) as content:  # all of it is text before any of it is a document
        try:
            for _, line in lines_of(content, unit, limit):
                (line or b"").decode()
                if b"\0" in (line or b""):
                    yield no_text(HAS_NULS, "a binary file")
                    return
        except UnicodeDecodeError:
            yield no_text(NOT_UTF8, "not UTF-8")
            return
    bad: list[BadRecord] = []

    def lines() -> Iterator[str]:
        with opened(file) as content:
            for begin, line in lines_of(content, unit, limit):
                if line is None:
                    bad.append(BadRecord(f"the line at byte {begin} of '{file.path}'", TOO_LONG))
                else:
                    yield as_text(line)

    for text in cut(lines(), config.document_chars):
        yield from bad
        bad.clear()
        yield Record((text,), where)
    yield from bad


def cut(lines: Iterable[str], document_chars: int) -> Iterator[str]:
    """The text of `lines`, cut at their ends into texts of about so many characters."""
    part, size = [], 0
    for line in lines:
        if part and size + len(line) > document_chars:
            yield "".join(part)
            part, size = [], 0
        part.append(line)
        size += len(line)
    yield "".join(part)


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
