"""What starts several processes, what is left alone, and the rows that a device holds."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax.config import UserError
from llama_jax.parallel import distributed, make_mesh

SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "joined"),
    [
        ({}, False),
        (SRUN | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}, True),
        (SRUN | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, False),
        # A batch script, or the shell of an allocation: one process, whatever it may start.
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, False),
        (SRUN | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_COORDINATOR_ADDRESS": "a"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    ],
    ids=str,
)
def test_clusters_are_known_by_their_variables(
    environment: dict[str, str], joined: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    platforms = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    try:
        assert distributed.in_cluster(environment) == joined
    finally:
        jax.config.update("jax_platforms", platforms)


def test_what_a_cluster_lacks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install mpi4py, or give --coordinator-address"):
        distributed.in_cluster({"OMPI_COMM_WORLD_SIZE": "4"})
    assert not distributed.in_cluster({"JOB_COMPLETION_INDEX": "0"})  # a program of its own for each index
    assert jax.config.jax_platforms == "cpu"
    assert not distributed.in_cluster({"TPU_WORKER_HOSTNAMES": "a,b"})  # asked for the CPU on one host of a pod


def test_private_names_of_jax_are_of_a_version_that_was_tried():
    """A new version: run `tests/distributed`, then add it to JAX_TRIED. No other file imports from `jax._src`."""
    assert ".".join(jax.__version__.split(".")[:2]) in distributed.JAX_TRIED
    package = Path(distributed.__file__).parents[1]
    private = re.compile(r"^\s*(from|import) jax\._src", re.MULTILINE)
    assert [file.name for file in package.rglob("*.py") if private.search(file.read_text())] == ["distributed.py"]


def test_a_process_alone_touches_nothing():
    source = """
import os, sys
from llama_jax.parallel import distributed
distributed.start()
assert distributed.is_main() and not distributed.several()
assert distributed.all_agree(lambda: 3) == 3 and distributed.broadcast_from_main(lambda: [4]) == [4]
assert distributed.leave(5) == 5
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-c", source], check=True, timeout=120)


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "tensor": 4}, {"fsdp": 2, "context": 4}], ids=str)
def test_placed_rows_are_the_batch(mesh: dict[str, int]):
    batch = np.arange(8 * 16, dtype=np.int32).reshape(8, 16)
    with jax.set_mesh(make_mesh(mesh)):
        rows = distributed.local_rows(batch.shape)
        placed = distributed.place_rows(batch[rows], rows, 8)
        assert rows == list(range(8))  # this process has all devices
        split = jax.typeof(placed).sharding.shard_shape(batch.shape)
    assert split == (8 // (mesh.get("data", 1) * mesh.get("fsdp", 1)), 16 // mesh.get("context", 1))
    np.testing.assert_array_equal(placed, batch)
