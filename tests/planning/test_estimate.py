"""The estimate: exact where it can be, and true to what has to hold of any step."""

import dataclasses
import functools
import json
import re
from typing import Any

import compiled_plans
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import UserError, override
from llama_jax.models import abstract_params, init_params, num_parameters
from llama_jax.nn import GroupedQuery
from llama_jax.parallel import make_mesh, spec
from llama_jax.planning import Plan, Topology, estimate, estimate_sampling
from llama_jax.planning.communication import Traffic, traffic
from llama_jax.planning.local import Local
from llama_jax.planning.memory import argument_bytes, attention_kernel, saved_bytes
from llama_jax.planning.search import REMAT_ORDER
from llama_jax.run_config import RunConfig
from llama_jax.training import init_state, train_flops_per_token

V5E_8 = Topology.parse("v5e:2x4")
MESHES: dict[str, dict[str, int]] = {
    "data": {"data": 8, "fsdp": 1},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 4, "fsdp": 2},
    "more tensor than heads": {"tensor": 8, "fsdp": 1},
    "context": {"context": 8, "fsdp": 1},
    "combined": {"data": 1, "fsdp": 2, "tensor": 2, "context": 2},
}


def with_mesh(workload: RunConfig, mesh: dict[str, int], **changes: Any) -> RunConfig:
    return override(workload, {f"mesh.{axis}": size for axis, size in mesh.items()} | changes)


def local(workload: RunConfig, num_chips: int = 8) -> Local:
    return Local.of(workload, num_chips)


ODD = {"model.vocab_size": 41, "model.tie_embeddings": True}


PAIRS = {"data.objective": "Preference"}
CASES = [*((name, {}) for name in MESHES), ("combined", ODD), ("fsdp", ODD), ("fsdp", PAIRS)]


@pytest.mark.quick("data-changes0", "more tensor than heads-changes3", "combined-changes5")
@pytest.mark.parametrize(("name", "changes"), CASES)
def test_argument_bytes_are_those_of_a_real_state(workload: RunConfig, name: str, changes: dict[str, Any]):
    workload = with_mesh(workload, MESHES[name], **changes)
    with jax.set_mesh(make_mesh(workload.mesh)):
        if name == "combined":
            params = jax.jit(init_params, static_argnums=0)(workload.model, 0)
        else:  # where the first values lie, without the time that random ones take to compile
            params = {
                k: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding)
                for k, a in abstract_params(workload.model).items()
            }
        first = functools.partial(init_state, reference=changes is PAIRS)
        state = jax.jit(first)(params, workload.optimizer.hyper(10))
        sharding = spec("batch", "sequence", shape=(8, 64))
        batch = [jnp.zeros((8, 64), jnp.int32, out_sharding=sharding) for _ in range(6 if changes is PAIRS else 5)]
    device = jax.devices()[0]
    arrays = jax.tree.leaves((state, batch))
    held = sum(s.data.nbytes for array in arrays for s in array.addressable_shards if s.device == device)
    assert sum(argument_bytes(local(workload)).values()) == held


@pytest.mark.parametrize("command", compiled_plans.PLANS)
def test_memory_is_near_what_xla_says(command: str):
    plan = compiled_plans.plan(command).plan
    memory = compiled_plans.compiled_memory(command)
    numbers = 13  # the hyper-parameters, the step, Adam's count; the estimate has the last two
    scalar = 4 if Topology.parse(plan.topology).chip.platform == "gpu" else 512
    assert memory.arguments - plan.argument_bytes == numbers * scalar - 2 * 4
    assert 0.95 * memory.total <= plan.total_bytes <= 1.15 * memory.total
    assert plan.fits


@pytest.mark.parametrize("command", compiled_plans.PLANS)
def test_bytes_on_the_wire_are_near_those_of_the_program(command: str):
    config, topology = compiled_plans.of_command(command)
    workload = local(config, topology.num_chips)
    networks = topology.networks(workload.sizes)

    def sent(one: Traffic) -> float:
        network = networks[one.axis]
        devices = network.inner * network.outer
        hop = one.kind == "collective-permute"
        return one.bytes if hop else one.rounds(network) * one.bytes * (devices - 1) / devices

    found = sum(entry["bytes"] for entry in compiled_plans.COMPILED[command]["collectives"].values())
    kernel = attention_kernel(workload, topology.chip.platform)
    assert 0.93 * found <= sum(map(sent, traffic(workload, kernel))) <= 1.1 * found


@pytest.mark.parametrize("command", [c for c in compiled_plans.PLANS if re.search("--topology [hb][12]00:4x8", c)])
def test_gpus_send_gradients_beside_products(command: str):
    """Without `GPU_COMPILER_OPTIONS` they send none of them so."""
    sums = [sent for kind, sent in compiled_plans.COMPILED[command]["collectives"].items() if "reduce-scatter" in kind]
    assert sum(sent["overlapped"] for sent in sums) > 0.8 * sum(sent["bytes"] for sent in sums)


def test_pairs_cost_a_reference_and_its_forward_pass(llama: RunConfig):
    """With adapters the weights are there once, and the reference is computed all the same."""
    pairs, adapters = override(llama, PAIRS), {"model.adapters": "LoRA"}
    plain, found = estimate(llama, V5E_8), estimate(pairs, V5E_8)
    assert found.memory["reference"] == found.memory["parameters"]
    assert "reference" not in plain.memory
    # Recomputing, a step is four forward passes, and of pairs five, with more logits.
    assert 1.2 < found.seconds["matrix units"] / plain.seconds["matrix units"] < 1.4
    alone, of_pairs = (estimate(override(config, adapters), V5E_8) for config in (llama, pairs))
    assert "reference" not in of_pairs.memory
    assert of_pairs.seconds["matrix units"] > 1.2 * alone.seconds["matrix units"]


def test_plans_to_tune_on_are_plans():
    assert set(compiled_plans.PLANS) > compiled_plans.TUNED_ON


def test_attention_without_a_kernel_waits_for_memory(llama: RunConfig):
    long = override(llama, {"model.max_positions": 131072, "sequence_length": 131072, "global_batch_size": 64})
    kernel, blocks = (
        estimate(override(long, {"compute.attention_kernel": name}), Topology.parse("v5p:4x4x4"))
        for name in ("splash", "blockwise")
    )
    scores = 131072 * (131072 // 2) * 32 * 32  # of one row: what a query may see, heads, layers
    assert (blocks.seconds["HBM"] - kernel.seconds["HBM"]) * 2.765e12 == pytest.approx(scores * (2 * 12 + 14))
    assert kernel.bound == "matrix units"
    assert blocks.bound == "HBM"


def test_on_a_context_axis_gathered_keys_have_a_kernel_and_a_ring_has_blocks(llama: RunConfig):
    long = override(llama, {"model.max_positions": 131072, "sequence_length": 131072, "global_batch_size": 64})
    ring, gathered = (
        estimate(override(long, {"mesh.context": 4, "compute.context": method}), Topology.parse("v5p:4x4x4"))
        for method in ("ring", "all_gather")
    )
    scores = 131072 * (131072 // 2) * 32 * 32
    assert (ring.seconds["HBM"] - gathered.seconds["HBM"]) * 2.765e12 == pytest.approx(scores * (2 * 12 + 14))


@pytest.mark.parametrize(
    ("changes", "on_gpu"),
    [({}, "cudnn"), ({"model.attention.softcap": 50.0}, "reference"), ({"model.attention.sinks": True}, "blockwise")],
    ids=str,
)
def test_what_cudnn_cannot_do_has_another_kernel(changes: dict[str, Any], on_gpu: str, llama: RunConfig):
    workload = local(override(llama, changes), 8)
    assert [attention_kernel(workload, name) for name in ("tpu", "gpu")] == ["splash", on_gpu]


@pytest.mark.parametrize("changes", [{}, {"model.tie_embeddings": True}], ids=str)
def test_flops_do_not_depend_on_the_machine(workload: RunConfig, changes: dict[str, Any]):
    workload = override(workload, changes)
    plans = [estimate(with_mesh(workload, mesh), V5E_8) for mesh in MESHES.values()]
    expected = train_flops_per_token(workload.model, 64) * 8 * 64
    assert {plan.flops for plan in plans} == {expected}
    assert {plan.parameters for plan in plans} == {num_parameters(workload.model)}


@pytest.mark.parametrize("remat", REMAT_ORDER)
def test_more_chips_never_need_more_memory(llama: RunConfig, remat: str):
    totals = []
    for topology in ("v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16", "2x v5e:16x16"):
        plan = estimate(override(llama, {"compute.remat": remat}), Topology.parse(topology))
        totals.append((plan.argument_bytes, plan.total_bytes))
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > totals[-1]


def test_more_chips_are_not_slower_and_days_follow(llama: RunConfig):
    plans = [estimate(llama, Topology.parse(t)) for t in ("v5e:4x8", "v5e:8x8", "v5e:16x16")]
    assert plans[0].step_seconds > plans[1].step_seconds > plans[2].step_seconds
    for plan in plans:
        assert plan.days == pytest.approx(1000 * plan.step_seconds / 86400)
        assert plan.tokens_per_second == pytest.approx(1024 * 4096 / plan.step_seconds)
        assert 0 < plan.mfu < 1


@pytest.mark.parametrize("mesh", [{"fsdp": 64}, {"fsdp": 16, "tensor": 4}, {"fsdp": 16, "context": 4}], ids=str)
def test_stronger_remat_keeps_less_and_computes_more(llama: RunConfig, mesh: dict[str, int]):
    workloads = [with_mesh(llama, mesh, **{"compute.remat": name}) for name in REMAT_ORDER]
    saved = [saved_bytes(local(w, 64)) for w in workloads]
    assert saved == sorted(saved, reverse=True)
    assert len(set(saved)) == len(saved)
    busy = [estimate(w, Topology.parse("v5e:8x8")).seconds["matrix units"] for w in workloads]
    assert busy == sorted(busy)


def test_offload_keeps_products_in_the_host_and_computes_less_again(llama: RunConfig):
    machine = Topology.parse("v5e:8x8")
    plans = {name: estimate(override(llama, {"compute.remat": name}), machine) for name in (*REMAT_ORDER, "offload")}
    assert plans["offload"].total_bytes < plans["full"].total_bytes
    rows, width, inner = 1024 // 64, 4096, 11008
    # Of every layer: its input, queries, keys, values, attention's result, and one product of the feed-forward.
    assert plans["offload"].host_bytes == 32 * rows * 4096 * (5 * width + inner) * 2
    assert {plan.host_bytes for name, plan in plans.items() if name != "offload"} == {0}
    busy = {name: plan.seconds["matrix units"] for name, plan in plans.items()}
    assert busy["dots"] < busy["offload"] < busy["projections"]
    assert plans["offload"].seconds["host"] == pytest.approx(2 * plans["offload"].host_bytes / machine.chip.host)


def test_a_host_that_is_too_small_or_not_known_is_no_place(llama: RunConfig):
    offload = override(llama, {"compute.remat": "offload", "optimizer.accumulation_steps": 4})
    assert estimate(offload, Topology.parse("v5e:8x8")).fits
    small = Topology(dataclasses.replace(Topology.parse("v5e:8x8").chip, host_memory=1e9), (8, 8))
    plan = estimate(offload, small)
    assert plan.total_bytes <= plan.capacity
    assert not plan.fits
    with pytest.raises(UserError, match=r"compute\.remat='offload': the host of h100 is not known"):
        estimate(offload, Topology.parse("h100:8x8"))


def test_full_remat_keeps_the_layers_inputs_alone(llama: RunConfig):
    kept = saved_bytes(local(with_mesh(llama, {"fsdp": 64}), 64))
    assert kept == 32 * (1024 // 64) * 4096 * 4096 * 2  # layers x rows x positions x width, in bfloat16


def test_parts_of_a_batch_need_less_memory_and_the_same_products(llama: RunConfig):
    whole = estimate(llama, Topology.parse("v5e:8x8"))
    parts = estimate(override(llama, {"optimizer.accumulation_steps": 4}), Topology.parse("v5e:8x8"))
    assert parts.total_bytes < whole.total_bytes
    assert parts.argument_bytes == whole.argument_bytes
    assert parts.seconds["matrix units"] == whole.seconds["matrix units"]
    assert parts.seconds["ICI fsdp"] == pytest.approx(4 * whole.seconds["ICI fsdp"], rel=1e-3), "gathered once a part"


def test_memory_falls_with_the_context_axis(llama: RunConfig):
    long = override(llama, {"model.max_positions": 131072, "sequence_length": 131072, "global_batch_size": 8})
    kept = {}
    for context in (1, 2, 4, 8):
        workload = with_mesh(long, {"fsdp": 8, "context": context})
        plan = estimate(workload, Topology.parse(f"v5p:2x4x{context}"))
        kept[context] = plan.memory["activations"]
    assert {context * size for context, size in kept.items()} == {kept[1]}


def found(workload: RunConfig, num_chips: int = 8) -> dict[tuple[str, str, str, bool], int]:
    return {(t.purpose, t.kind, t.axis, t.backward): t.bytes for t in traffic(local(workload, num_chips))}


def test_what_each_axis_sends(llama: RunConfig):
    total = 2 * num_parameters(llama.model)
    norms = 2 * (2 * 32 + 1) * 4096
    matrices = total - norms
    outside = 2 * 2 * 32000 * 4096
    sent = found(with_mesh(llama, {"fsdp": 8}))
    assert sent == {
        ("parameters", "all-gather", "fsdp", False): matrices,
        ("parameters", "all-gather", "fsdp", True): matrices - outside,
        ("gradients", "reduce-scatter", "fsdp", True): matrices,
        ("gradients", "all-reduce", "fsdp", True): norms,
    }
    assert found(with_mesh(llama, {"data": 8, "fsdp": 1})) == {("gradients", "all-reduce", "data", True): total}
    sent = found(with_mesh(llama, {"fsdp": 1, "tensor": 8}))
    activations = 1024 * 4096 * 4096 * 2
    assert sent == {
        # Two sums a layer and the embedding's; backward the same, and attention's once more.
        ("activations", "all-reduce", "tensor", False): (2 * 32 + 1) * activations,
        ("activations", "all-reduce", "tensor", True): (3 * 32 + 1) * activations,
    }
    sent = found(override(with_mesh(llama, {"fsdp": 1, "tensor": 8}), {"compute.remat": "attention"}))
    assert sent["activations", "all-reduce", "tensor", True] == (2 * 32 + 1) * activations
    sent = found(with_mesh(llama, {"fsdp": 1, "context": 8}))
    keys = 32 * 2 * 4096 * (1024 * 4096 // 8) * 2
    assert sent["keys and values", "collective-permute", "context", False] == 7 * keys
    assert sent["gradients", "all-reduce", "context", True] == total


def test_nothing_is_sent_on_one_chip(llama: RunConfig):
    assert found(with_mesh(llama, {"fsdp": 1}), 1) == {}


def test_heads_that_do_not_divide_are_computed_everywhere(workload: RunConfig):
    attention = dataclasses.replace(workload.model.attention, num_heads=6, num_kv_heads=3)  # type: ignore[attr-defined]
    assert isinstance(attention, GroupedQuery)
    model = dataclasses.replace(workload.model, attention=attention)  # type: ignore[type-var]
    split = local(with_mesh(dataclasses.replace(workload, model=model), {"fsdp": 1, "tensor": 8})).model
    assert (split.head_parts, split.heads) == (1, 6)
    whole = {w.name: w for w in split.weights}
    assert whole["layers.attention.q_proj.weight"].used == 16 * 6 * 8
    assert not whole["layers.attention.o_proj.weight"].sums
    assert whole["layers.feed_forward.down_proj.weight"].sums


def test_seconds_of_a_gather_are_bytes_over_bandwidth():
    network = Topology.parse("v5e:16x16").networks({"fsdp": 256})["fsdp"]
    gather = Traffic("parameters", "all-gather", "fsdp", False, 256_000)
    assert gather.seconds(network) == (pytest.approx(255_000 / 2e11), 0)
    reduce = dataclasses.replace(gather, kind="all-reduce")
    assert reduce.seconds(network)[0] == pytest.approx(2 * gather.seconds(network)[0])
    across = Topology.parse("2x v5e:16x16").networks({"data": 2, "fsdp": 256})["data"]
    assert reduce.seconds(across) == (0, pytest.approx(256_000 / 3.125e9))


def test_a_slow_network_is_what_the_step_waits_for(llama: RunConfig):
    slices = Topology.parse("8x v5e:4x4")
    plan = estimate(override(llama, {"global_batch_size": 128, "sequence_length": 512, "mesh.data": 8}), slices)
    assert (plan.bound, plan.communication_bound) == ("DCN", True)
    assert plan.step_seconds >= plan.seconds["DCN"]
    assert estimate(llama, Topology.parse("v5e:16x16")).bound == "matrix units"


def test_a_plan_is_json(llama: RunConfig):
    plan = estimate(llama, Topology.parse("v5p:4x4x4"))
    data = json.loads(json.dumps(plan.to_json()))
    assert data.pop("fits") is plan.fits is True
    assert data.pop("total_bytes") == sum(plan.memory.values())
    assert Plan(**data) == plan


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mesh.fsdp": 3}, r"mesh \(fsdp 3\) takes 3 devices and there are 8"),
        (
            {"global_batch_size": 12},
            "global_batch_size=12 is not divisible by mesh.data x mesh.fsdp=8: take a multiple",
        ),
        ({"optimizer.accumulation_steps": 2}, "x optimizer.accumulation_steps=2: take a multiple of 16"),
        (
            {"mesh.fsdp": 1, "mesh.context": 8, "sequence_length": 60},
            "sequence_length=60 is not divisible by mesh.context=8",
        ),
    ],
)
def test_a_mesh_that_cannot_take_the_batch(workload: RunConfig, changes: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        estimate(override(workload, changes), V5E_8)


def test_the_cache_of_a_sampling_plan(llama: RunConfig):
    plan = estimate_sampling(llama, Topology.parse("v5e:2x4"), 8, 4096)
    assert plan.memory["cache"] == 2 * 32 * 4096 * 4096 * 2  # keys and values of one row a chip, in bfloat16
    assert plan.memory["parameters"] < 2 * num_parameters(llama.model) / 7
    assert plan.fits
    assert not estimate_sampling(llama, Topology.parse("v5e:2x4"), 80, 4096).fits
    with pytest.raises(UserError, match="sample_length=0 must be at least 1"):
        estimate_sampling(llama, V5E_8, 8, 0)
