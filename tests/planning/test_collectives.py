"""What the train step communicates in each layout: kinds on the CPU, bytes in what libtpu makes."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import jax
import pytest
from make_goldens import LAYOUTS, MODEL, compile_layout, planned, totals
from minimum import minimum

from llama_jax.models import Compute, abstract_params
from llama_jax.nn import SwiGLU
from llama_jax.parallel import MeshConfig
from llama_jax.planning import Collective
from llama_jax.planning.communication import traffic
from llama_jax.planning.local import Local
from llama_jax.planning.xla.compiled import describe, lower_step
from llama_jax.planning.xla.hlo import bytes_of
from llama_jax.run_config import RunConfig

GOLDENS = Path(__file__).parent / "goldens"
BATCH, LENGTH = 8, 32
TINY = dataclasses.replace(
    MODEL,
    vocab_size=512,
    hidden_size=64,
    num_layers=3,
    attention=dataclasses.replace(MODEL.attention, head_dim=8),
    feed_forward=SwiGLU(intermediate_size=96, bias=False),
)
PARAMETERS = 4 * sum(math.prod(p.shape) for p in abstract_params(TINY).values())
HIDDEN = 4 * BATCH * LENGTH * TINY.hidden_size


def on_mesh(changes: dict[str, Any] | None = None, rows: int = BATCH, /, **mesh: int) -> RunConfig:
    kernel = "blockwise" if "context" in mesh else "reference"  # the latter has no ring
    remat = "full" if "pipeline" in mesh else "none"
    return planned(
        model=dataclasses.replace(TINY, **(changes or {})),
        compute=Compute(dtype="float32", attention_kernel=kernel, loss_chunk=LENGTH, remat=remat),
        mesh=MeshConfig(**({"fsdp": 1} | mesh)),
        global_batch_size=rows,
        sequence_length=LENGTH,
    )


def on_cpu(changes: dict[str, Any] | None = None, rows: int = BATCH, /, **mesh: int) -> list[Collective]:
    """Collectives of the train step on eight CPU devices, in float32; sums of a few scalars left out."""
    lowered, jax_mesh = lower_step(on_mesh(changes, rows, **mesh), jax.devices())
    step = describe(lowered.compile(), jax_mesh, 0.0)
    # XLA:CPU keeps sums over groups of one device, in which nothing travels.
    found = [c for c in step.collectives if c.wire_bytes > 256]
    assert found
    assert {axis for c in found for axis in c.axes} == {axis for axis, size in mesh.items() if size > 1}
    return found


def kinds(collectives: list[Collective]) -> set[tuple[str, tuple[str, ...]]]:
    return {(c.kind, c.axes) for c in collectives}


def total(collectives: list[Collective], *of_kinds: str) -> int:
    return sum(c.count * c.bytes for c in collectives if c.kind in of_kinds)


@pytest.mark.slow
def test_data_reduces_the_gradients_and_nothing_else():
    found = on_cpu(data=8)
    assert kinds(found) == {("all-reduce", ("data",))}
    assert PARAMETERS <= total(found, "all-reduce") < 1.01 * PARAMETERS


@pytest.mark.slow
def test_fsdp_gathers_the_parameters_and_reduces_the_gradients():
    found = on_cpu(fsdp=8)
    assert {kind for kind, _ in kinds(found)} <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert 0.99 * PARAMETERS <= total(found, "all-gather") <= 2 * PARAMETERS
    assert 0.99 * PARAMETERS <= total(found, "all-reduce", "reduce-scatter") < 1.01 * PARAMETERS


@pytest.mark.slow
def test_tensor_sums_activations_and_never_gathers_logits():
    found = on_cpu(tensor=8)
    assert kinds(found) == {("all-reduce", ("tensor",))}
    assert max(bytes_of(array) for c in found for array in c.arrays) == HIDDEN
    # Forward once for each of attention and feed-forward; backward XLA:CPU sums each projection's part by itself.
    assert (1 + 2 * TINY.num_layers) * HIDDEN < total(found, "all-reduce") < (3 + 8 * TINY.num_layers) * HIDDEN


@pytest.mark.slow
def test_a_ring_sends_keys_and_values_and_gathers_neither():
    found = on_cpu(context=8)
    assert {kind for kind, _ in kinds(found)} == {"collective-permute", "all-reduce", "all-gather"}
    ids = 4 * BATCH * LENGTH
    assert all(c.bytes == ids for c in found if c.kind == "all-gather")  # the batch, once, into zigzag order
    keys = 4 * BATCH * LENGTH // 8 * TINY.attention.num_kv_heads * TINY.attention.head_dim  # type: ignore[attr-defined]
    around = 7 * TINY.num_layers * 2 * keys  # keys and values
    # Forward, backward, and their gradients backward; besides them little: segment ids.
    assert 3 * around <= total(found, "collective-permute") < 1.1 * 3 * around
    assert PARAMETERS <= total(found, "all-reduce") < 1.01 * PARAMETERS


@pytest.mark.slow
def test_a_pipeline_sends_microbatches_and_what_the_planner_says():
    """Eight microbatches over four stages: hops at each tick, and sums for what lies around the layers."""
    changes, mesh = {"num_layers": 8}, {"pipeline": 4, "fsdp": 2}
    found = on_cpu(changes, 16, **mesh)
    sent = [c for c in found if c.kind == "collective-permute"]
    assert {c.axes for c in sent} == {("pipeline",)}
    over_stages = [c for c in found if "pipeline" in c.axes and c.kind != "collective-permute"]
    assert {c.kind for c in over_stages} == {"all-reduce"}, "no layers are gathered"
    wanted: dict[tuple[str, str], int] = {}
    for t in traffic(Local.of(on_mesh(changes, 16, **mesh), 8)):
        wanted[t.kind, t.axis] = wanted.get((t.kind, t.axis), 0) + t.bytes
    assert total(sent, "collective-permute") == wanted["collective-permute", "pipeline"]
    assert total(found, "all-gather") == wanted["all-gather", "fsdp"], "at each tick those of the stage's layers"
    of_ends = wanted["all-reduce", "pipeline"]
    norm = 4 * TINY.hidden_size  # its sum over both axes is one operation
    assert of_ends // 2 <= total(over_stages, "all-reduce") <= 1.5 * of_ends + norm


def test_together_each_kind_stays_on_its_axis():
    found = on_cpu(fsdp=2, tensor=2, context=2)
    assert {axes for kind, axes in kinds(found) if kind == "collective-permute"} == {("context",)}
    assert {c.axes for c in found if c.kind == "all-gather" and c.bytes > 4 * BATCH * LENGTH} == {("fsdp",)}
    assert {c.axes for c in found if c.kind == "reduce-scatter"} <= {("fsdp",)}
    assert "all-to-all" not in {c.kind for c in found}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


def golden(layout: str) -> dict:
    return json.loads((GOLDENS / f"{layout}.json").read_text())


def test_tpu_programs_send_little_more_than_they_must(layout: str):
    found: dict[str, float] = {}
    for name, entry in golden(layout)["collectives"].items():
        axes = name.split()[1]
        found[axes] = found.get(axes, 0) + entry["bytes"]
    scalars = {axes: size for axes, size in found.items() if "+" in axes}
    assert all(size < 1024 for size in scalars.values())
    # Over 4x4 libtpu sums on every chip, in all directions at once, and cuts afterwards (docs/decisions.md).
    least = minimum(LAYOUTS[layout], scattering=2 if layout == "fsdp_torus" else 1)
    for axis, size in least.items():
        assert 0.999 * size <= found.get(axis, 0) <= 1.1 * size, axis


# Blockwise attention computes a part of the masked scores, the ring another part.
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "context"])
def test_flops_are_those_of_the_model_wherever_it_runs(layout: str):
    config = LAYOUTS[layout]
    model, length = config.model, config.sequence_length
    inner = abstract_params(model)["layers.feed_forward.up_proj.weight"].size // model.num_layers
    attention = 4 * model.hidden_size**2
    # Forward, again for remat (all but the last product, whose result the backward pass does not ask for), and twice
    # backward; the head is not computed again. Scores: two products.
    layer = 8 * (attention + 3 * inner) - 2 * inner + 8 * 2 * length * model.hidden_size
    head = 6 * model.hidden_size * model.vocab_size
    devices = math.prod(dataclasses.asdict(config.mesh).values())
    assert golden(layout)["flops"] == config.global_batch_size * length * (model.num_layers * layer + head) // devices


def test_only_the_chosen_axis_crosses_slices():
    for layout in LAYOUTS:
        crossing = {name.split()[1] for name in golden(layout)["collectives"] if name.endswith("across slices")}
        assert crossing == ({"data"} if layout == "two_slices" else set())


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed (extra plan)")
def test_libtpu_still_makes_the_golden_program(layout: str):
    step = compile_layout(layout)
    assert totals(step) == golden(layout)["collectives"]
    assert step.flops == golden(layout)["flops"]
