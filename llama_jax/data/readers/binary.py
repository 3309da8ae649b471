"""Token ids in `.bin` files, as nanoGPT and llm.c keep them, and ArrayRecord files."""

import functools
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llama_jax.config import UserError
from llama_jax.data.config import DataConfig
from llama_jax.data.readers.opening import check_ids, open_file
from llama_jax.data.readers.records import NOT_JSON, NOT_UTF8, TOO_LONG, BadRecord, Item, Record, Unit, as_record
from llama_jax.remote import is_remote

HEADER = 1024  # bytes of llm.c's header: 256 int32, of which magic, version and number of tokens are used
DTYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # by magic and version
BATCH_TOKENS = 1 << 20


def read_tokens(unit: Unit, config: DataConfig, separators: Sequence[int]) -> Iterator[Item]:
    """Yield the documents between two separators (ids before or after each) that begin in the unit.

    The type of the ids is that of llm.c's header, or 16 bits without one (nanoGPT). Empty documents are left out.
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
        place = max(first - 1, 0)  # a document begins at `first` if the token before is a separator
        content.seek(offset + place * dtype.itemsize)
        owned = first == 0  # True where the current document begins in this unit
        held: list[np.ndarray] = []  # of the current document
        begin = size = 0  # its place and its number of tokens
        limit = config.max_record_bytes // dtype.itemsize
        while place < total and (owned or place < end):
            ids = np.frombuffer(content.read(min(BATCH_TOKENS, total - place) * dtype.itemsize), dtype)
            if not len(ids):
                raise UserError(f"'{path}' became shorter while it was read: get it again")
            cuts = np.flatnonzero(np.isin(ids, separators))
            for start, stop in zip([0, *(cuts + 1)], [*cuts, None], strict=True):
                if start:  # after a separator the next document begins
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
    """Return (byte at which the ids begin, their type, their number)."""
    path, size = unit.file.path, unit.file.size
    magic, version, count = struct.unpack_from("<3i", head) if len(head) >= 12 else (0, 0, 0)
    if (kind := DTYPES.get((magic, version))) is None:
        if size % 2:
            raise UserError(f"'{path}' is not a file of 16-bit token ids: it has an odd number of bytes")
        return 0, np.dtype("<u2"), size // 2
    dtype = np.dtype(kind)
    if size != HEADER + count * dtype.itemsize:
        raise UserError(f"'{path}' is damaged: its header has {count} tokens, which its size does not fit")
    return HEADER, dtype, count


def read_array_record(unit: Unit, config: DataConfig) -> Iterator[Item]:
    """Yield the records of the unit's share: `tf.train.Example` messages or JSON objects."""
    path = unit.file.place
    if not is_remote(path):
        yield from _array_records(path, unit, config)
        return
    with tempfile.NamedTemporaryFile(suffix=".array_record") as copy:  # the library opens local files alone
        with open_file(path) as content:
            shutil.copyfileobj(content, copy)
        copy.flush()
        yield from _array_records(copy.name, unit, config)


def _array_records(path: str, unit: Unit, config: DataConfig) -> Iterator[Item]:
    from array_record.python.array_record_module import ArrayRecordReader  # comes with Grain, but not on Windows

    if not os.path.getsize(path):
        return
    try:
        reader = ArrayRecordReader(path, "readahead_buffer_size:0")
        first, end = unit.range_of(reader.num_records())
        reader.seek(first)
        for number in range(first, end):  # one after the other: by number, each call decodes their whole chunk again
            yield _parsed(reader.read(), f"record {number + 1} of '{unit.file.path}'", config)
        reader.close()
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"'{unit.file.path}' is a damaged ArrayRecord file: get it again or leave it out") from None


def _parsed(record: bytes, where: str, config: DataConfig) -> Item:
    if len(record) > config.max_record_bytes:
        return BadRecord(where, TOO_LONG)
    try:
        return as_record(json.loads(record.decode()) if record[:1] == b"{" else example(record), where, config)
    except UnicodeDecodeError:
        return BadRecord(where, NOT_UTF8)
    except (ValueError, RecursionError):
        return BadRecord(where, NOT_JSON, "and no tf.train.Example")


def example(message: bytes) -> dict[str, bytes | np.ndarray | None]:
    """Return the features of a serialized `tf.train.Example`: the first of its bytes, or its integers.

    A list of floats is None. Raises ValueError for bytes that are no such message.
    """
    from google.protobuf.message import DecodeError

    parsed = _example_class()()
    try:
        parsed.ParseFromString(message)
    except DecodeError:
        raise ValueError("not a message") from None
    size = parsed.ByteSize()
    parsed.DiscardUnknownFields()
    if parsed.ByteSize() < size:
        raise ValueError("a message of another type")  # most bytes are some message of unknown fields
    features: dict[str, bytes | np.ndarray | None] = {}
    for entry in parsed.features.feature:
        kind, name = entry.value.WhichOneof("kind"), entry.key.decode()
        if kind == "bytes_list":
            features[name] = next(iter(entry.value.bytes_list.value), b"")
        elif kind is not None:
            features[name] = np.array(entry.value.int64_list.value, np.int64) if kind == "int64_list" else None
    return features


# tensorflow/core/example/{example,feature}.proto. The map from names to features is written out as what it is on the
# wire, repeated entries, with names as bytes: they may be no UTF-8.
_SCHEMA = """
name: "llama_jax/example.proto" package: "llama_jax" syntax: "proto3"
message_type { name: "Bytes" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "Floats" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Integers" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type { name: "Feature" oneof_decl { name: "kind" }
  field { name: "bytes_list" number: 1 type: TYPE_MESSAGE type_name: "Bytes" oneof_index: 0 }
  field { name: "float_list" number: 2 type: TYPE_MESSAGE type_name: "Floats" oneof_index: 0 }
  field { name: "int64_list" number: 3 type: TYPE_MESSAGE type_name: "Integers" oneof_index: 0 } }
message_type { name: "Entry" field { name: "key" number: 1 type: TYPE_BYTES }
  field { name: "value" number: 2 type: TYPE_MESSAGE type_name: "Feature" } }
message_type { name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: "Entry" } }
message_type { name: "Example" field { name: "features" number: 1 type: TYPE_MESSAGE type_name: "Features" } }
"""


@functools.cache
def _example_class() -> Any:
    """Return the message class of `tf.train.Example`, which comes with TensorFlow only."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_SCHEMA, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("llama_jax.Example"))
