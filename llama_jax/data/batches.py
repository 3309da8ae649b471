"""Batches of a token stream: in a random order that is a function of (seed, step) alone, or all of it once."""

import functools
from collections.abc import Iterator, Sequence
from typing import overload

import grain
import numpy as np
from grain.experimental import index_shuffle

from llama_jax.config import UserError
from llama_jax.data.stream import TokenStream
from llama_jax.data.windows import Batch, num_windows, read_windows

SMALL = 1 << 16  # windows; below, index_shuffle takes 2**16 / n times as long as above, and a permutation is cheap


class Batches:
    """Training batches: the stream's full windows, permuted anew in every epoch, without end.

    The window at place p = step * global_batch_size + row of the global sequence is number p % n of epoch p // n. With
    `rows`, only these of each global batch are read, in their order: those that a process's devices need. Raises
    UserError where the stream has no full window.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        global_batch_size: int,
        sequence_length: int,
        seed: int,
        rows: Sequence[int] | None = None,
        num_prefetch: int = 4,
    ):
        self.num_windows = num_windows(stream, sequence_length, partial=False)
        if not self.num_windows:
            raise UserError(
                f"sequence_length={sequence_length} needs {sequence_length + 1} tokens, and the training text has "
                f"{stream.num_tokens}: give more text or a shorter sequence_length"
            )
        self._rows = range(global_batch_size) if rows is None else rows
        self._stream, self._length, self._seed = stream, sequence_length, seed
        self._global_batch_size, self._num_prefetch = global_batch_size, num_prefetch

    def window_indices(self, step: int) -> list[int]:
        """The windows of the rows at `step`."""
        first = step * self._global_batch_size
        return [self._window(first + row) for row in self._rows]

    def batch(self, step: int) -> Batch:
        """The rows of the global batch of `step`."""
        return read_windows(self._stream, self.window_indices(step), self._length)

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """`batch(start_step)`, `batch(start_step + 1)`... prepared ahead by threads; its state is the step number."""
        steps = grain.MapDataset.range(start_step, 1 << 60).map(self.batch)
        num_threads = min(self._num_prefetch, 4)
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads, self._num_prefetch)))

    def _window(self, place: int) -> int:
        epoch, index = divmod(place, self.num_windows)
        if self.num_windows <= SMALL:
            return int(_permutation(self._seed, epoch, self.num_windows)[index])
        return index_shuffle(index, max_index=self.num_windows - 1, seed=_epoch_seed(self._seed, epoch), rounds=4)


class ValidationBatches(Sequence[Batch]):
    """All of a stream once, in order, as a fixed sequence of batches: every token of a document but its first is a
    target exactly once. The last window and the last batch are padded with weight 0.

    Only the first `max_batches` where given, and of each only `rows`, as in `Batches`.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        global_batch_size: int,
        sequence_length: int,
        max_batches: int | None = None,
        rows: Sequence[int] | None = None,
    ):
        self._stream, self._length, self._global_batch_size = stream, sequence_length, global_batch_size
        self._rows = range(global_batch_size) if rows is None else rows
        total = -(-num_windows(stream, sequence_length, partial=True) // global_batch_size)
        self._num_batches = total if max_batches is None else min(total, max_batches)

    def __len__(self) -> int:
        return self._num_batches

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first = range(len(self))[index] * self._global_batch_size
        return read_windows(self._stream, [first + row for row in self._rows], self._length)


@functools.lru_cache
def _epoch_seed(seed: int, epoch: int) -> int:
    """32 bits. Grain's own shuffle adds epoch and seed, so that seed 1 begins with the second epoch of seed 0."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


@functools.lru_cache(maxsize=16)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)
