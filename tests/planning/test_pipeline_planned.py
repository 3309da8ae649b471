"""What the planner says about a pipeline is what its mesh has and its program sends."""

import dataclasses
import math

import jax
import pytest
from hypothesis import given, strategies as st
from make_goldens import planned
from test_collectives import TINY

from llama_jax.config import UserError, override
from llama_jax.models import Compute, abstract_params
from llama_jax.parallel import MeshConfig, make_mesh
from llama_jax.planning import Topology, estimate, search
from llama_jax.planning.communication import traffic
from llama_jax.planning.local import Local, Schedule
from llama_jax.planning.memory import argument_bytes
from llama_jax.run_config import RunConfig, load_config

TINY = dataclasses.replace(TINY, num_layers=4)


def tiny(**mesh: int) -> RunConfig:
    return planned(
        model=TINY,
        compute=Compute(dtype="float32", pipeline_microbatches=2 * mesh.get("pipeline", 1)),
        mesh=MeshConfig(**({"fsdp": 1} | mesh)),
        global_batch_size=16,
        sequence_length=32,
    )


@pytest.mark.parametrize("mesh", [{"pipeline": 2, "fsdp": 2, "tensor": 2}, {"pipeline": 4, "data": 2}])
def test_parameters_and_state_are_those_of_a_stage(mesh: dict[str, int]):
    found = argument_bytes(Local.of(tiny(**mesh), 8))
    with jax.set_mesh(make_mesh(mesh)):
        shards = [a.sharding.shard_shape(a.shape) for a in abstract_params(TINY).values()]
    elements = sum(map(math.prod, shards))
    assert found["parameters"] == 4 * elements
    assert found["optimizer"] == pytest.approx(2 * 4 * elements, abs=64)


@given(st.integers(2, 16), st.integers(1, 8), st.integers(1, 8))
def test_a_stage_works_in_all_ticks_but_those_of_the_bubble(stages: int, repeats: int, of_stage: int):
    schedule = Schedule(stages, repeats, stages * of_stage)
    assert schedule.ticks * (1 - schedule.bubble) == pytest.approx(repeats * schedule.microbatches)
    assert schedule.work * (1 - schedule.bubble) == pytest.approx(1)
    assert Schedule(stages, repeats + 1, stages * of_stage).bubble < schedule.bubble


def test_stages_send_hidden_states_and_no_gradients_of_layers():
    sent = [t for t in traffic(Local.of(tiny(pipeline=4), 4)) if t.axis == "pipeline"]
    # Of 8 microbatches of two rows: 11 ticks' results, and 12 that wait or are done.
    assert {t.bytes for t in sent if t.kind == "collective-permute"} == {23 * 4 * 2 * 32 * TINY.hidden_size}
    around = 4 * sum(math.prod(a.shape) for name, a in abstract_params(TINY).items() if not name.startswith("layers."))
    assert sum(t.bytes for t in sent if t.purpose == "gradients") == around


@pytest.mark.slow
def test_the_largest_model_is_planned_on_4096_chips():
    config, machine = load_config("llama3_405b"), Topology.parse("16x v5p:4x8x8")
    plans = {
        repeats: estimate(override(config, {"mesh.pipeline": 2, "compute.pipeline_repeats": repeats}), machine)
        for repeats in (1, 9)
    }
    whole = estimate(config, machine)
    assert whole.fits
    assert whole.bubble == 0
    assert plans[9].fits
    assert (plans[1].bubble, plans[9].bubble) == (1 / 3, 1 / 19)
    assert plans[9].step_seconds < plans[1].step_seconds
    # Half as many devices share the parameters of a stage, which has half of the layers.
    assert plans[9].memory["parameters"] == pytest.approx(whole.memory["parameters"], rel=0.02)
    with pytest.raises(UserError, match="has 126 of 126 layers with a pattern of 1"):
        estimate(override(config, {"mesh.pipeline": 4}), machine)


@pytest.mark.slow
def test_a_search_tries_stages_where_there_are_slices():
    config = tiny(fsdp=8)
    found = search(config, Topology.parse("2x v5e:2x2"))
    assert {candidate.plan.mesh["pipeline"] for candidate in found} == {1, 2}
    assert {candidate.plan.mesh["pipeline"] for candidate in search(config, Topology.parse("v5e:2x4"))} == {1}
