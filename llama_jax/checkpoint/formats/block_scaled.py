"""Matrices in eight bits with a scale for each block of theirs, as DeepSeek-V3 was released.

`NAME.weight` is float8 (e4m3), `NAME.weight_scale_inv` a float32 number for each block; their product is the weight.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.formats.tensors import Slices, Tensor, Tensors
from llama_jax.config import UserError

SUFFIX = "_scale_inv"


@dataclasses.dataclass(frozen=True)
class BlockScaled:
    """A matrix whose every `block` (rows, columns) is multiplied by its scale when it is read; float32.

    The blocks at the lower and right edge may be smaller.
    """

    values: Tensor
    scales: Tensor
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, slices: Slices = (), /) -> np.ndarray:
        full = tuple(slices) + (slice(None),) * (2 - len(slices))
        bounds = [s.indices(size)[:2] for s, size in zip(full, self.shape, strict=True)]
        blocks = tuple(slice(a // n, -(-b // n)) for (a, b), n in zip(bounds, self.block, strict=True))
        scales = self.scales.read(blocks).astype(np.float32)
        for dim, ((a, b), n) in enumerate(zip(bounds, self.block, strict=True)):
            scales = scales.take(np.arange(a, b) // n - a // n, axis=dim)
        result = self.values.read(full).astype(np.float32)
        result *= scales
        result.flags.writeable = False
        return result


def block_scaled(path: Path, tensors: Tensors, block: Sequence[int]) -> Tensors:
    """The tensors of `path` with scaled matrices in place of those in eight bits.

    Raises UserError for scales that do not fit.
    """
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(SUFFIX)}
    for name in tensors.keys() - found.keys():
        if (values := tensors.get(name.removesuffix(SUFFIX))) is None:
            raise UserError(f"'{path}' has '{name}' without '{name.removesuffix(SUFFIX)}'")
        expected = tuple(-(-size // n) for size, n in zip(values.shape, block, strict=False))
        if len(values.shape) != 2 or tensors[name].shape != expected:
            raise UserError(
                f"'{path}' has '{name}' with shape {tensors[name].shape}, and blocks of {block[0]} x {block[1]} in "
                f"{values.shape} ask for {expected}"
            )
        found[name.removesuffix(SUFFIX)] = BlockScaled(values, tensors[name], (block[0], block[1]))
    return found
