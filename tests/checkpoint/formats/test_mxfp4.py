"""MXFP4 by the types of ml_dtypes: every code and scale, whole and in parts."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llama_jax.checkpoint.formats import Tensor, from_mxfp4
from llama_jax.config import UserError

OUTPUTS, GROUPS = 6, 3


def stored_as(value: np.ndarray) -> Tensor:
    return Tensor(value.shape, value.dtype, lambda slices: value[slices])


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, OUTPUTS, GROUPS, 16), dtype=np.uint8)
    scales = rng.integers(1, 254, (2, OUTPUTS, GROUPS), dtype=np.uint8)
    return {"a_blocks": blocks, "a_scales": scales, "b": np.ones(3, np.float32)}


def expected(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Every number by itself, float64 [E, inputs, outputs]."""
    values = np.zeros((2, GROUPS * 32, OUTPUTS))
    for e, i, o in np.ndindex(values.shape):
        group, place = divmod(i, 32)
        byte = arrays["a_blocks"][e, o, group, place // 2]
        code = np.uint8(byte >> 4 if place % 2 else byte & 15).view(ml_dtypes.float4_e2m1fn)
        scale = arrays["a_scales"][e, o, group].view(ml_dtypes.float8_e8m0fnu)
        values[e, i, o] = float(code) * float(scale)
    return values


def test_every_value_is_that_of_the_format(arrays: dict[str, np.ndarray]):
    found = from_mxfp4(Path("x"), {name: stored_as(value) for name, value in arrays.items()})
    assert found.keys() == {"a", "b"}
    assert found["a"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found["a"].read().astype(np.float64), expected(arrays))


@pytest.mark.parametrize(
    "part", [np.s_[1:2, 0:96, 0:6], np.s_[0:2, 33:70, 2:5], np.s_[0:1, 64:65, 5:6], np.s_[0:0, 0:96, 0:6]]
)
def test_a_part_is_read_alone(part: tuple[slice, ...], arrays: dict[str, np.ndarray]):
    read = []

    def watched(value: np.ndarray) -> Tensor:
        def fetch(slices):
            read.append(value[slices].size)
            return value[slices]

        return Tensor(value.shape, value.dtype, fetch)

    found = from_mxfp4(Path("x"), {name: watched(value) for name, value in arrays.items()})["a"].read(part)
    np.testing.assert_array_equal(found.astype(np.float64), expected(arrays)[part])
    # The groups that the part reaches into, and no other ones.
    groups = -(-part[1].stop // 32) - part[1].start // 32
    assert sum(read) == (part[0].stop - part[0].start) * (part[2].stop - part[2].start) * groups * 17


@pytest.mark.parametrize("name", ["a_blocks", "a_scales"])
def test_what_does_not_fit_is_refused_by_name(name: str, arrays: dict[str, np.ndarray]):
    for value in (arrays[name][:1], arrays[name].astype(np.int32), None):
        changed = {key: x for key, x in (arrays | {name: value}).items() if x is not None}
        tensors = {key: stored_as(x) for key, x in changed.items()}
        if value is None and name == "a_blocks":
            assert "a_scales" in from_mxfp4(Path("x"), tensors)  # a surplus tensor, refused by its name
            continue
        with pytest.raises(UserError, match=r"'a_blocks' with shape .* download it again"):
            from_mxfp4(Path("x"), tensors)
