"""Rows that are windows of a token stream, and what all kinds of rows have in common."""

import abc
from collections.abc import Sequence

import numpy as np

from llama_jax.data.corpus.corpus import TokenStream

type HostBatch = dict[str, np.ndarray]
"""Arrays [B, T]: `tokens`, `targets`, `segment_ids` (from 1 in each row, 0 is padding) and `positions` (from 0 in each
document and at the start of the row) are int32; `weights` is float32, 1 where the target is of the token's document."""


def num_windows(stream: TokenStream, sequence_length: int, *, partial: bool) -> int:
    """Windows of that length: all its tokens but the last are inputs; `partial` counts one not full."""
    targets = max(stream.num_tokens - 1, 0)
    return -(-targets // sequence_length) if partial else targets // sequence_length


def read_windows(stream: TokenStream, indices: Sequence[int], sequence_length: int) -> HostBatch:
    """The batch whose row r is window `indices[r]`: the T+1 tokens from T * index on; beyond the stream all is padding.

    Consecutive windows share one token, the last target of one being the first input of the next: over all windows
    every token but the first of a document is a target exactly once.
    """
    rows, length = len(indices), sequence_length
    tokens = np.zeros((rows, length + 1), np.int32)
    begins = np.zeros((rows, length + 1), bool)  # where a document begins inside the row
    sizes = np.zeros((rows, 1), np.int64)
    for row, index in enumerate(indices):
        start = index * length
        window = stream.read(start, start + length + 1)
        tokens[row, : len(window)] = window
        begins[row, stream.document_starts(start + 1, start + len(window)) - start] = True
        sizes[row] = len(window)
    document = np.cumsum(begins, axis=1, dtype=np.int32)
    columns = np.arange(length + 1)
    positions = columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    real = columns < sizes  # tokens; what is an input has its target one further
    is_input = real[:, 1:]
    return {
        "tokens": np.where(is_input, tokens[:, :-1], 0).astype(np.int32),
        "targets": tokens[:, 1:].copy(),
        "weights": (is_input & (document[:, 1:] == document[:, :-1])).astype(np.float32),
        "segment_ids": np.where(is_input, document[:, :-1] + 1, 0).astype(np.int32),
        "positions": np.where(is_input, positions[:, :-1], 0).astype(np.int32),
    }


class Rows(abc.ABC):
    """What one source gives: the same rows in every epoch, though an objective may draw other noise.

    `num_rows` in an epoch; `num_tokens` are the positions of all of them that are not padding, `num_positions` all;
    `num_dropped` documents are in no row.
    """

    num_rows: int
    num_tokens: int
    num_positions: int
    num_dropped: int = 0

    @abc.abstractmethod
    def read(self, places: Sequence[tuple[int, int]]) -> HostBatch:
        """The batch of these (epoch, row); a row beyond the last is all padding."""


class WindowRows(Rows):
    """The stream cut into windows: causal language modelling with no index. `partial` counts a last one not full."""

    def __init__(self, stream: TokenStream, sequence_length: int, *, partial: bool):
        self._stream, self._length = stream, sequence_length
        self.num_rows = num_windows(stream, sequence_length, partial=partial)
        self.num_positions = self.num_rows * sequence_length
        self.num_tokens = min(self.num_positions, max(stream.num_tokens - 1, 0))

    def read(self, places: Sequence[tuple[int, int]]) -> HostBatch:
        return read_windows(self._stream, [row for _, row in places], self._length)
