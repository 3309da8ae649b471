"""ArrayRecord files whose records are `tf.train.Example` messages or JSON objects."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator

import numpy as np

from llama_jax.config import UserError
from llama_jax.data.config import DataConfig
from llama_jax.data.files import open_file
from llama_jax.data.readers.record import NOT_JSON, NOT_UTF8, TOO_LONG, BadRecord, Item, as_record
from llama_jax.data.readers.units import Unit
from llama_jax.remote import is_remote
from llama_jax.tokenizers import read_varint

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
        tag, place = read_varint(message, place)
        size, place = read_varint(message, place)
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
