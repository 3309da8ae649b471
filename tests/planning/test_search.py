"""Remedies and rankings: what is advised does what it is advised for."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
from hypothesis import given, strategies as st

from llama_jax.config import override
from llama_jax.parallel import MeshConfig
from llama_jax.planning import Topology, best_mesh, estimate, search, suggestion
from llama_jax.planning.search import meshes
from llama_jax.run_config import RunConfig

# Searches with run-time type checks take minutes.
pytestmark = pytest.mark.slow


def applied(workload: RunConfig, found: Any) -> Any:
    """The plan of the workload once the advice is followed, as a user would follow it."""
    return estimate(override(workload, found.changes), Topology.parse(found.topology))


@pytest.mark.parametrize(
    ("topology", "changes"),
    [
        ("v5e:8x8", {}),
        ("v5e:8x8", {"compute.remat": "none"}),
        ("v5e:16x16", {"compute.remat": "none"}),
        ("v5e:4x4", {"compute.remat": "dots", "mesh.data": 16, "mesh.fsdp": 1}),
        ("v6e:4x4", {"compute.remat": "none", "global_batch_size": 16}),
        ("h100:2x8", {"compute.remat": "none"}),
        ("v5p:2x2x4", {"sequence_length": 131072, "model.max_positions": 131072, "global_batch_size": 32}),
    ],
    ids=str,
)
def test_the_suggestion_for_what_does_not_fit_fits(llama: RunConfig, topology: str, changes: dict[str, Any]):
    workload, machine = override(llama, changes), Topology.parse(topology)
    plan = estimate(workload, machine)
    assert not plan.fits
    found = suggestion(workload, machine, plan)
    assert found is not None
    assert found.topology == topology, "no other machine, where an option suffices"
    result = applied(workload, found)
    assert result.fits
    assert result == found.plan


def test_the_smallest_change_is_one_option(llama: RunConfig):
    machine = Topology.parse("v5e:8x8")
    found = suggestion(llama, machine, estimate(llama, machine))
    assert found is not None
    assert found.changes == {"optimizer.accumulation_steps": 4}
    assert found.command() == "--optimizer.accumulation-steps 4"
    half = override(llama, {"optimizer.accumulation_steps": 2})
    assert not estimate(half, machine).fits, "less would not have been enough"


def test_more_chips_where_no_option_helps(llama: RunConfig):
    machine = Topology.parse("v5e:2x2")
    plan = estimate(llama, machine)
    assert plan.argument_bytes > plan.capacity
    found = suggestion(llama, machine, plan)
    assert found is not None
    chips = Topology.parse(found.topology).num_chips
    assert chips > machine.num_chips
    assert applied(llama, found).fits


def test_a_step_that_waits_for_its_network_gets_faster(llama: RunConfig):
    workload = override(llama, {"compute.remat": "full", "global_batch_size": 64, "mesh.tensor": 32})
    machine = Topology.parse("v5e:16x16")
    plan = estimate(workload, machine)
    assert plan.fits
    assert plan.communication_bound
    found = suggestion(workload, machine, plan)
    assert found is not None
    result = applied(workload, found)
    assert result.fits
    assert result.step_seconds < 0.95 * plan.step_seconds


def test_no_advice_where_nothing_is_wrong(llama: RunConfig):
    machine = Topology.parse("v5e:16x16")
    plan = estimate(llama, machine)
    assert plan.fits
    assert not plan.communication_bound
    assert suggestion(llama, machine, plan) is None


def test_what_is_found_fits_and_is_ranked(llama: RunConfig):
    machine = Topology.parse("v5e:8x8")
    found = search(llama, machine)
    assert len(found) > 50
    times = [candidate.plan.step_seconds for candidate in found]
    assert all(later >= earlier * 0.99 for earlier, later in itertools.pairwise(times))
    for candidate in found[:: len(found) // 10]:
        result = applied(llama, candidate)
        assert result.fits
        assert result == candidate.plan
    assert {c.plan.remat for c in found} >= {"dots", "projections", "attention", "full", "offload"}
    assert all(c.plan.memory["parameters"] < 64 * 1e9 for c in found)


def test_nothing_is_found_where_nothing_fits(llama: RunConfig):
    assert search(llama, Topology.parse("v5e:2x2")) == []
    assert best_mesh(llama, Topology.parse("v5e:2x2")) is None


def test_the_best_mesh_is_a_mesh_of_all_chips(llama: RunConfig):
    machine = Topology.parse("v5e:16x16")
    mesh = best_mesh(llama, machine)
    assert isinstance(mesh, MeshConfig)
    assert math.prod(dataclasses.asdict(mesh).values()) == 256
    best = estimate(dataclasses.replace(llama, mesh=mesh), machine)
    assert best.fits
    for other in ({"mesh.fsdp": 128, "mesh.data": 2}, {"mesh.fsdp": 64, "mesh.tensor": 4}):
        assert best.step_seconds <= estimate(override(llama, other), machine).step_seconds * 1.001


@given(st.integers(1, 96))
def test_all_meshes_of_a_number_of_chips(num_chips: int):
    found = [tuple(sizes.values()) for sizes in meshes(num_chips)]
    assert len(set(found)) == len(found)
    assert all(math.prod(sizes) == num_chips for sizes in found)
    divisors = [d for d in range(1, num_chips + 1) if num_chips % d == 0]
    expected = sum(
        1 for a in divisors for b in divisors for c in divisors if num_chips % (a * b * c) == 0
    )  # the fourth follows
    assert len(found) == expected
