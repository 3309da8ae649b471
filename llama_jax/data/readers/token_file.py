"""Token ids in one `.bin`, as nanoGPT and llm.c keep them."""

import struct
from collections.abc import Iterator, Sequence

import numpy as np

from llama_jax.config import UserError
from llama_jax.data.config import DataConfig
from llama_jax.data.files import open_file
from llama_jax.data.readers.content import check_ids
from llama_jax.data.readers.record import TOO_LONG, BadRecord, Item, Record
from llama_jax.data.readers.units import Unit

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
