"""Text and JSONL files."""

import codecs
import io
import json
from collections.abc import Iterable, Iterator

from llama_jax.data.config import DataConfig
from llama_jax.data.files import BUFFER
from llama_jax.data.readers.packed import opened
from llama_jax.data.readers.record import (
    HAS_NULS,
    NOT_JSON,
    NOT_UTF8,
    TOO_LONG,
    BadRecord,
    Item,
    Record,
    SkippedFile,
    as_record,
)  # fmt: skip
from llama_jax.data.readers.units import Unit

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
