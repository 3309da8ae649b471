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
)  # fmt: skip

_BOM = "\ufeff"
_REST = "the rows behind it are left out"


def lines_of(content: io.BufferedIOBase, unit: Unit, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield (first byte, line with its end) of the lines that begin in the unit's bytes; None for one over `limit`.

    Only a newline ends a line, in spite of Unicode's other ones; a line longer than `limit` is not held.
    """
    begin, end = unit.range_of(unit.file.size) if unit.count > 1 else (0, None)
    if begin:
        content.seek(begin - 1)  # the line of this byte belongs to the unit that has its beginning
        begin += _skip_line(content) - 1
    while (end is None or begin < end) and (line := content.readline(limit + 1)):
        size = len(line)
        if size > limit and not line.endswith(b"\n"):
            size += _skip_line(content)
            yield begin, None
        else:
            yield begin, line
        begin += size


def _skip_line(content: io.BufferedIOBase) -> int:
    """Read to the line's end; return the number of bytes."""
    skipped = 0
    while piece := content.readline(BUFFER):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def as_text(data: bytes, errors: str = "strict") -> str:
    """Decode UTF-8 without byte order marks, at the beginning or, as in files that were put together, of a line."""
    text = data.decode(errors=errors)
    return text.removeprefix(_BOM).replace("\n" + _BOM, "\n") if _BOM in text else text


def read_jsonl(unit: Unit, config: DataConfig) -> Iterator[Item]:
    """Yield a record for each line."""
    path = unit.file.path
    with opened(unit.file) as content:
        for number, (begin, line) in enumerate(lines_of(content, unit, config.max_record_bytes), 1):
            # Later units have no line numbers: nothing counts the lines before them.
            where = f"line {number} of '{path}'" if unit.index == 0 else f"the line at byte {begin} of '{path}'"
            if line is None:
                yield BadRecord(where, TOO_LONG)
            elif not line.isspace():
                yield _parsed(line, where, config)


def _parsed(line: bytes, where: str, config: DataConfig) -> Item:
    try:
        return as_record(json.loads(as_text(line)), where, config)
    except UnicodeDecodeError:
        return BadRecord(where, NOT_UTF8)
    except (ValueError, RecursionError) as error:
        return BadRecord(where, NOT_JSON, str(error))


def read_text(unit: Unit, config: DataConfig) -> Iterator[Item]:
    """Yield one document, or with `document_chars` several."""
    file, limit = unit.file, config.max_record_bytes
    where = f"'{file.path}'" if unit.count == 1 else f"part {unit.index + 1} of {unit.count} of '{file.path}'"

    def no_text(reason: str, found: str) -> Item:
        return BadRecord(where, reason) if file.named else SkippedFile(file.path, found)

    try:
        if config.document_chars is None:
            with opened(file) as content:
                data = content.read(limit + 1)
            if len(data) > limit:
                codecs.getincrementaldecoder("utf-8")().decode(data[:BUFFER])  # is it a large text, or no text?
                yield BadRecord(where, TOO_LONG)
            elif b"\0" in data:
                yield no_text(HAS_NULS, "a binary file")
            else:
                data = as_text(data)  # not both at a time
                yield Record((data,), where)
            return
        with opened(file) as content:  # all of it has to be text before any of it is a document
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
    """Yield the text of `lines` in texts of about so many characters that end at line ends."""
    part, size = [], 0
    for line in lines:
        if part and size + len(line) > document_chars:
            yield "".join(part)
            part, size = [], 0
        part.append(line)
        size += len(line)
    yield "".join(part)


def read_delimited(unit: Unit, config: DataConfig, *, dialect: str) -> Iterator[Item]:
    """Yield a record for each row; the header names the columns, of which only those of `fields` are taken."""
    path, limit = unit.file.path, config.max_record_bytes
    csv.field_size_limit(min(limit, sys.maxsize))
    too_long: list[str] = []
    with opened(unit.file) as content:
        rows = csv.reader(_lines(content, unit, limit, too_long), dialect, strict=True)
        header: list[str] = []
        number = 0
        while True:
            where = f"row {number + 1} of '{path}'" if header else f"the header of '{path}'"
            try:
                row = next(rows, None)
            except csv.Error as error:
                number += 1
                if "field limit" in str(error):  # a quote that nothing closes
                    yield BadRecord(where, TOO_LONG, _REST)
                    return
                yield BadRecord(where, NOT_TABLE, str(error))
                continue
            if row is None:
                break
            if row and header:
                number += 1
                yield _row(row, header, where, config)
            elif row:
                header = row
                if missing := [field for field in config.fields if field not in header]:
                    has = f"has no column '{missing[0]}' (it has {', '.join(header)[:200]})"
                    if unit.file.named:
                        raise UserError(f"'{path}' {has}: set fields")
                    yield SkippedFile(path, has)
                    return
    yield from (BadRecord(where, TOO_LONG, _REST) for where in too_long)


def _lines(content: io.BufferedIOBase, unit: Unit, limit: int, too_long: list[str]) -> Iterator[str]:
    """Yield the lines up to one that is too long, behind which no quote is known to be open or closed."""
    for begin, line in lines_of(content, unit, limit):
        if line is None:
            too_long.append(f"the line at byte {begin} of '{unit.file.path}'")
            return
        # Bytes that are no UTF-8 become halves of surrogate pairs, which make their own row bad.
        yield as_text(line, "surrogateescape")


def _row(row: list[str], header: list[str], where: str, config: DataConfig) -> Item:
    if len(row) != len(header):
        return BadRecord(where, NOT_TABLE, f"it has {len(row)} cells, and the header {len(header)}")
    parts = tuple(row[header.index(field)] for field in config.fields)
    try:
        size = sum(len(part.encode()) for part in parts)
    except UnicodeEncodeError:
        return BadRecord(where, NOT_UTF8)
    return BadRecord(where, TOO_LONG) if size > config.max_record_bytes else Record(parts, where)
