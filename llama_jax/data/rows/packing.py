"""Rows of packed examples: documents through an objective, side by side in one row."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from llama_jax.data.corpus.corpus import TokenStream
from llama_jax.data.objectives.base import FLOATS, Document, Example, Objective, Vocabulary
from llama_jax.data.rows.fitting import special_ends
from llama_jax.data.rows.windows import HostBatch, Rows

SOURCE = "source_"


def pack(examples: Sequence[Example], length: int, source_length: int | None) -> Example:
    """One row: the examples' fields one after another, then zeros up to `length` (`source_length` in the source).

    `segment_ids` and, with a source, `source_segment_ids` number the examples from 1, equally in both; 0 is padding.
    Raises ValueError where the examples do not fit, or are not of one objective.
    """
    names = list(examples[0]) if examples else []
    if not names or any(list(example) != names for example in examples):
        raise ValueError("a row needs examples, all with the same fields")
    row: Example = {}
    for prefix, capacity in (("", length), (SOURCE, source_length)):
        stream = [name for name in names if name.startswith(SOURCE) == bool(prefix)]
        if bool(stream) != (capacity is not None):
            raise ValueError("source_length is for examples with a source, and they need it")
        if capacity is None:
            continue
        sizes = [{len(example[name]) for name in stream} for example in examples]
        if any(len(size) != 1 for size in sizes):
            raise ValueError("the fields of an example's stream must be equally long")
        total = sum(size for (size,) in sizes)
        if total > capacity:
            raise ValueError(f"examples of {total} {prefix}positions do not fit into a row of {capacity}")
        padding = (0, capacity - total)
        for name in stream:
            row[name] = np.pad(np.concatenate([example[name] for example in examples]), padding)
        numbers = np.arange(1, len(examples) + 1, dtype=np.int32)
        row[f"{prefix}segment_ids"] = np.pad(np.repeat(numbers, [size for (size,) in sizes]), padding)
    return row


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

    def read(self, places: Sequence[tuple[int, int]]) -> HostBatch:
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


def empty_batch(objective: Objective, num_rows: int, sequence_length: int) -> HostBatch:
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
