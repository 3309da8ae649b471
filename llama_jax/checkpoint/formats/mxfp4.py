"""Weights in MXFP4 (OCP Microscaling Formats 1.0, 2023) as GPT-OSS was released, as the weights that they stand for.

`NAME_blocks` [..., outputs, groups, 16] are uint8 with two values of 4 bits (e2m1), the low bits the first, and
`NAME_scales` [..., outputs, groups] the exponents of two of every 32 inputs, plus 127. `NAME` itself is [..., inputs,
outputs].
"""

from pathlib import Path

import numpy as np

from llama_jax.checkpoint.formats.tensors import BFLOAT16, Slices, Tensor, Tensors
from llama_jax.config import UserError

_VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_BY_CODE = np.concatenate([_VALUES, -_VALUES])
_GROUP, _BIAS = 32, 127
_BLOCKS, _SCALES = "_blocks", "_scales"


def from_mxfp4(path: Path, tensors: Tensors) -> Tensors:
    """Return the tensors of `path` with a bfloat16 `NAME` for each `NAME_blocks`, computed when it is read.

    bfloat16 has every such value. Raises UserError where blocks and scales do not fit.
    """
    stems = [name.removesuffix(_BLOCKS) for name in tensors if name.endswith(_BLOCKS)]
    parts = {f"{stem}{part}" for stem in stems for part in (_BLOCKS, _SCALES)}
    found = {name: tensor for name, tensor in tensors.items() if name not in parts}
    for stem in stems:
        blocks, scales = tensors[f"{stem}{_BLOCKS}"], tensors.get(f"{stem}{_SCALES}")
        shape = None if scales is None else scales.shape
        bytes_only = {tensor.dtype for tensor in (blocks, scales) if tensor is not None} == {np.dtype(np.uint8)}
        if shape is None or len(shape) < 2 or blocks.shape != (*shape, _GROUP // 2) or not bytes_only:
            raise UserError(
                f"'{path}' has '{stem}{_BLOCKS}' with shape {blocks.shape} and '{stem}{_SCALES}' with shape {shape}, "
                f"which are no bytes of MXFP4 in groups of {_GROUP}: download it again"
            )
        assert scales is not None
        found[stem] = _matrices(blocks, scales)
    return found


def _matrices(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the matrices [..., inputs, outputs] of blocks and scales."""
    *lead, outputs, groups = scales.shape

    def fetch(slices: Slices) -> np.ndarray:
        *first, inputs, columns = slices
        read = slice(inputs.start // _GROUP, -(-inputs.stop // _GROUP))
        wanted = (*first, columns, read)
        packed, exponents = blocks.read(wanted), scales.read(wanted).astype(np.int32) - _BIAS
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], _GROUP)
        values = np.ldexp(_BY_CODE[codes], exponents[..., None]).astype(BFLOAT16)
        values = values.reshape(*packed.shape[:-2], (read.stop - read.start) * _GROUP).swapaxes(-1, -2)
        return values[..., inputs.start - read.start * _GROUP : inputs.stop - read.start * _GROUP, :]

    return Tensor((*lead, groups * _GROUP, outputs), BFLOAT16, fetch)
