"""Compiling for machines that are not here: what goes in and out, and what is said when it cannot be done."""

import dataclasses
import importlib.util
import json
import math
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from make_goldens import LAYOUTS, TOPOLOGIES

from llama_jax.chips import CHIPS
from llama_jax.config import UserError, from_json, to_json
from llama_jax.data import Causal, DataConfig
from llama_jax.data.objectives import MaskedLM
from llama_jax.models import DecoderConfig, layout
from llama_jax.parallel import MeshConfig
from llama_jax.planning import CompiledStep, DoesNotFit, compile_step
from llama_jax.planning.xla.compiled import _one_at_a_time, describe, get_devices, lower_step
from llama_jax.run_config import RunConfig
from llama_jax.zoo import presets

needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu is not installed (extra `plan`)"
)


@pytest.fixture
def small(two_layers: DecoderConfig) -> RunConfig:
    return dataclasses.replace(LAYOUTS["fsdp_tensor"], model=two_layers, global_batch_size=8, sequence_length=16)


@pytest.mark.quick("0.1")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_arguments_are_what_a_device_holds(small: RunConfig, dropout: float):
    small = dataclasses.replace(small, model=dataclasses.replace(small.model, dropout=dropout))
    lowered, mesh = lower_step(small, jax.devices())
    step = describe(lowered.compile(), mesh, 1.5)
    held = [
        a.dtype.itemsize * math.prod(a.sharding.shard_shape(a.shape) if a.shape else ())
        for a in jax.tree.leaves(lowered.in_avals)
        if hasattr(a, "sharding")
    ]
    assert step.num_devices == 8
    unread = 0 if dropout else 4  # the seed
    assert step.memory.arguments == sum(held) - unread
    assert step.memory.total >= step.memory.arguments + step.memory.temporaries
    assert step.memory.aliased > 0.9 * step.memory.outputs  # the state is donated
    assert from_json(CompiledStep, json.loads(json.dumps(to_json(step)))) == step
    assert from_json(RunConfig, json.loads(json.dumps(to_json(small)))) == small


@pytest.mark.quick("gpt2", "bert_base")
@pytest.mark.parametrize("name", ["gpt2", "bert_base", "deepseek_v3"])
def test_nothing_is_computed_on_devices_that_may_not_be_here(small: RunConfig, name: str):
    """With learned positions and dropout; with an encoder's heads; with experts, buffers and two stacks."""
    layout._templates.cache_clear()
    objective = MaskedLM(next_sentence=False) if name == "bert_base" else Causal()
    model = dataclasses.replace(presets()[name], vocab_size=64)
    request = dataclasses.replace(small, model=model, data=DataConfig(path=(), objective=objective))
    with jax.no_execution():
        lower_step(request, jax.devices())


def test_without_libtpu_the_extra_is_named(small: RunConfig, monkeypatch: pytest.MonkeyPatch):
    found: Callable = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name))
    with pytest.raises(UserError, match=r"topology='v5e:2x2' needs libtpu.*pip install 'llama_jax\[plan\]'"):
        compile_step(small, "v5e:2x2")


@pytest.mark.parametrize(
    ("has_plugin", "sentence"),
    [
        (False, r"topology='h100:2x4' needs JAX's CUDA plugin.*pip install 'llama_jax\[plan-gpu\]'"),
        (True, "compute.attention_kernel='auto': cuDNN's kernel cannot be compiled where its GPU is not"),
    ],
)
def test_what_a_gpu_s_step_needs(has_plugin: bool, sentence: str, small: RunConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: has_plugin or None)
    compute = dataclasses.replace(small.compute, attention_kernel="auto")
    with pytest.raises(UserError, match=sentence):
        compile_step(dataclasses.replace(small, compute=compute), "h100:2x4")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("jax_cuda13_plugin"), reason="extra `plan-gpu` is not installed")
@pytest.mark.parametrize("chip", [name for name, chip in CHIPS.items() if chip.target])
def test_a_gpu_s_step(chip: str, small: RunConfig):
    step = compile_step(dataclasses.replace(small, mesh=MeshConfig(data=2, fsdp=4)), f"{chip}:2x4")
    assert step.num_devices == 8
    found = {(c.kind, c.axes, c.across_slices) for c in step.collectives}
    assert {("all-gather", ("fsdp",), False), ("all-reduce", ("data",), True)} <= found
    assert all(across == ("data" in axes) for _, axes, across in found)


def test_a_topology_is_written_in_one_way():
    for wrong in ("v5e", "v5e:2y2", "2xv5e:2x2", "x v5e:2x2", "v5e:2x2 "):
        with pytest.raises(UserError, match="is not of the form"):
            get_devices(wrong)


def test_compilations_wait_for_one_another(capfd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    order = []

    def second() -> None:
        with _one_at_a_time():
            order.append("second")

    with _one_at_a_time():
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.5)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert "waiting for another compilation" in capfd.readouterr().err


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "mesh", "sentence"),
    [
        ("v9:2x2", None, "topology='v9:2x2' is none that libtpu can compile for"),
        ("v5e:3x5", None, "topology='v5e:3x5' is none that libtpu can compile for"),
        ("v4:2x2x1", None, "topology='v4:2x2x1' is none that libtpu can compile for"),
        ("v5e:2x2", MeshConfig(fsdp=3), "takes 3 devices and there are 4"),
        ("3x v5e:2x2", MeshConfig(tensor=3), "do not fit 3 slices"),
    ],
)
def test_mistakes_are_told_in_a_sentence(small: RunConfig, topology: str, mesh: MeshConfig | None, sentence: str):
    with pytest.raises(UserError, match=sentence) as error:
        compile_step(dataclasses.replace(small, mesh=mesh or small.mesh), topology)
    assert "\n" not in str(error.value)


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_is_told_apart(small: RunConfig):
    model = dataclasses.replace(LAYOUTS["data"].model, num_layers=100, max_positions=8192)
    big = dataclasses.replace(small, model=model, mesh=MeshConfig(data=4, fsdp=1))
    with pytest.raises(DoesNotFit, match="HBM"):
        compile_step(big, "v5e:2x2")


@needs_libtpu
@pytest.mark.slow
def test_a_mesh_that_no_side_of_the_torus_has(small: RunConfig):
    """v6e:4x4 has no side of 2 or 8, and jax.make_mesh alone refuses to split one."""
    step = compile_step(dataclasses.replace(small, mesh=MeshConfig(fsdp=8, tensor=2)), "v6e:4x4")
    assert step.num_devices == 16
    assert {c.axes for c in step.collectives} >= {("fsdp",), ("tensor",)}


@needs_libtpu
@pytest.mark.slow
def test_a_batch_in_parts():
    request = LAYOUTS["fsdp"]
    optimizer = dataclasses.replace(request.optimizer, accumulation_steps=2)
    step = compile_step(dataclasses.replace(request, optimizer=optimizer), TOPOLOGIES["fsdp"])
    assert any(c.loops[0] == 2 for c in step.collectives if c.loops)
