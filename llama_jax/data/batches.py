"""Batches of rows: in a random order that is a function of (seed, step) alone, or all of them once."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from grain.experimental import index_shuffle

from llama_jax.data.mixture import Mixture, Schedule
from llama_jax.data.rows.windows import HostBatch, Rows

SMALL = 1 << 16  # rows; below, index_shuffle takes 2**16 / n times as long as above, and a permutation is cheap


class Batches:
    """Training batches of one or several sources, without end.

    The sequence at place p = batch * global_batch_size + row of the global order comes from the source that the mixture
    has there; `earlier` sizes of batches are those of `first_place`. The n-th of a source with m rows is number n % m
    of its epoch n // m, and every epoch a permutation of its rows. Step n takes batch n; where batches in `skip` are
    left out, the n-th of the others. With `rows`, only these of each global batch are read, in their order: those that
    a process's devices need.
    Raises ValueError for a source without rows.
    """

    def __init__(
        self,
        sources: Sequence[Rows],
        *,
        global_batch_size: int,
        seed: int,
        mixture: Mixture | None = None,
        rows: Sequence[int] | None = None,
        num_prefetch: int = 4,
        skip: Sequence[int] = (),
        earlier: Sequence[tuple[int, int]] = (),
    ):
        if any(source.num_rows < 1 for source in sources):
            raise ValueError("a source has no rows")
        self._sources, self._seed = list(sources), seed
        self._mixture = mixture or Mixture(((0, Schedule([1] * len(sources))),))
        self._rows, self._num_prefetch = rows, num_prefetch
        self._skip = sorted(set(skip))
        self._place_of = functools.partial(first_place, global_batch_size, earlier)

    def places(self, step: int) -> list[tuple[int, int, int]]:
        """Return (source, epoch, row) of the batch's rows at `step`."""
        first, end = self._span(self.number(step))
        return [self._place(first + row) for row in (range(end - first) if self._rows is None else self._rows)]

    def number(self, step: int) -> int:
        """Return the number of the batch that `step` takes: `step` itself where none is skipped."""
        return batches_passed(step + 1, self._skip) - 1

    def _span(self, number: int) -> tuple[int, int]:
        """Return the first place of a batch, and of the next."""
        return self._place_of(number), self._place_of(number + 1)

    def batch(self, step: int) -> HostBatch:
        """Return the rows of the global batch of `step`."""
        places = self.places(step)
        numbers = sorted({source for source, _, _ in places})
        parts = [self._sources[i].read([(e, r) for source, e, r in places if source == i]) for i in numbers]
        if len(parts) == 1:
            return parts[0]
        # The parts have the rows source by source: back into the order of the places.
        order = np.argsort(np.argsort([source for source, _, _ in places], kind="stable"))
        return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}

    def iterate(self, start_step: int = 0) -> Iterator[HostBatch]:
        """Yield `batch(start_step)`, `batch(start_step + 1)`... prepared ahead by threads."""
        steps = grain.MapDataset.range(start_step, 1 << 60).map(self.batch)
        num_threads = min(self._num_prefetch, 4)
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads, self._num_prefetch)))

    def num_sequences(self, step: int) -> list[int]:
        """Return the number of sequences that each source has given in the steps before `step`."""
        passed = batches_passed(step, self._skip)
        counts = np.array(self._mixture.counts(self._place_of(passed)))
        for skipped in self._skip[: passed - step]:  # those before the last step's batch
            first, end = self._span(skipped)
            counts -= np.subtract(self._mixture.counts(end), self._mixture.counts(first))
        return counts.tolist()

    def _place(self, place: int) -> tuple[int, int, int]:
        source, number = self._mixture.locate(place)
        num_rows = self._sources[source].num_rows
        epoch, index = divmod(number, num_rows)
        key = (self._seed, epoch, source) if source else (self._seed, epoch)
        if num_rows <= SMALL:
            return source, epoch, int(_permutation(key, num_rows)[index])
        return source, epoch, index_shuffle(index, max_index=num_rows - 1, seed=_epoch_seed(key), rounds=4)


def batches_passed(step: int, skip: Sequence[int]) -> int:
    """Return the number of the batches up to that of the last update before `step`, those in `skip` included."""
    if step < 1:
        return 0
    number = step - 1
    for skipped in sorted(set(skip)):
        number += skipped <= number
    return number + 1


def first_place(global_batch_size: int, earlier: Sequence[tuple[int, int]], number: int) -> int:
    """Return the place in the global order of the first row of batch `number`.

    `earlier` has pairs (end, rows), ends ascending: batches before `end` have so many rows, those from the last end on
    `global_batch_size`. No row is repeated or left out where the size changes.
    """
    ends = [0, *(end for end, _ in earlier), math.inf]
    sizes = [*(rows for _, rows in earlier), global_batch_size]
    spans = zip(itertools.pairwise(ends), sizes, strict=True)
    return sum(int(min(number, end) - start) * rows for (start, end), rows in spans if start < number)


class ValidationBatches:
    """All rows of all sources once, in order, in batches of which the last one is padded.

    Only the first `max_batches` where given, and of each only `rows`, as in `Batches`.
    """

    def __init__(
        self,
        sources: Sequence[Rows],
        *,
        global_batch_size: int,
        max_batches: int | None = None,
        rows: Sequence[int] | None = None,
    ):
        self._sources, self._global_batch_size = list(sources), global_batch_size
        self._rows = range(global_batch_size) if rows is None else rows
        self._ends = np.cumsum([source.num_rows for source in sources])
        total = -(-int(self._ends[-1]) // global_batch_size)
        self._num_batches = total if max_batches is None else min(total, max_batches)

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[HostBatch]:
        for number in range(self._num_batches):
            parts = [self._read(number * self._global_batch_size + row) for row in self._rows]
            yield {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _read(self, place: int) -> HostBatch:
        source = min(int(np.searchsorted(self._ends, place, side="right")), len(self._sources) - 1)
        before = int(self._ends[source - 1]) if source else 0
        return self._sources[source].read([(0, place - before)])  # beyond the last row all is padding


@functools.lru_cache
def _epoch_seed(key: tuple[int, ...]) -> int:
    """Return 32 bits. Grain's own shuffle adds epoch and seed: its seed 1 begins with the second epoch of seed 0."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@functools.lru_cache(maxsize=64)
def _permutation(key: tuple[int, ...], size: int) -> np.ndarray:
    return np.random.default_rng(key).permutation(size)
