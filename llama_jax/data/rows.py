"""Rows of a batch by number: windows of a token stream, or packed examples of an objective."""

import abc
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from llama_jax.data.objectives import Document, Example, Objective, Vocabulary
from llama_jax.data.objectives.base import FLOATS
from llama_jax.data.packing import pack
from llama_jax.data.plan import special_ends
from llama_jax.data.stream import TokenStream
from llama_jax.data.windows import Batch, num_windows, read_windows


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
    def read(self, places: Sequence[tuple[int, int]]) -> Batch:
        """The batch of these (epoch, row); a row beyond the last is all padding."""


class WindowRows(Rows):
    """The stream cut into windows: causal language modelling with no index. `partial` counts a last one not full."""

    def __init__(self, stream: TokenStream, sequence_length: int, *, partial: bool):
        self._stream, self._length = stream, sequence_length
        self.num_rows = num_windows(stream, sequence_length, partial=partial)
        self.num_positions = self.num_rows * sequence_length
        self.num_tokens = min(self.num_positions, max(stream.num_tokens - 1, 0))

    def read(self, places: Sequence[tuple[int, int]]) -> Batch:
        return read_windows(self._stream, [row for _, row in places], self._length)


class PackedRows(Rows):
    """Examples packed as a plan says: row r has the pieces `rows[r]` to `rows[r + 1]`.

    A piece is (place, size) in the stream. The noise of a piece is a function of (seed, epoch, piece).
    """

    def __init__(
        self,
        stream: TokenStream,
        objective: Objective,
        vocabulary: Vocabulary,
        pieces: Int[np.ndarray, "p 2"],
        rows: Int[np.ndarray, " r"],
        *,
        sequence_length: int,
        num_tokens: int,
        num_dropped: int,
        seed: tuple[int, ...],
    ):
        self._stream, self._objective, self._vocabulary = stream, objective, vocabulary
        self._pieces, self._rows, self._length, self._seed = pieces, rows, sequence_length, seed
        self.num_rows, self.num_tokens, self.num_dropped = len(rows) - 1, num_tokens, num_dropped
        self.num_positions = self.num_rows * (sequence_length + (objective.source_length or 0))

    def read(self, places: Sequence[tuple[int, int]]) -> Batch:
        source_length = self._objective.source_length
        batch = empty_batch(self._objective, len(places), self._length)
        for number, (epoch, row) in enumerate(places):
            if row < self.num_rows:
                examples = [self._example(epoch, i) for i in range(int(self._rows[row]), int(self._rows[row + 1]))]
                for name, values in pack(examples, self._length, source_length).items():
                    batch[name][number] = values
        return batch

    def _example(self, epoch: int, piece: int) -> Example:
        place, size = (int(x) for x in self._pieces[piece])
        rng = np.random.default_rng([*self._seed, epoch, place])
        document = Document(self._stream.read(place, place + size), self._parts(place, size), self._other(place, rng))
        return self._objective.example(document, rng, self._vocabulary)

    def _parts(self, place: int, size: int) -> np.ndarray:
        """Where in a piece further parts of its document begin; 0 for each that began before it or with it."""
        shard, offset = self._stream.shard_at(place)
        if not len(shard.parts):
            return np.zeros(0, np.int64)
        local = place - offset
        document = shard.documents[np.searchsorted(shard.documents, local, side="right") - 1]
        first, last = np.searchsorted(shard.parts, [document, local + size])
        return np.maximum(shard.parts[first:last] - local, 0)

    def _other(self, place: int, rng: np.random.Generator) -> np.ndarray | None:
        """Of an objective that wants one, a random document of the same shard that is not the piece's own."""
        if not self._objective.wants_other:
            return None
        shard, offset = self._stream.shard_at(place)
        num_documents = len(shard.documents)
        if num_documents < 2:
            return None
        own = int(np.searchsorted(shard.documents, place - offset, side="right")) - 1
        other = (own + int(rng.integers(1, num_documents))) % num_documents
        start = int(shard.documents[other])
        end = int(shard.documents[other + 1]) if other + 1 < num_documents else len(shard.tokens)
        before, after = special_ends(self._vocabulary) if self._objective.bare else (0, 0)
        return shard.tokens[start + before : end - after].astype(np.int32)


def empty_batch(objective: Objective, num_rows: int, sequence_length: int) -> Batch:
    """The objective's batch of nothing but padding."""
    names = (*objective.fields(), "segment_ids")
    if objective.source_length is not None:
        names += ("source_segment_ids",)
    return {
        name: np.zeros(
            (num_rows, (objective.source_length or 0) if name.startswith("source_") else sequence_length),
            np.float32 if name in FLOATS else np.int32,
        )
        for name in names
    }
