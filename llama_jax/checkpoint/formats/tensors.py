"""Tensors on disk, described first and read in parts: the values that every file format gives by name."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from llama_jax.config import UserError

type Slices = tuple[slice, ...]
type Tensors = dict[str, Tensor]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SCALE_SUFFIX = "_scale_inv"
MAX_DIMS = 32  # of a tensor in a file
BLOCK_BYTES = 1 << 24  # of a large matrix that are read, permuted and cast at a time


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of which only the parts that are asked for are read.

    `fetch` gets one slice with start and stop for every dimension and returns that part.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[Slices], np.ndarray]

    def read(self, slices: Slices = (), /) -> np.ndarray:
        """Return the part that `slices` (of step 1, trailing ones may be left out) cut out; read-only."""
        full = (*slices, *[slice(None)] * (len(self.shape) - len(slices)))
        return self.fetch(tuple(slice(*s.indices(size)[:2]) for s, size in zip(full, self.shape, strict=True)))


def extent(shape: Sequence[int], strides: Sequence[int] | None = None) -> int:
    """Return the number of elements from the first to the last one of a tensor; None are the strides of C order."""
    if strides is None or 0 in shape:
        return math.prod(shape)
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def stored(
    file: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...], strides: tuple[int, ...] | None = None
) -> Tensor:
    """Return the tensor that begins `offset` bytes into `file`; strides are in elements, None for those of C order."""

    def fetch(slices: Slices) -> np.ndarray:
        if (size := extent(shape, strides)) == 0:
            return np.empty(shape, dtype)[slices]
        # One map for each read: its pages leave this process's memory together with the result.
        flat = np.memmap(file, dtype, mode="r", offset=offset, shape=(size,))
        if strides is None:
            return flat.view(np.ndarray).reshape(shape)[(*slices, ...)]
        in_bytes = tuple(stride * dtype.itemsize for stride in strides)
        view = np.lib.stride_tricks.as_strided(flat, shape, in_bytes, writeable=False)
        return view.view(np.ndarray)[(*slices, ...)]

    return Tensor(shape, dtype, fetch)


def cut(whole: Tensor, dim: int, start: int, stop: int) -> Tensor:
    """Return `start` to `stop` of a tensor along `dim`: one of several weights that are stored as one."""

    def fetch(slices: Slices) -> np.ndarray:
        part = slices[dim]
        return whole.read((*slices[:dim], slice(start + part.start, start + part.stop), *slices[dim + 1 :]))

    return Tensor((*whole.shape[:dim], stop - start, *whole.shape[dim + 1 :]), whole.dtype, fetch)


def stack(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors of one shape stacked along a new first dimension (experts)."""

    def fetch(slices: Slices) -> np.ndarray:
        pieces = [part.read(slices[1:]) for part in parts[slices[0]]]
        return np.stack(pieces) if pieces else parts[0].read(slices[1:])[None][:0]

    return Tensor((len(parts), *parts[0].shape), parts[0].dtype, fetch)


def item(whole: Tensor, index: int) -> Tensor:
    """Return one entry of a tensor's first dimension (an expert of those that are stored as one)."""
    return Tensor(whole.shape[1:], whole.dtype, lambda slices: whole.read((slice(index, index + 1), *slices))[0])


def split(whole: Tensor, dim: int, size: int) -> Tensor:
    """Return a tensor with its dimension `dim` seen as two, the first of them of this size."""
    before, inner, after = whole.shape[:dim], whole.shape[dim] // size, whole.shape[dim + 1 :]

    def fetch(slices: Slices) -> np.ndarray:
        start, stop = slices[dim].start, slices[dim].stop
        rows = whole.read((*slices[:dim], slice(start * inner, stop * inner), *slices[dim + 2 :]))
        rows = rows.reshape(*rows.shape[:dim], stop - start, inner, *rows.shape[dim + 1 :])
        return rows[(*(slice(None),) * (dim + 1), slices[dim + 1])]

    return Tensor((*before, size, inner, *after), whole.dtype, fetch)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Return tensors joined in order along `dim` (model-parallel shards)."""
    shape = parts[0].shape
    total = sum(part.shape[dim] for part in parts)

    def fetch(slices: Slices) -> np.ndarray:
        pieces, begin = [], 0
        for part in parts:
            low, high = (min(max(bound - begin, 0), part.shape[dim]) for bound in (slices[dim].start, slices[dim].stop))
            if low < high:
                pieces.append(part.read((*slices[:dim], slice(low, high), *slices[dim + 1 :])))
            begin += part.shape[dim]
        if not pieces:
            return parts[0].read((*slices[:dim], slice(0, 0), *slices[dim + 1 :]))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=dim)

    return Tensor((*shape[:dim], total, *shape[dim + 1 :]), parts[0].dtype, fetch)


def transposed(whole: Tensor) -> Tensor:
    """Return a tensor with its dimensions in the reverse order."""
    return Tensor(whole.shape[::-1], whole.dtype, lambda slices: whole.read(slices[::-1]).T)


def rounded(whole: Tensor, dtype: np.dtype) -> Tensor:
    """Return a tensor that is cast to `dtype` when it is read."""
    return Tensor(whole.shape, dtype, lambda slices: whole.read(slices).astype(dtype))


def equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same elements, read block by block."""
    if a.shape != b.shape:
        return False
    rows = max(1, BLOCK_BYTES // (4 * math.prod(a.shape[1:])))
    blocks = (slice(i, i + rows) for i in range(0, a.shape[0], rows))
    return all(np.array_equal(a.read((block,)), b.read((block,))) for block in blocks)


def block_scaled(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Return a matrix in float32 whose every `block` (rows, columns) is multiplied by its scale when it is read.

    DeepSeek-V3 was released so, in float8 (e4m3). The blocks at the lower and right edge may be smaller.
    """

    def fetch(slices: Slices) -> np.ndarray:
        blocks = tuple(slice(s.start // n, -(-s.stop // n)) for s, n in zip(slices, block, strict=True))
        scale = scales.read(blocks).astype(np.float32)
        for dim, (s, n) in enumerate(zip(slices, block, strict=True)):
            scale = scale.take(np.arange(s.start, s.stop) // n - s.start // n, axis=dim)
        result = values.read(slices).astype(np.float32)
        result *= scale
        result.flags.writeable = False
        return result

    return Tensor(values.shape, np.dtype(np.float32), fetch)


def with_scales(path: Path, tensors: Tensors, block: Sequence[int]) -> Tensors:
    """Return the tensors of `path`, each `NAME` multiplied by the scales `NAME_scale_inv` of its blocks.

    Raises UserError for scales that do not fit.
    """
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(SCALE_SUFFIX)}
    for scale_name in tensors.keys() - found.keys():
        name, scales = scale_name.removesuffix(SCALE_SUFFIX), tensors[scale_name]
        if (values := tensors.get(name)) is None:
            raise UserError(f"'{path}' has '{scale_name}' without '{name}'")
        expected = tuple(-(-size // n) for size, n in zip(values.shape, block, strict=False))
        if len(values.shape) != 2 or scales.shape != expected:
            raise UserError(
                f"'{path}' has '{scale_name}' with shape {scales.shape}, and blocks of {block[0]} x {block[1]} in "
                f"{values.shape} ask for {expected}"
            )
        found[name] = block_scaled(values, scales, (block[0], block[1]))
    return found
