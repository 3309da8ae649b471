"""Rows that are windows of a token stream, and the interface of all rows."""

import abc
from collections.abc import Sequence
from typing import override

import numpy as np

from llama_jax.data.corpus.corpus import TokenStream

type HostBatch = dict[str, np.ndarray]
"""Arrays [B, T]: `tokens`, `targets`, `segment_ids` (from 1 in each row, 0 is padding) and `positions` (from 0 in each
document and at the start of the row) are int32; `weights` is float32, 1 where the target is of the token's document."""


class Rows(abc.ABC):
    """Rows of one source: the same in every epoch, though an objective may draw other noise.

    `num_rows` in an epoch; `num_tokens` are the positions of all of them that are not padding, `num_positions` all;
    `num_dropped` documents are in no row.
    """

    num_rows: int
    num_tokens: int
    num_positions: int
    num_dropped: int = 0

    @abc.abstractmethod
    def read(self, places: Sequence[tuple[int, int]]) -> HostBatch:
        """Return the batch of these (epoch, row); a row beyond the last is all padding."""


class WindowRows(Rows):
    """The stream cut into windows: row r has the T+1 tokens from T * r on, all but the last of them as inputs.

    Consecutive windows share one token, the last target of one being the first input of the next: over all windows
    every token but the first of a document is a target exactly once. A last window that is not full counts if
    `partial`.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, *, partial: bool):
        self._stream, self._length = stream, sequence_length
        num_targets = max(stream.num_tokens - 1, 0)
        self.num_rows = -(-num_targets // sequence_length) if partial else num_targets // sequence_length
        self.num_positions = self.num_rows * sequence_length
        self.num_tokens = min(self.num_positions, num_targets)

    @override
    def read(self, places: Sequence[tuple[int, int]]) -> HostBatch:
        self._stream.begin_batch()
        shape = len(places), self._length + 1
        tokens, sizes = np.zeros(shape, np.int32), np.zeros((len(places), 1), np.int64)
        begins = np.zeros(shape, bool)  # True where a document begins inside the row
        for row, (_, index) in enumerate(places):
            start = index * self._length
            window = self._stream.read(start, start + self._length + 1)
            tokens[row, : len(window)] = window
            begins[row, self._stream.document_starts(start + 1, start + len(window)) - start] = True
            sizes[row] = len(window)
        document = np.cumsum(begins, axis=1, dtype=np.int32)
        columns = np.arange(self._length + 1)
        positions = columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
        is_input = (columns < sizes)[:, 1:]  # an input has its target one place further
        return {
            "tokens": np.where(is_input, tokens[:, :-1], 0).astype(np.int32),
            "targets": tokens[:, 1:].copy(),
            "weights": (is_input & (document[:, 1:] == document[:, :-1])).astype(np.float32),
            "segment_ids": np.where(is_input, document[:, :-1] + 1, 0).astype(np.int32),
            "positions": np.where(is_input, positions[:, :-1], 0).astype(np.int32),
        }
