"""A run that names no mesh gets the planner's, on machines that the planner knows."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from llama_jax.parallel import MeshConfig
from llama_jax.planning import Topology, estimate, mesh_of, search
from llama_jax.run import load_config


def tpus(kind: str, *shape: int, slices: int = 1) -> list[Any]:
    places = [()]
    for size in shape:
        places = [(*place, i) for place in places for i in range(size)]
    coords = [(*place, *(0,) * (3 - len(shape))) for place in places]
    return [SimpleNamespace(device_kind=kind, coords=c, slice_index=s) for s in range(slices) for c in coords]


def gpus(kind: str, nodes: int) -> list[Any]:
    return [SimpleNamespace(device_kind=kind, process_index=node) for node in range(nodes) for _ in range(8)]


@pytest.mark.parametrize(
    ("devices", "topology"),
    [
        (tpus("TPU v5 lite", 4, 8), "v5e:4x8"),
        (tpus("TPU v5p", 2, 2, 4), "v5p:2x2x4"),
        (tpus("TPU v5", 2, 2, 4), "v5p:2x2x4"),
        (tpus("TPU v6 lite", 4, 4, slices=2), "2x v6e:4x4"),
        (gpus("NVIDIA H100 80GB HBM3", 4), "h100:4x8"),
        (tpus("TPU v5 lite", 4, 8)[1:], None),
        (jax.devices(), None),
    ],
)
def test_the_machine_is_recognised(devices: list[Any], topology: str | None):
    found = Topology.of(devices)
    assert (found and str(found)) == topology


def test_a_run_that_says_nothing_gets_the_fastest_mesh_that_fits():
    config = dataclasses.replace(load_config("llama2_7b"), global_batch_size=64)
    devices = tpus("TPU v5p", 2, 2, 4)
    chosen = mesh_of(config, devices)
    machine = Topology.parse("v5p:2x2x4")
    plan = estimate(dataclasses.replace(config, mesh=chosen), machine)
    assert plan.fits
    same_options = [
        candidate.plan
        for candidate in search(config, machine)
        if candidate.plan.remat == config.compute.remat
        and candidate.plan.accumulation_steps == config.optimizer.accumulation_steps
    ]
    assert plan.step_seconds <= 1.01 * min(other.step_seconds for other in same_options)
    own = dataclasses.replace(config, mesh=MeshConfig(data=2))
    assert mesh_of(own, devices) == own.mesh
    assert mesh_of(config, jax.devices()) == config.mesh
