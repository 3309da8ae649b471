"""Plans of mixtures of experts: a token meets the experts that it goes to, and no others."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import pytest
from make_goldens import EXPERTS as COMPILED, compile_layout, planned, totals

from llama_jax.models import abstract_params
from llama_jax.nn import Experts, SoftmaxTopK
from llama_jax.nn.experts.exchange import ROOM
from llama_jax.parallel import MeshConfig
from llama_jax.planning import Topology, estimate
from llama_jax.planning.communication import traffic
from llama_jax.planning.estimate import MATRIX_UNITS
from llama_jax.planning.local import Local
from llama_jax.training.matrices import is_matrix

EXPERTS = Experts(8, 64, SoftmaxTopK(2, normalize=True), "silu", gated=True, num_shared=1)


def local(two_layers, feed_forward: Experts = EXPERTS, **axes: int) -> Local:
    model = dataclasses.replace(two_layers, feed_forward=feed_forward)
    mesh = MeshConfig(**({"fsdp": 1} | axes))
    workload = planned(model=model, mesh=mesh, global_batch_size=16, sequence_length=32)
    return Local.of(workload, math.prod(axes.values()) if axes else 1)


@pytest.mark.parametrize("axes", [{}, {"expert": 4}, {"expert": 2, "tensor": 2}], ids=str)
def test_products_are_those_of_the_active_parameters(two_layers, axes: dict):
    found = local(two_layers, **axes)
    params = abstract_params(found.config.model)
    matrices = sum(
        math.prod(p.shape) for name, p in params.items() if is_matrix(name, p) and name.startswith("layers.")
    )
    active = matrices - 2 * EXPERTS.idle_parameters(found.config.model.hidden_size)
    tokens = found.config.global_batch_size * found.config.sequence_length
    devices = math.prod(axes.values())
    met = sum(w.layers * w.met for w in found.model.products)
    # The router is whole on every device of a tensor axis, and small.
    router = sum(math.prod(p.shape) for name, p in params.items() if "router" in name)
    assert tokens * (active - router) <= (met + router) * found.tokens * devices <= tokens * (active + 2 * router)


def test_experts_that_a_token_does_not_meet_take_no_time(two_layers):
    model = dataclasses.replace(two_layers, hidden_size=256)
    seconds = []
    for num_experts in (4, 32):
        experts = dataclasses.replace(EXPERTS, num_experts=num_experts, intermediate_size=1024, dispatch="dropless")
        workload = local(model, experts, fsdp=4).config
        seconds.append(estimate(workload, Topology.parse("v5e:2x2")).seconds[MATRIX_UNITS])
    assert seconds[0] == seconds[1] > 0


def test_experts_lie_apart_and_all_else_is_summed(two_layers):
    alone, split = local(two_layers), local(two_layers, expert=4)
    up, q = "layers.feed_forward.experts.up_proj.weight", "layers.attention.q_proj.weight"
    assert split.model[up].stored * 4 == alone.model[up].stored
    assert split.model[q].stored == alone.model[q].stored
    assert split.tokens * 4 == alone.tokens
    sums = [t for t in traffic(split) if (t.purpose, t.axis) == ("gradients", "expert")]
    others = sum(w.copies * w.used for w in split.model.weights if not w.experts)
    assert sum(t.bytes for t in sums) == others * split.itemsize


@pytest.mark.parametrize(("choices", "kinds"), [(4, {"ragged-all-to-all"}), (5, {"all-gather", "reduce-scatter"})])
def test_assignments_are_sent_where_that_is_less_than_all_tokens(two_layers, choices: int, kinds: set[str]):
    experts = dataclasses.replace(EXPERTS, router=SoftmaxTopK(choices, normalize=True))
    split = local(two_layers, experts, expert=4)
    sent = [t for t in traffic(split) if t.purpose == "tokens"]
    assert {(t.kind, t.backward) for t in sent} == {(kind, backward) for kind in kinds for backward in (False, True)}
    hidden = split.model["layers.feed_forward.router.weight"].layers * split.tokens * split.config.model.hidden_size
    assert {t.bytes for t in sent if not t.backward} == {(2 * 4 if choices == 4 else 4) * hidden * split.itemsize}


def test_room_for_a_round_of_tokens_or_for_all_unless_some_are_dropped(two_layers):
    name = "layers.feed_forward.experts.up_proj.weight"
    bounded = dataclasses.replace(EXPERTS, capacity_factor=1.25)
    assert local(two_layers).model[name].outputs == local(two_layers, bounded, expert=4).model[name].outputs
    assert local(two_layers, expert=4).model[name].outputs == ROOM * local(two_layers).model[name].outputs
    many = dataclasses.replace(EXPERTS, router=SoftmaxTopK(5, normalize=True))  # all tokens go to all devices
    assert local(two_layers, many, expert=4).model[name].outputs == 4 * local(two_layers, many).model[name].outputs


GOLDEN = json.loads((Path(__file__).parent / "goldens" / "experts.json").read_text())["collectives"]


def test_the_tpu_program_sends_assignments_and_no_tokens_to_all():
    assert {label for label in GOLDEN if label.endswith(" expert")} == {"ragged-all-to-all expert", "all-reduce expert"}
    devices = COMPILED.mesh.expert
    planned = sum(t.bytes for t in traffic(Local.of(COMPILED, 8)) if t.purpose == "tokens") * (devices - 1) // devices
    # Gates and their gradients go as rows, too, of 128 columns.
    gates = planned // 5 * 2 * 128 * 4 // (2 * COMPILED.model.hidden_size)
    assert GOLDEN["ragged-all-to-all expert"]["bytes"] == planned + gates


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed (extra plan)")
def test_libtpu_still_makes_the_golden_program():
    assert totals(compile_layout("experts")) == GOLDEN
