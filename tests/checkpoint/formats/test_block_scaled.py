"""Matrices in eight bits, scaled by blocks: read whole and in parts, and what does not fit refused."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, strategies as st

from llama_jax.checkpoint.formats import Slices, Tensor, block_scaled, read_safetensors, with_scales, write_safetensors
from llama_jax.config import UserError

PATH = Path("weights")
SHAPE, BLOCKS = (11, 20), (3, 3)  # the last blocks are smaller both ways


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.normal(size=SHAPE).astype(ml_dtypes.float8_e4m3fn),
        "a.weight_scale_inv": rng.uniform(0.5, 2, size=BLOCKS).astype(np.float32),
        "norm.weight": rng.normal(size=5).astype(ml_dtypes.bfloat16),
    }


@pytest.fixture(scope="module")
def tensors(arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    file: Path = tmp_path_factory.mktemp("fp8") / "model.safetensors"
    write_safetensors(file, arrays)
    return read_safetensors(file)


@pytest.fixture(scope="module")
def expected(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Number by number."""
    weight = np.zeros(SHAPE, np.float32)
    for i, j in np.ndindex(SHAPE):
        weight[i, j] = np.float32(arrays["a.weight"][i, j]) * arrays["a.weight_scale_inv"][i // 4, j // 8]
    return weight


def test_each_block_has_its_scale(tensors: dict[str, Tensor], expected: np.ndarray):
    found = with_scales(PATH, tensors, (4, 8))
    assert found.keys() == {"a.weight", "norm.weight"}
    tensor = found["a.weight"]
    assert (tensor.shape, tensor.dtype) == (SHAPE, np.float32)
    np.testing.assert_array_equal(tensor.read(), expected)
    assert found["norm.weight"] is tensors["norm.weight"]


@given(st.data())
def test_a_part_is_that_part_of_the_whole(tensors: dict[str, Tensor], expected: np.ndarray, data: st.DataObject):
    part = tuple(
        slice(*sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)), label="bounds")))
        for size in SHAPE[: data.draw(st.integers(0, 2))]
    )
    np.testing.assert_array_equal(with_scales(PATH, tensors, (4, 8))["a.weight"].read(part), expected[part])


def test_only_the_blocks_of_a_part_are_read(tensors: dict[str, Tensor]):
    wanted = []

    scales = tensors["a.weight_scale_inv"]

    def watched(slices: Slices) -> np.ndarray:
        wanted.append(slices)
        return scales.read(slices)

    found = block_scaled(tensors["a.weight"], Tensor(scales.shape, scales.dtype, watched), (4, 8))
    found.read((slice(3, 5), slice(8, 16)))
    assert wanted == [(slice(0, 2), slice(1, 2))]


def test_scales_of_other_blocks_are_refused(tensors: dict[str, Tensor]):
    with pytest.raises(UserError, match=r"shape \(3, 3\), and blocks of 4 x 4 in \(11, 20\) ask for \(3, 5\)"):
        with_scales(PATH, tensors, (4, 4))


def test_scales_of_nothing_are_refused(tensors: dict[str, Tensor]):
    alone = {"a.weight_scale_inv": tensors["a.weight_scale_inv"]}
    with pytest.raises(UserError, match=r"'a\.weight_scale_inv' without 'a\.weight'"):
        with_scales(PATH, alone, (4, 8))
