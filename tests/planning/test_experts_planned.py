"""Plans of mixtures of experts: a token meets the experts that it goes to, and no others."""

import dataclasses
import math

import pytest
from make_goldens import planned

from llama_jax.models import abstract_params
from llama_jax.nn import Experts, SoftmaxTopK
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
    kinds = {(t.kind, t.backward) for t in traffic(split) if t.purpose == "tokens"}
    assert kinds == {(kind, backward) for kind in ("all-gather", "reduce-scatter") for backward in (False, True)}


def test_room_for_all_tokens_unless_some_are_dropped(two_layers):
    name = "layers.feed_forward.experts.up_proj.weight"
    bounded = dataclasses.replace(EXPERTS, capacity_factor=1.25)
    assert local(two_layers).model[name].outputs == local(two_layers, bounded, expert=4).model[name].outputs
    assert local(two_layers, expert=4).model[name].outputs == 4 * local(two_layers).model[name].outputs
