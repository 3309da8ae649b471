"""Files called `.json`: one object, an array of them, or JSON lines."""

import codecs
import io
import itertools
import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from llama_jax.data.config import DataConfig
from llama_jax.data.readers.opening import opened
from llama_jax.data.readers.records import (
    BUFFER,
    NOT_JSON,
    NOT_UTF8,
    TOO_LONG,
    BadRecord,
    Item,
    SkippedFile,
    Unit,
    as_record,
)
from llama_jax.data.readers.text import read_jsonl

_SPACE = re.compile(r"[ \t\r\n\ufeff]*")
_SPACE_BYTES = b" \t\r\n\xef\xbb\xbf"
_NEAR_END = 16  # characters: an error this near to the end may be a word or an escape that is not all here yet
_NUMBER = "0123456789+-.eE"
_REST = "what follows it in the file is left out"


def read_json(unit: Unit, config: DataConfig) -> Iterator[Item]:
    """Yield a record for each object: of an array, of those that follow one another, or the only one.

    A file is read as JSONL, in pieces, where the first of several lines is a whole object; any other is read by the
    first unit. A file that was only found and is one value without a record (a program's settings) is skipped.
    """
    with opened(unit.file) as content:
        is_lines = _is_lines(content, config.max_record_bytes)
    if is_lines:
        yield from read_jsonl(unit, config)
    elif unit.index == 0:
        with opened(unit.file) as content:
            items = _items(content, unit.file.path, config)
            first = list(itertools.islice(items, 2))
            item, in_array = first[0] if first else (None, False)
            if len(first) == 1 and isinstance(item, BadRecord) and not in_array and not unit.file.named:
                reason = f"{item.reason} ({item.detail})" if item.detail else item.reason
                yield SkippedFile(unit.file.path, reason)
            else:
                yield from (item for item, _ in itertools.chain(first, items))


def _is_lines(content: io.BufferedIOBase, limit: int) -> bool:
    while (begin := content.read(1)) and begin in _SPACE_BYTES:
        pass
    if begin != b"{":
        return False
    try:
        json.loads(begin + content.readline(limit))
    except (ValueError, RecursionError):
        return False
    return any(not data.isspace() for data in iter(lambda: content.read(BUFFER), b""))


def _items(content: io.BufferedIOBase, path: str, config: DataConfig) -> Iterator[tuple[Item, bool]]:
    """Yield (record of a value, True where it is an element of an array)."""
    for number, (value, in_array) in enumerate(json_values(content, config.max_record_bytes), 1):
        where = f"record {number} of '{path}'"
        if isinstance(value, JsonProblem):
            yield BadRecord(where, value.reason, value.detail), in_array
        else:
            yield as_record(value, where, config), in_array


class JsonProblem(NamedTuple):
    """Reason why there is no value where one should be, as in `BadRecord`."""

    reason: str
    detail: str = ""


def json_values(content: io.BufferedIOBase, limit: int) -> Iterator[tuple[object, bool]]:
    """Yield (value or JsonProblem, True where it is an element) of the values at the top, of an array its elements.

    About one value of at most `limit` bytes is held at a time. After a problem with the text itself nothing comes.
    """
    text, in_array, first = _Text(content, limit), False, True
    while (char := text.next_char()) or in_array:
        if in_array and char == "]":
            text.place += 1
            in_array = False
            continue
        if not in_array and char == "[":
            text.place += 1
            in_array = first = True
            if text.next_char() == "]":
                continue
        elif in_array and not first:
            if char != ",":
                yield JsonProblem(NOT_JSON, f"an array goes on with {char!r}" if char else "an array has no end"), True
                return
            text.place += 1
            text.next_char()
        first = False
        value, is_end = text.value()
        yield value, in_array
        if is_end:
            return


class _Text:
    """A JSON text of which the part at `place` is held."""

    def __init__(self, content: io.BufferedIOBase, limit: int):
        self._content, self._limit = content, limit
        # Bytes that are no UTF-8 become halves of surrogate pairs, which make their own value a problem.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._decode = json.JSONDecoder().raw_decode
        self._held, self._ended = "", False
        self.place = 0

    def next_char(self) -> str:
        """Return the next character that is not white space, or "" at the end."""
        while True:
            space = _SPACE.match(self._held, self.place)
            assert space is not None  # it matches nothing too
            self.place = space.end()
            if self.place < len(self._held) or self._ended:
                return self._held[self.place : self.place + 1]
            self._fill()

    def value(self) -> tuple[object, bool]:
        """Return (the value that begins here or its JsonProblem, True where nothing can be read behind it)."""
        while True:
            try:
                value, end = self._decode(self._held, self.place)
                behind = self._held[end : end + _NEAR_END]
                if self._ended or len(behind) == _NEAR_END or (behind and behind[0] not in _NUMBER):
                    break  # else a number may go on
            except RecursionError:
                return JsonProblem(NOT_JSON, f"it is nested too deeply; {_REST}"), True
            except ValueError as error:
                place, message = getattr(error, "pos", 0), getattr(error, "msg", str(error))
                is_cut = message.startswith("Unterminated string") or place >= len(self._held) - _NEAR_END
                if self._ended or not is_cut:
                    return JsonProblem(NOT_JSON, f"{message}; {_REST}"), True
            if len(self._held) - self.place > self._limit:
                return JsonProblem(TOO_LONG, _REST), True
            self._fill()
        text, self.place = self._held[self.place : end], end
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            return JsonProblem(NOT_UTF8), False
        return (JsonProblem(TOO_LONG) if size > self._limit else value), False

    def _fill(self) -> None:
        """Read on, as much as is held: a long value is parsed again only as often as it doubles."""
        rest = self._held[self.place :]
        data = self._content.read(max(BUFFER, len(rest)))
        self._ended = not data
        self._held, self.place = rest + self._decoder.decode(data, final=self._ended), 0
