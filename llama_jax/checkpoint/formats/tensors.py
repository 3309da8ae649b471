"""Tensors that lie in files: shape and dtype are known, bytes are mapped only when and where they are asked for."""

import dataclasses
import math
from pathlib import Path
from typing import Protocol, runtime_checkable

import ml_dtypes
import numpy as np

type Slices = tuple[slice, ...]
type Tensors = dict[str, Tensor]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@runtime_checkable
class Tensor(Protocol):
    """A tensor that can be read in part."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, slices: Slices = (), /) -> np.ndarray:
        """The part that `slices` (of step 1, trailing ones may be left out) cut out; read-only."""
        ...


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in one file: `offset` and `nbytes` in bytes say where, `strides` (in elements) how it is laid out."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None  # None: row after row

    @property
    def extent(self) -> int:
        """Number of elements from the first to the last one."""
        if 0 in self.shape:
            return 0
        if self.strides is None:
            return math.prod(self.shape)
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    def read(self, slices: Slices = (), /) -> np.ndarray:
        if self.extent == 0:
            return np.empty(self.shape, self.dtype)[(*slices, ...)]
        # A map of its own for each read: its pages leave this process's memory together with the result.
        flat = np.memmap(self.file, self.dtype, mode="r", offset=self.offset, shape=(self.extent,))
        if self.strides is None:
            return flat.view(np.ndarray).reshape(self.shape)[(*slices, ...)]
        strides = tuple(stride * self.dtype.itemsize for stride in self.strides)
        view = np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)
        return view.view(np.ndarray)[(*slices, ...)]


@dataclasses.dataclass(frozen=True)
class Cut:
    """A part of a tensor: `start` to `stop` along `dim` (one of several weights that are stored as one)."""

    whole: Tensor
    dim: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.whole.shape
        return (*shape[: self.dim], self.stop - self.start, *shape[self.dim + 1 :])

    @property
    def dtype(self) -> np.dtype:
        return self.whole.dtype

    def read(self, slices: Slices = (), /) -> np.ndarray:
        full = list(tuple(slices) + (slice(None),) * (len(self.shape) - len(slices)))
        start, stop, _ = full[self.dim].indices(self.stop - self.start)
        full[self.dim] = slice(self.start + start, self.start + stop)
        return self.whole.read(tuple(full))


@dataclasses.dataclass(frozen=True)
class Stack:
    """Tensors of one shape, stacked along a new first dimension (experts)."""

    parts: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def read(self, slices: Slices = (), /) -> np.ndarray:
        first, *rest = slices or (slice(None),)
        pieces = [part.read(tuple(rest)) for part in self.parts[first]]
        return np.stack(pieces) if pieces else self.parts[0].read(tuple(rest))[None][:0]


@dataclasses.dataclass(frozen=True)
class Item:
    """One entry of a tensor's first dimension (an expert of those that are stored as one)."""

    whole: Tensor
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        return self.whole.dtype

    def read(self, slices: Slices = (), /) -> np.ndarray:
        return self.whole.read((slice(self.index, self.index + 1), *slices))[0]


@dataclasses.dataclass(frozen=True)
class Split:
    """A tensor whose first dimension is seen as two, the first of them of this size."""

    whole: Tensor
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        rows, *rest = self.whole.shape
        return (self.size, rows // self.size, *rest)

    @property
    def dtype(self) -> np.dtype:
        return self.whole.dtype

    def read(self, slices: Slices = (), /) -> np.ndarray:
        full = tuple(slices) + (slice(None),) * (len(self.shape) - len(slices))
        start, stop, _ = full[0].indices(self.size)
        inner = self.shape[1]
        rows = self.whole.read((slice(start * inner, stop * inner), *full[2:]))
        return rows.reshape(stop - start, inner, *rows.shape[1:])[:, full[1]]


@dataclasses.dataclass(frozen=True)
class Joined:
    """Tensors that are pieces of one, in order along `dim` (model-parallel shards)."""

    parts: tuple[Tensor, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        total = sum(part.shape[self.dim] for part in self.parts)
        return (*first[: self.dim], total, *first[self.dim + 1 :])

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def read(self, slices: Slices = (), /) -> np.ndarray:
        full = tuple(slices) + (slice(None),) * (len(self.shape) - len(slices))
        start, stop, _ = full[self.dim].indices(self.shape[self.dim])
        pieces, begin = [], 0
        for part in self.parts:
            size = part.shape[self.dim]
            low, high = max(start - begin, 0), min(stop - begin, size)
            if low < high:
                pieces.append(part.read((*full[: self.dim], slice(low, high), *full[self.dim + 1 :])))
            begin += size
        if not pieces:
            return self.parts[0].read((*full[: self.dim], slice(0, 0), *full[self.dim + 1 :]))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=self.dim)
