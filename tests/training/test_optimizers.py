"""Every optimizer is optax's, on each layer's matrix, on every mesh, and one from outside the package is like them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from llama_jax.checkpoint import from_disk, to_disk
from llama_jax.config import UserError, override, to_json
from llama_jax.models import DecoderConfig, abstract_params
from llama_jax.nn import Experts, SoftmaxTopK
from llama_jax.parallel import make_mesh
from llama_jax.planning.local import optimizer_bytes
from llama_jax.run import RunConfig, open_run, train
from llama_jax.training import (
    SGD,
    Adafactor,
    AdamW,
    Hyper,
    Lion,
    Muon,
    Optimizer,
    Schedule,
    TrainState,
    init_state,
    learning_rate,
    make_optimizer,
    state_bytes,
)

OPTIMIZERS = (
    Lion(1e-3, 2),
    SGD(1e-2, 2, nesterov=True),
    Adafactor(1e-2, 2, min_factored=4),
    Muon(1e-2, 2),
)
MATRICES = {"embedding.weight": (6, 4), "layers.q_proj.weight": (2, 8, 2, 4), "layers.o_proj.weight": (2, 2, 4, 8)}
MATRICES |= {"layers.experts.up_proj.weight": (2, 3, 8, 5)}
VECTORS = {"layers.norm.weight": (2, 8), "norm.weight": (8,), "layers.q_proj.bias": (2, 2, 4)}
SIDES = {"embedding.weight": (1, 6, 4), "layers.q_proj.weight": (2, 8, 8), "layers.o_proj.weight": (2, 8, 8)}
SIDES |= {"layers.experts.up_proj.weight": (6, 8, 5), "layers.norm.weight": (2, 8), "norm.weight": (1, 8)}
SIDES |= {"layers.q_proj.bias": (2, 2, 4)}


def ids(value: Any) -> str:
    return type(value).__name__


def params() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in (MATRICES | VECTORS).items()}


def apart(values: dict[str, Any]) -> dict[str, Any]:
    """Each layer's and expert's matrix or vector under a name of its own."""
    return {f"{name}/{i}": part for name, x in values.items() for i, part in enumerate(x.reshape(SIDES[name]))}


def reference(optimizer: Optimizer, rate: float) -> optax.GradientTransformation:
    """Optax's own of the same numbers, for parameters as `apart` has them."""
    decay = {"weight_decay": optimizer.weight_decay}

    def decayed(values: Any) -> dict[str, bool]:
        return {name: name.split("/")[0] in MATRICES for name in values}

    match optimizer:
        case Lion(interpolation=b1, momentum=b2):
            inner = optax.lion(rate, b1=b1, b2=b2, mask=decayed, **decay)
        case SGD(momentum=momentum, nesterov=nesterov):
            # Decay is decoupled.
            inner = optax.chain(
                optax.trace(momentum, nesterov),
                optax.add_decayed_weights(optimizer.weight_decay, decayed),
                optax.scale(-rate),
            )
        case Adafactor(min_factored=smallest):
            inner = optax.chain(
                optax.adafactor(min_dim_size_to_factor=smallest),
                optax.scale(-1),
                optax.add_decayed_weights(optimizer.weight_decay, decayed),
                optax.scale(-rate),
            )
        case Muon(momentum=beta, update_rms=rms, beta1=b1, beta2=b2):
            adam = optax.adamw(rate, b1=b1, b2=b2, mask=decayed, **decay)
            muon = optax.contrib.muon(rate, beta=beta, consistent_rms=rms, **decay)

            hidden = [name for name in MATRICES if name.startswith("layers.")]

            def groups(values: Any) -> dict[str, str]:
                return {name: "muon" if name.split("/")[0] in hidden else "adam" for name in values}

            inner = optax.partition({"muon": muon, "adam": adam}, groups)
        case _:
            raise AssertionError(optimizer)
    return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), inner)


@pytest.mark.quick("Lion", "Muon")
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=ids)
def test_is_optax_one(optimizer: Optimizer):
    ours, theirs = params(), apart(params())
    transform, expected = make_optimizer(optimizer.hyper(10)), reference(optimizer, 0.01)
    state, their_state = jax.jit(transform.init)(ours), jax.jit(expected.init)(theirs)

    @jax.jit
    def step(number: int, ours: Any, state: Any, theirs: Any, their_state: Any) -> tuple[Any, ...]:
        grads = {name: jnp.sin(7 * p + number) for name, p in ours.items()}
        change, state = transform.update(grads, state, ours)
        their_change, their_state = expected.update(apart(grads), their_state, theirs)
        ours = {name: p - 0.01 * change[name] for name, p in ours.items()}
        return ours, state, optax.apply_updates(theirs, their_change), their_state

    for number in range(3):
        ours, state, theirs, their_state = step(number, ours, state, theirs, their_state)
        for name, value in apart({name: np.asarray(p) for name, p in ours.items()}).items():
            np.testing.assert_allclose(value, theirs[name], rtol=2e-4, atol=2e-6, err_msg=name)


@pytest.fixture(scope="module")
def small(tiny_config: DecoderConfig) -> DecoderConfig:
    """With experts and biases, so that every kind of parameter is there."""
    experts = Experts(4, 8, SoftmaxTopK(2, normalize=True), "silu", gated=True)
    attention = dataclasses.replace(tiny_config.attention, qkv_bias=True)
    return dataclasses.replace(tiny_config, attention=attention, feed_forward=experts, num_layers=1)


def start(config: DecoderConfig, optimizer: Optimizer) -> TrainState:
    """Random parameters on the current mesh, and the state of the optimizer."""
    rng, places = np.random.default_rng(0), abstract_params(config)
    drawn = {name: np.float32(0.3 * rng.normal(size=a.shape)) for name, a in places.items()}
    params = {name: jax.device_put(x, places[name].sharding) for name, x in drawn.items()}
    return jax.jit(init_state)(params, optimizer.hyper(10))


@jax.jit
def updated(state: TrainState, hyper: Hyper, number: jax.Array) -> TrainState:
    """The update of a train step, with gradients that are a function of the parameters."""
    grads = {name: jnp.sin(7 * p + number) for name, p in state.params.items()}
    updates, opt_state = make_optimizer(hyper).update(grads, state.opt_state, state.params)
    rate = learning_rate(state.step, hyper)
    params = {name: p - rate * updates[name] for name, p in state.params.items()}
    return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)


@pytest.mark.quick("Muon")
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=ids)
def test_same_on_a_mesh_and_sharded_like_the_parameters(small: DecoderConfig, optimizer: Optimizer):
    """Also: the layout of the state is the same before and after a step, and the planner's bytes are those held."""
    results = []
    for mesh in ({}, {"fsdp": 2, "tensor": 2, "expert": 2}):
        with jax.set_mesh(make_mesh(mesh, jax.devices()[: 8 if mesh else 1])):
            state, hyper = start(small, optimizer), optimizer.hyper(10)
            before = jax.tree.map(lambda x: x.sharding, state.opt_state)
            for i in range(2):
                state = updated(state, hyper, jnp.float32(i))
                assert before == jax.tree.map(lambda x: x.sharding, state.opt_state)
            held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.opt_state))
            assert state_bytes(optimizer, abstract_params(small)) == held
            splits = (mesh.get(axis, 1) for axis in ("pipeline", "fsdp", "tensor", "expert"))
            assert optimizer_bytes(optimizer, small, *splits) == held
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
                for name, value in state.params.items():
                    if jax.tree_util.DictKey(name) in path and leaf.shape == value.shape:
                        assert leaf.sharding == value.sharding, name
            results.append({name: np.asarray(p) for name, p in state.params.items()})
    for name, value in results[0].items():
        np.testing.assert_allclose(results[1][name], value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=ids)
def test_other_numbers_compile_nothing(small: DecoderConfig, optimizer: Optimizer):
    changed = {
        field.name: getattr(optimizer, field.name) / 2
        for field in dataclasses.fields(optimizer)
        if type(getattr(optimizer, field.name)) is float
    }
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        state = start(small, optimizer)
        other = dataclasses.replace(optimizer, **changed, warmup_steps=1).hyper(20, seed=3)
        first = updated(state, optimizer.hyper(10), jnp.float32(0))
        size = updated._cache_size()
        second = updated(state, other, jnp.float32(0))
        assert updated._cache_size() == size
    assert not np.array_equal(first.params["embedding.weight"], second.params["embedding.weight"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=ids)
def test_state_is_saved_by_name(small: DecoderConfig, optimizer: Optimizer):
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        before = start(small, optimizer)
    state = dataclasses.replace(before, opt_state=jax.tree.map(lambda x: np.asarray(x) + 1, before.opt_state))
    flat = to_disk(state)
    assert len(flat) == len(jax.tree.leaves(state))
    assert jax.tree.all(jax.tree.map(np.array_equal, from_disk(flat, before), state))


# What a notebook cell would define.


@dataclasses.dataclass(frozen=True)
class Signs(Optimizer):
    """Signs of the gradient's running mean.

    memory: decay of the mean.
    """

    memory: float = 0.5

    elementwise = False

    def transform(self) -> optax.GradientTransformation:
        return optax.chain(optax.ema(self.memory), optax.stateless(lambda updates, _: jax.tree.map(jnp.sign, updates)))


@dataclasses.dataclass(frozen=True)
class Steps(Schedule):
    """Half the rate from a step on.

    half_from: that step.
    """

    half_from: int = 3

    def factor(self, step: Any, warmup_steps: Any, num_steps: Any, final_fraction: Any) -> jax.Array:
        return jnp.where(step < self.half_from, 1.0, 0.5)


@pytest.mark.slow
def test_one_of_ones_own_is_chosen_run_and_continued(run_config: RunConfig, tmp_path: Path):
    own = (Signs, Steps)
    changes = {"optimizer": "Signs", "optimizer.schedule": "Steps", "optimizer.schedule.half_from": 4}
    changes |= {"num_steps": 6, "checkpoint.every_steps": 3, "logging.sample_prompts": (), "optimizer.warmup_steps": 1}
    config = override(run_config, changes, own)
    assert isinstance(config.optimizer, Signs)
    run = train(config, tmp_path / "run", components=own)
    rates = [metrics["learning_rate"] for metrics in run.metrics()]
    assert rates == pytest.approx([0.01] * 4 + [0.005] * 2)
    with pytest.raises(UserError, match="names the class 'Signs'"):
        open_run(run.directory)
    open_run(run.directory, own).load()
    again = train(override(config, {"num_steps": 8, "resume.allow": "num_steps"}), run.directory, components=own)
    assert again.steps()[-1] == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Muon", "Adafactor"])
def test_continued_bit_for_bit(run_config: RunConfig, tmp_path: Path, name: str):
    changes = {"optimizer": name, "checkpoint.every_steps": 2, "logging.sample_prompts": (), "mesh.fsdp": 8}
    config = override(run_config, changes | {"optimizer.schedule": "Constant", "num_steps": 4})
    whole = train(config, tmp_path / "whole")
    train(override(config, {"num_steps": 2}), tmp_path / "parts")
    parts = train(config, tmp_path / "parts")
    assert [m["loss"] for m in whole.metrics()] == [m["loss"] for m in parts.metrics()]


def test_a_run_of_before_optimizers_were_components_is_read(run_config: RunConfig, tmp_path: Path):
    config = dataclasses.replace(run_config, optimizer=AdamW(0.01, 3, final_fraction=0.2))
    data = to_json(config)
    data["optimizer"] |= {"type": "OptimizerConfig", "schedule": "cosine"}
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert open_run(tmp_path).config == config
