"""The mesh and the table of logical axes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jax.sharding import PartitionSpec as P

from llama_jax.config import UserError
from llama_jax.parallel import MESH_AXES, MeshConfig, einsum, fitting, make_mesh, reshape, shard, spec
from llama_jax.parallel.mesh import _arrange


@given(st.permutations([1, 1, 1, 2, 2, 2]), st.integers(0, 5))
def test_one_open_axis_takes_what_is_left(sizes: list[int], hole: int):
    full = dict(zip(MESH_AXES, sizes, strict=True))
    assert MeshConfig(**(full | {MESH_AXES[hole]: -1})).sizes(8) == full


@pytest.mark.parametrize(
    ("mesh", "sentence"),
    [
        ({"fsdp": 3}, r"mesh \(fsdp 3\) takes 3 devices and there are 8"),
        ({"fsdp": -1, "tensor": 3}, r"mesh \(fsdp 2, tensor 3\) takes 6 devices and there are 8"),
        ({"fsdp": -1, "tensor": 16}, r"mesh \(tensor 16\) takes 16 devices and there are 8"),
        ({}, r"mesh \(all axes 1\) takes 1 devices and there are 8"),
        ({"tensr": 8}, "mesh axis 'tensr' does not exist: the axes are pipeline, data, fsdp, tensor, context, expert"),
        ({"tensor": 0}, "tensor=0 must be at least 1, or -1"),
        ({"tensor": -1, "fsdp": -1}, "tensor=-1: fsdp is -1 too"),
    ],
)
def test_a_mesh_that_does_not_fit(mesh: dict[str, int], sentence: str):
    with pytest.raises(UserError, match=sentence):
        make_mesh(mesh)


@dataclasses.dataclass(frozen=True)
class Chip:
    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "none of the kinds whose network is known"


@pytest.mark.parametrize(
    ("sizes", "outer"),
    [
        ({"data": 4, "fsdp": 2}, "data"),
        ({"data": 2, "fsdp": 4}, "fsdp"),
        ({"fsdp": 8}, "fsdp"),
        ({"pipeline": 4, "data": 2}, "pipeline"),
        ({"pipeline": 8}, "pipeline"),
    ],
)
def test_one_axis_runs_from_slice_to_slice(sizes: dict[str, int], outer: str):
    chips = [Chip(i, i // 2) for i in range(8)]  # four slices of two
    sizes = dict.fromkeys(MESH_AXES, 1) | sizes
    slices = np.vectorize(lambda chip: chip.slice_index)(_arrange(sizes, chips))
    for axis, name in enumerate(MESH_AXES):
        if name != outer:
            assert (slices == slices.take([0], axis=axis)).all(), name
    assert sorted(set(slices.flat)) == [0, 1, 2, 3]


def test_a_pipeline_and_one_other_axis_run_from_slice_to_slice():
    chips = [Chip(i, i // 2) for i in range(8)]  # four slices of two
    sizes = dict.fromkeys(MESH_AXES, 1) | {"pipeline": 2, "data": 2, "tensor": 2}
    slices = np.vectorize(lambda chip: chip.slice_index)(_arrange(sizes, chips)).reshape(2, 2, 2)
    assert (slices == slices[..., :1]).all()
    assert sorted(slices[..., 0].flat) == [0, 1, 2, 3]


def test_slices_that_no_axis_fits():
    chips = [Chip(i, i // 2) for i in range(8)]
    with pytest.raises(UserError, match=r"mesh\.data=1 and mesh\.fsdp=2 do not fit 4 slices"):
        _arrange(dict.fromkeys(MESH_AXES, 1) | {"fsdp": 2, "tensor": 4}, chips)


def test_without_a_mesh_nothing_happens():
    x = jnp.arange(6.0).reshape(2, 3)
    assert spec("batch", "heads") is None
    assert shard(x, "batch", "vocab") is x
    np.testing.assert_array_equal(einsum("bd,cd->bc", x, x, out=("batch", "embed")), x @ x.T)


def test_axes_under_a_mesh():
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        assert spec("batch", "sequence", None, "heads") == P(("data", "fsdp"), None, None, ("tensor",))
        assert spec("embed", "mlp", shape=(6, 5)) == P(("fsdp",), None), "5 is not split in two: whole everywhere"
        assert (fitting("heads", 6), fitting("heads", 7), fitting(None, 7)) == ("heads", None, None)
        with pytest.raises(ValueError, match="'heads' and 'mlp' of one array both map to mesh axis 'tensor'"):
            spec("heads", "mlp")
        x = shard(jnp.arange(32.0).reshape(4, 8), "batch", "heads")
        assert {s.data.shape for s in x.addressable_shards} == {(1, 4)}
        product = einsum("bd,cd->bc", x, shard(jnp.ones((6, 8)), "mlp", None), out=("batch", "mlp"))
        assert product.sharding.spec == P(("data", "fsdp"), ("tensor",))
        np.testing.assert_array_equal(product, np.arange(32.0).reshape(4, 8).sum(1, keepdims=True).repeat(6, 1))
        assert reshape(x, (4, 2, 4), "batch", "heads", None).sharding.spec == P(("data", "fsdp"), ("tensor",), None)
