"""Weights that GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978) quantized, as the float weights that they stand for.

A matrix [inputs, outputs] is (q - zero) * scale, with a zero and a scale for each output of each group of inputs.
`NAME.qweight` and `NAME.qzeros` have several integers in an int32, `NAME.scales` is [groups, outputs], and `NAME.g_idx`
is the group of each input, where inputs were ordered. GPTQ packs q along the inputs and stores zero - 1 (its second
version: zero); AWQ (its version "gemm") packs q along the outputs, eight of them in the order 0 2 4 6 1 3 5 7.
"""

import dataclasses
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.formats.tensors import Slices, Tensor, Tensors, transposed
from llama_jax.config import Json, UserError, read_json

METHODS = ("gptq", "awq")
# The older way: a file next to config.json.
_FILES = {"gptq": "quantize_config.json", "awq": "quant_config.json"}
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_GEMM = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # place in its int32 of each of eight outputs


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What a file says of its quantized weights: `offset` is added to the stored zeros, group_size -1 is all inputs."""

    method: str
    bits: int
    group_size: int
    offset: int


def read_quantization(directory: Path, config: Json) -> Quantization | None:
    """Return how GPTQ or AWQ quantized a directory, None where neither did.

    Raises UserError for forms that are not read.
    """
    data = config.get("quantization_config")
    if data is None:
        for method, name in _FILES.items():
            if (directory / name).is_file():
                data = {"quant_method": method} | read_json(directory / name)
    if not isinstance(data, dict) or str(data.get("quant_method")).lower() not in METHODS:
        return None
    method = data["quant_method"].lower()
    bits, group = data.get("bits", data.get("w_bit")), data.get("group_size", data.get("q_group_size", 128))
    form = str(data.get("version" if method == "awq" else "checkpoint_format") or data.get("format") or "").lower()
    forms = {"awq": ("", "gemm"), "gptq": ("", "gptq", "gptq_v2")}[method]
    for key, value, allowed in (("bits", bits, (4,) if method == "awq" else (2, 4, 8)), ("format", form, forms)):
        if value not in allowed:
            raise UserError(
                f"'{directory}' has weights of {method.upper()} with {key}={value!r}, and "
                f"{', '.join(map(repr, filter(None, allowed)))} are read: take a release that is not quantized"
            )
    assert type(bits) is int
    if type(group) is not int or not (group == -1 or 0 < group < 1 << 20):
        raise UserError(f"'{directory}' has weights of {method.upper()} with group_size={group!r}: it must be a number")
    return Quantization(method, bits, group, offset=int(method == "gptq" and form != "gptq_v2"))


def dequantized(path: Path, tensors: Tensors, given: Quantization, *, inputs_first: bool) -> tuple[Tensors, list[str]]:
    """Return the tensors with a float32 `NAME.weight` for each `NAME.qweight`, computed when it is read.

    It is [outputs, inputs], with `inputs_first` (GPT-2's) the other way round. Second are the names of biases that are
    zero throughout: tools write them for weights without bias. Raises UserError where the parts do not fit.
    """
    stems = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    parts = {f"{stem}.{part}" for stem in stems for part in _PARTS}
    found = {name: tensor for name, tensor in tensors.items() if name not in parts}
    for stem in stems:
        matrix = _matrix(path, stem, tensors, given)
        found[f"{stem}.weight"] = matrix if inputs_first else transposed(matrix)
    biases = [name for stem in stems if (name := f"{stem}.bias") in tensors]
    return found, [name for name in biases if not np.any(tensors[name].read())]


def _matrix(path: Path, stem: str, tensors: Tensors, given: Quantization) -> Tensor:
    """Return the matrix [inputs, outputs] of the parts of one projection."""
    lacking = [part for part in _PARTS[:3] if f"{stem}.{part}" not in tensors]
    if lacking:
        raise UserError(f"'{path}' has '{stem}.qweight' without '{stem}.{lacking[0]}': download it again")
    weights, zeros, scales = (tensors[f"{stem}.{part}"] for part in _PARTS[:3])
    index, pack, is_awq = tensors.get(f"{stem}.g_idx"), 32 // given.bits, given.method == "awq"
    rows, columns = (1, pack) if is_awq else (pack, 1)
    shape = (weights.shape[0] * rows, weights.shape[-1] * columns) if len(weights.shape) == 2 else (0, 0)
    size = shape[0] if given.group_size == -1 else given.group_size
    groups = -(-shape[0] // max(size, 1))
    expected = {"qzeros": (groups, shape[1] // pack), "scales": (groups, shape[1]), "g_idx": (shape[0],)}
    for part, wanted in expected.items():
        tensor = tensors.get(f"{stem}.{part}")
        if 0 in shape or (tensor is not None and tensor.shape != wanted):
            raise UserError(
                f"'{path}' has '{stem}.{part}' with shape {None if tensor is None else tensor.shape}, and "
                f"{given.method.upper()} with bits={given.bits} and group_size={given.group_size} asks for {wanted}"
            )

    def fetch(slices: Slices) -> np.ndarray:
        inputs, outputs = slices
        words = [slice(own.start // pack, -(-own.stop // pack)) for own in slices]
        # The wanted part of the numbers that these words have.
        top, left = (
            slice(own.start - w.start * pack, own.stop - w.start * pack) for own, w in zip(slices, words, strict=True)
        )
        zero = _unpacked(zeros.read((slice(0, groups), words[1])), given)[:, left] + given.offset
        if is_awq:
            values = _unpacked(weights.read((inputs, words[1])), given)[:, left]
        else:
            values = _unpacked(weights.read((words[0], outputs)).T, given)[:, top].T
        group = np.arange(inputs.start, inputs.stop) // max(size, 1) if index is None else index.read((inputs,))
        if group.size and not 0 <= group.min() <= group.max() < groups:
            raise UserError(f"'{path}' has '{stem}.g_idx' beyond its {groups} groups: it is damaged, download it again")
        scale = scales.read((slice(0, groups), outputs)).astype(np.float32)
        # GPTQ's own kernel cuts zero - 1 + 1 to the same bits.
        return (values - (zero & (1 << given.bits) - 1)[group]).astype(np.float32) * scale[group]

    return Tensor(shape, np.dtype(np.float32), fetch)


def _unpacked(words: np.ndarray, given: Quantization) -> np.ndarray:
    """Return the numbers [rows, columns * pack] in int32s [rows, columns]."""
    places = _GEMM if given.method == "awq" else np.arange(32 // given.bits)
    numbers = words.astype(np.int32)[..., None] >> (given.bits * places).astype(np.int32) & ((1 << given.bits) - 1)
    return numbers.reshape(len(words), -1)
