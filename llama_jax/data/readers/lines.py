"""Text and JSONL files, plain, gzip or zstd."""

import codecs
import contextlib
import gzip
import io
import json
from collections.abc import Iterable, Iterator

import zstandard

from llama_jax.data.config import DataConfig
from llama_jax.data.files import BUFFER, open_file
from llama_jax.data.readers.record import (
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

WINDOW = 1 << 31  # the largest that zstd --long writes


class _Zstd(io.RawIOBase):
    """Decompressed frames of `raw`. Raises EOFError where one is cut off, which zstandard's own reader hides."""

    def __init__(self, raw: io.BufferedIOBase):
        self._raw, self._ready, self._rest = raw, b"", b""
        self._new_frame()

    def _new_frame(self) -> None:
        self._frame, self._begun = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj(), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[override]
        while not self._ready:
            data, self._rest = self._rest or self._raw.read(1 << 14), b""
            if not data:
                if self._begun:
                    raise EOFError
                return 0
            self._ready, self._begun = self._frame.decompress(data), True
            if self._frame.eof:
                self._rest = self._frame.unused_data
                self._new_frame()
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


@contextlib.contextmanager
def opened(path: str) -> Iterator[io.BufferedIOBase]:
    """The file's content, unzipped by its name."""
    with open_file(path) as raw:
        if path.endswith(".gz"):
            yield gzip.GzipFile(fileobj=raw)
        elif path.endswith(".zst"):
            yield io.BufferedReader(_Zstd(raw), BUFFER)
        else:
            yield raw


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


def read_jsonl(unit: Unit, config: DataConfig) -> Iterator[Item]:
    """A record a line."""
    path, whole = unit.file.path, unit.index == 0
    with opened(path) as content:
        for number, (begin, line) in enumerate(lines_of(content, unit, config.max_record_bytes), 1):
            where = f"line {number} of '{path}'" if whole else f"the line at byte {begin} of '{path}'"
            if line is None:
                yield BadRecord(where, TOO_LONG)
            elif not line.isspace():
                yield _parsed(line, where, config)


def _parsed(line: bytes, where: str, config: DataConfig) -> Item:
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError:
        return BadRecord(where, NOT_UTF8)
    except (ValueError, RecursionError) as error:
        return BadRecord(where, NOT_JSON, str(error))
    return as_record(values, where, config)


def read_json(unit: Unit, config: DataConfig) -> Iterator[Item]:
    """A `.json`: JSONL where its first line is a whole object, else one text."""
    with opened(unit.file.path) as content:
        first = content.readline(config.max_record_bytes + 1)
    try:
        is_lines = isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        is_lines = False
    if is_lines:
        yield from read_jsonl(unit, config)
    elif unit.index == 0:
        yield from read_text(Unit(unit.file, 0, 1), config)


def read_text(unit: Unit, config: DataConfig) -> Iterator[Item]:
    """One document, or with `document_chars` several."""
    file, limit = unit.file, config.max_record_bytes
    where = f"'{file.path}'" if unit.count == 1 else f"part {unit.index + 1} of {unit.count} of '{file.path}'"
    not_text = BadRecord(where, NOT_UTF8) if file.named else SkippedFile(file.path, "not UTF-8")
    if config.document_chars is None:
        with opened(file.path) as content:
            data = content.read(limit + 1)
        try:
            if len(data) <= limit:
                yield Record((data.decode(),), where)
            else:
                codecs.getincrementaldecoder("utf-8")().decode(data[:BUFFER])
                yield BadRecord(where, TOO_LONG)
        except UnicodeDecodeError:
            yield not_text
        return
    with opened(file.path) as content:  # all of it is text before any of it is a document
        try:
            for _, line in lines_of(content, unit, limit):
                (line or b"").decode()
        except UnicodeDecodeError:
            yield not_text
            return
    bad: list[BadRecord] = []

    def lines() -> Iterator[str]:
        with opened(file.path) as content:
            for begin, line in lines_of(content, unit, limit):
                if line is None:
                    bad.append(BadRecord(f"the line at byte {begin} of '{file.path}'", TOO_LONG))
                else:
                    yield line.decode()

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
