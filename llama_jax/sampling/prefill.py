"""Prompts are run apart from the batch that is continued: a chunk at a time, from what is known of their beginnings."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llama_jax.models import Model, nbytes
from llama_jax.nn import PyTree
from llama_jax.sampling.loop import CacheSize, bucket, empty, encode, place, power_of_two, prefill, smallest_ring

SHORTEST_PREFIX = 16  # fewer tokens are computed faster than found


class Prefixes:
    """Caches of earlier texts, the least recently used of which are dropped beyond `limit` bytes."""

    def __init__(self, model: Model, limit: int):
        self._model, self._limit = model, limit
        # Of each text the cache, and the least length at which it may be cut.
        self._caches: dict[tuple[int, ...], tuple[PyTree, int]] = {}

    @property
    def num_bytes(self) -> int:
        """The bytes of all caches, on all devices."""
        return sum(nbytes(cache) for cache, _ in self._caches.values())

    def find(self, ids: tuple[int, ...]) -> tuple[int, PyTree]:
        """Return how many of the first `ids` are known, and the cache of one row that holds them; 0 and None."""
        best, found = SHORTEST_PREFIX - 1, None
        for known, (_, least) in self._caches.items():
            length = _common(ids, known)
            if length > best and length >= least:
                best, found = length, known
        if found is None:
            return 0, None
        cache = self._caches[found] = self._caches.pop(found)  # now the most recently used
        return best, cache[0]

    def keep(self, ids: tuple[int, ...], cache: PyTree, row: int, size: CacheSize) -> None:
        """Keep a copy of what a row's cache holds of `ids`."""
        if len(ids) < SHORTEST_PREFIX or not self._limit or self.find(ids)[0] == len(ids):
            return
        kept = None if size.room is None else smallest_ring(self._model.config, size.length, size.room)
        # Of a window's entries the last are there, and those of the room before them.
        least = 0 if size.room is None or kept is None or len(ids) <= kept else len(ids) - size.room
        for known in [known for known in self._caches if least <= len(known) and known == ids[: len(known)]]:
            del self._caches[known]
        one = dataclasses.replace(size, rows=1, length=bucket(len(ids), size.length), room=None)
        self._caches[ids] = place(self._model, one, None, cache, [0], [row]), least
        while self.num_bytes > self._limit:
            del self._caches[next(iter(self._caches))]


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    length = min(len(a), len(b))
    differs = np.array(a[:length]) != np.array(b[:length])
    return int(differs.argmax()) if differs.any() else length


class Prefill:
    """Prompts [N] whose caches are being computed, up to the last token but one.

    size: of the cache, whose rows are N rounded up to a power of two.
    chunk: most tokens of a run, of all rows together; None runs the prompts whole.
    """

    def __init__(self, model: Model, prompts: Sequence[tuple[int, ...]], size: CacheSize, chunk: int | None):
        self.size, self.cache = size, None
        self._model, self._prompts = model, prompts
        self._chunk = None if chunk is None else max(1, chunk // size.rows)
        self._tokens = np.zeros((size.rows, size.length), np.int32)
        self._starts, self._ends = np.zeros(size.rows, np.int32), np.zeros(size.rows, np.int32)
        for row, prompt in enumerate(prompts):
            self._tokens[row, : len(prompt)] = prompt
            self._ends[row] = len(prompt) - 1

    @classmethod
    def of_sources(cls, model: Model, sources: Sequence[tuple[np.ndarray, np.ndarray]], start: int, size: CacheSize):
        """Return the prompts of an encoder-decoder, its start token alone, with the `sources` encoded."""
        found = cls(model, [(start,)] * len(sources), size, None)
        ids, real = np.zeros((size.rows, size.source), np.int32), np.zeros((size.rows, size.source), bool)
        for row, (own, mask) in enumerate(sources):
            ids[row, : len(own)], real[row, : len(own)] = own, mask
        real[len(sources) :, 0] = True  # a row without any source would attend to nothing, which gives NaN
        found.cache = encode(model, size, ids, real)
        return found

    def use(self, prefixes: Prefixes) -> None:
        """Begin after what is known of each prompt."""
        for row, prompt in enumerate(self._prompts):
            known, cache = prefixes.find(prompt[:-1])
            if known:
                self.cache = place(self._model, self.size, self.cache, cache, [row], [0])
                self._starts[row] = known

    def keep(self, prefixes: Prefixes) -> None:
        """Keep the caches of the prompts."""
        for row, prompt in enumerate(self._prompts):
            prefixes.keep(prompt[:-1], self.cache, row, self.size)

    def run(self) -> bool:
        """Run a chunk where something is left, and return whether nothing is."""
        left = int((self._ends - self._starts).max())
        if left <= 0:
            self.cache = empty(self._model, self.size) if self.cache is None else self.cache
            return True
        limit = self.size.length
        width = bucket(left, limit)
        if self._chunk is not None and self._chunk < width:
            width = power_of_two(self._chunk + 1) // 2
        # Rows near the end of the cache compute some tokens again, since it has no room for a whole chunk more.
        starts = np.minimum(self._starts, limit - width)
        counts = np.minimum(self._ends - starts, width)
        places = np.minimum(starts[:, None] + np.arange(width), limit - 1)
        tokens = np.take_along_axis(self._tokens, places, axis=1)
        self.cache = prefill(self._model, self.size, self.cache, tokens, starts, counts)
        self._starts = np.maximum(self._starts, starts + counts)
        return bool((self._starts >= self._ends).all())
