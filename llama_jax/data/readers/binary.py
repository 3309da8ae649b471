"""Token ids in `.bin` files, and ArrayRecord files."""

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np

from llama_jax.config import UserError
from llama_jax.data.config import DataConfig
from llama_jax.data.readers.opening import check_ids, open_file
from llama_jax.data.readers.records import NOT_JSON, NOT_UTF8, TOO_LONG, BadRecord, Item, Record, Unit, as_record
from llama_jax.remote import is_remote

HEADER = 1024  # llm.c: 256 int32, of which magic, version and number of tokens are used
DTYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
BATCH_TOKENS = 1 << 20


def read_tokens(unit: Unit, config: DataConfig, separators: Sequence[int]) -> Iterator[Item]:
    """A document between two separators (the ids that stand before or after each), of those that begin in the unit.

    With llm.c's header the ids are of its kind, without one 16 bits wide (nanoGPT). Documents of no token are none.
    """
    path = unit.file.path
    with open_file(unit.file.place) as content:
        head = content.read(HEADER)
        check_ids(head)
        if not separators:
            raise UserError(f"'{path}' needs a tokenizer with a token that ends a document: this one has none")
        offset, dtype, total = _layout(head, unit)
        first, end = unit.range_of(total)
        if first == end:
            return
        place = max(first - 1, 0)  # a document begins here where a separator is just before
        content.seek(offset + place * dtype.itemsize)
        owned = first == 0  # whether the document that we are in is ours
        held: list[np.ndarray] = []
        size, limit = 0, config.max_record_bytes // dtype.itemsize
        begin = 0  # where the document that we are in begins
        while place < total and (owned or place < end):
            data = content.read(min(BATCH_TOKENS, total - place) * dtype.itemsize)
            ids = np.frombuffer(data, dtype)
            if not len(ids):
                raise UserError(f"'{path}' became shorter while it was read: get it again")
            cuts = np.flatnonzero(np.isin(ids, separators))
            for start, stop in zip([0, *(cuts + 1)], [*cuts, None], strict=True):
                if start:  # behind a separator a document begins
                    begin, owned, held, size = place + int(start), True, [], 0
                    if begin >= end:
                        return
                piece = ids[start:stop]
                size += len(piece)
                if owned and size <= limit:
                    held.append(piece)
                at_end = stop is not None or place + len(ids) == total
                if owned and size and at_end:
                    where = f"the document at token {begin} of '{path}'"
                    yield BadRecord(where, TOO_LONG) if size > limit else Record((np.concatenate(held),), where)
            place += len(ids)


def _layout(head: bytes, unit: Unit) -> tuple[int, np.dtype, int]:
    """(where the ids begin, their type, how many there are)."""
    path, size = unit.file.path, unit.file.size
    magic, version, count = struct.unpack_from("<3i", head) if len(head) >= 12 else (0, 0, 0)
    if (kind := DTYPES.get((magic, version))) is None:
        if size % 2:
            raise UserError(f"'{path}' is no file of 16-bit token ids: it has an odd number of bytes")
        return 0, np.dtype("<u2"), size // 2
    dtype = np.dtype(kind)
    if size != HEADER + count * dtype.itemsize:
        raise UserError(f"'{path}' is damaged: its header says {count} tokens and its size another number")
    return HEADER, dtype, count


BATCH_RECORDS = 64


def read_array_record(unit: Unit, config: DataConfig) -> Iterator[Item]:
    """A record of the file a record, of the unit's share of them."""
    path = unit.file.place
    if not is_remote(path):
        yield from _read(path, unit, config)
        return
    with tempfile.NamedTemporaryFile(suffix=".array_record") as copy:  # the library opens files on disk alone
        with open_file(path) as content:
            shutil.copyfileobj(content, copy)
        copy.flush()
        yield from _read(copy.name, unit, config)


def _read(path: str, unit: Unit, config: DataConfig) -> Iterator[Item]:
    from array_record.python import array_record_module  # type: ignore[attr-defined]  # comes with Grain, but not on Windows

    damaged = UserError(f"'{unit.file.path}' is a damaged ArrayRecord file: get it again or leave it out")
    if not os.path.getsize(path):
        return
    try:
        reader = array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0")
        first, end = unit.range_of(reader.num_records())
        for begin in range(first, end, BATCH_RECORDS):
            numbers = list(range(begin, min(begin + BATCH_RECORDS, end)))
            try:
                records = reader.read(numbers)
            except (RuntimeError, ValueError, IndexError):
                raise damaged from None
            for number, record in zip(numbers, records, strict=True):
                yield _parsed(record, f"record {number + 1} of '{unit.file.path}'", config)
        reader.close()
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise damaged from None


def _parsed(record: bytes, where: str, config: DataConfig) -> Item:
    if len(record) > config.max_record_bytes:
        return BadRecord(where, TOO_LONG)
    try:
        if record[:1] == b"{":
            return as_record(json.loads(record.decode()), where, config)
        values = {name: value.decode() if isinstance(value, bytes) else value for name, value in example(record)}
        return as_record(values, where, config)
    except UnicodeDecodeError:
        return BadRecord(where, NOT_UTF8)
    except (ValueError, IndexError, RecursionError):
        return BadRecord(where, NOT_JSON, "and no tf.train.Example")


def example(message: bytes) -> Iterator[tuple[str, bytes | np.ndarray | None]]:
    """(name, value) of the features of a serialized `tf.train.Example`: the first of its bytes, or its integers.

    The messages (tensorflow/core/example): Example {Features features = 1}, Features {map<string, Feature> feature =
    1}, Feature {BytesList = 1 | FloatList = 2 | Int64List = 3}, each list {repeated value = 1}. A list of floats is
    None. Raises ValueError or IndexError for what is none.
    """
    for _, features in _fields(message, 1):
        for _, entry in _fields(features, 1):
            pair = dict(_fields(entry, 1, 2))
            if pair.keys() != {1, 2}:
                raise ValueError
            for kind, values in _fields(pair[2], 1, 2, 3):
                name = bytes(pair[1]).decode()
                if kind == 1:
                    yield name, next((bytes(value) for _, value in _fields(values, 1)), b"")
                elif kind == 2:
                    yield name, None
                else:
                    yield name, _integers(values)


def _fields(message: bytes | memoryview, *numbers: int) -> Iterator[tuple[int, memoryview]]:
    """(number, content) of the message's fields, all of which have a length and one of these numbers."""
    message, place = memoryview(message), 0
    while place < len(message):
        tag, place = _read_varint(message, place)
        size, place = _read_varint(message, place)
        if tag & 7 != 2 or tag >> 3 not in numbers or place + size > len(message):
            raise ValueError
        yield tag >> 3, message[place : place + size]
        place += size


def _integers(values: memoryview) -> np.ndarray:
    """The integers of an Int64List, packed as writers do now, or each with its tag."""
    if len(values) and values[0] == 1 << 3:  # varints, each behind the same tag
        return _varints(values)[1::2]
    return np.concatenate([np.zeros(0, np.int64), *(_varints(packed) for _, packed in _fields(values, 1))])


def _varints(packed: memoryview) -> np.ndarray:
    """All varints of `packed`, at once."""
    data = np.frombuffer(packed, np.uint8)
    if not len(data):
        return np.zeros(0, np.int64)
    ends = np.flatnonzero(data < 128)
    if not len(ends) or ends[-1] != len(data) - 1:
        raise ValueError
    begins = np.concatenate([[0], ends[:-1] + 1])
    within = np.arange(len(data)) - np.repeat(begins, ends - begins + 1)
    bits = (data & 127).astype(np.uint64) << (7 * within).astype(np.uint64)
    return np.bitwise_or.reduceat(bits, begins).view(np.int64)


def _read_varint(message: bytes | memoryview, position: int) -> tuple[int, int]:
    """Return protobuf's varint at `position` (seven bits a byte, the lowest first) and the position after it."""
    value = shift = 0
    while True:
        value |= (message[position] & 127) << shift
        position, shift = position + 1, shift + 7
        if message[position - 1] < 128:
            return value, position
