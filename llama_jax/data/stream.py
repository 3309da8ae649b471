"""A corpus's tokens as one stream over its shards."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int32


@dataclasses.dataclass(frozen=True)
class Shard:
    """Documents' tokens one after another, as memory maps: each document is BOS, its tokens, EOS.

    `documents` has where in `tokens` every document begins (increasing from 0), `parts` where a document's second and
    later parts begin (increasing; empty where documents have one part).
    """

    tokens: np.ndarray
    documents: Int[np.ndarray, " d"]
    parts: Int[np.ndarray, " p"]


class TokenStream:
    """The tokens of all shards, one after another."""

    def __init__(self, shards: Sequence[Shard]):
        self.shards = list(shards)
        # Where each shard begins in the stream, and at the end the stream's length.
        self.starts = np.cumsum([0, *(len(shard.tokens) for shard in self.shards)], dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        return int(self.starts[-1])

    @property
    def num_documents(self) -> int:
        return sum(len(shard.documents) for shard in self.shards)

    def read(self, start: int, stop: int) -> Int32[np.ndarray, " n"]:
        """Tokens `start` to `stop` (or the stream's end)."""
        pieces = [shard.tokens[a:b].astype(np.int32) for shard, _, a, b in self._spans(start, stop)]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int32)

    def document_starts(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """Where documents begin, of the places from `start` up to but without `stop`."""
        found = []
        for shard, offset, a, b in self._spans(start, stop):
            first, last = np.searchsorted(shard.documents, [a, b])
            found.append(shard.documents[first:last] + offset)
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def shard_at(self, place: int) -> tuple[Shard, int]:
        """The shard that has this place of the stream, and where the shard begins."""
        number = int(np.searchsorted(self.starts, place, side="right")) - 1
        return self.shards[number], int(self.starts[number])

    def _spans(self, start: int, stop: int):
        """(shard, where it begins in the stream, first, end) of the shards with places `start` to `stop`."""
        stop = min(stop, self.num_tokens)
        number = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            offset, end = int(self.starts[number]), int(self.starts[number + 1])
            if start < end:
                yield self.shards[number], offset, start - offset, min(stop, end) - offset
                start = min(stop, end)
            number += 1
