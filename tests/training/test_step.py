"""The train step: accumulation, donation, tracing, meshes."""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from llama_jax.models import Compute, DecoderConfig, abstract_params
from llama_jax.nn import Experts, SoftmaxTopK
from llama_jax.parallel import make_mesh
from llama_jax.run.training import to_devices
from llama_jax.training import (
    SGD,
    Adafactor,
    AdamW,
    Hyper,
    Lion,
    Muon,
    Optimizer,
    TrainState,
    compiler_options,
    init_state,
    make_eval_step,
    make_train_step,
    step,
)

ROWS, LENGTH = 8, 16
OPTIMIZER = AdamW(learning_rate=0.01, warmup_steps=2, z_loss=1e-2)
COMPUTE = Compute(loss_chunk=4)


def numbers_of(optimizer: Optimizer, num_steps: int = 10, seed: int = 0) -> Hyper:
    """Its numbers on no mesh, so that others compile nothing."""
    return jax.tree.map(np.asarray, optimizer.hyper(num_steps, seed))


HYPER = numbers_of(OPTIMIZER)


@pytest.fixture(autouse=True)
def _one_device() -> Iterator[None]:
    """Tests on one device share their programs."""
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        yield


def placed(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return to_devices(batch, range(ROWS), ROWS)


def batch_of(seed: int = 0) -> dict[str, np.ndarray]:
    """A batch in which rows have different numbers of targets."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 40, (ROWS, LENGTH + 1), dtype=np.int32)
    starts = rng.integers(1, LENGTH, (ROWS, 1))
    columns = np.arange(LENGTH)
    second = columns >= starts
    weights = (rng.random((ROWS, LENGTH)) < np.linspace(0.2, 1, ROWS)[:, None]).astype(np.float32)
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": weights,
        "segment_ids": (1 + second).astype(np.int32),
        "positions": np.where(second, columns - starts, columns).astype(np.int32),
    }


def first_values(config: DecoderConfig) -> dict[str, jax.Array]:
    """First values on the current mesh, as small as a model's own, which take seconds to compile."""
    rng, places = np.random.default_rng(0), abstract_params(config)
    drawn = {name: ("norm" in name) + 0.02 * rng.normal(size=a.shape) for name, a in places.items()}
    return {name: jax.device_put(np.float32(x), places[name].sharding) for name, x in drawn.items()}


@pytest.mark.slow
def test_a_scanned_step_has_one_size_for_every_depth(tiny_config: DecoderConfig):
    """Of what is compiled: unrolled, each layer has its own part of the program."""

    def size(num_layers: int, *, scan: bool) -> int:
        config = dataclasses.replace(tiny_config, num_layers=num_layers)
        state = jax.eval_shape(lambda params: init_state(params, HYPER), abstract_params(config))
        step: Any = make_train_step(config, Compute(scan_layers=scan))
        return step.lower(state, batch_of(), HYPER).as_text().count("\n")

    assert size(3, scan=True) == size(48, scan=True)
    assert size(4, scan=False) - size(3, scan=False) > 0.1 * size(3, scan=True)


def run(
    config: DecoderConfig,
    mesh: dict[str, int] | None,
    *,
    compute: Compute | None = None,
    parts: int = 1,
    steps: int = 3,
) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """Metrics of some steps on a mesh of eight devices (None: one device) and the parameters after them."""
    devices = jax.devices() if mesh else jax.devices()[:1]
    step = make_train_step(config, compute or COMPUTE, accumulation_steps=parts)
    with jax.set_mesh(make_mesh(mesh or {}, devices)):
        state = jax.jit(init_state)(first_values(config), HYPER)
        seen = []
        for i in range(steps):
            state, metrics = step(state, placed(batch_of(i)), HYPER)
            seen.append({name: float(value) for name, value in metrics.items()})
        for name, value in state.params.items():
            moment = state.opt_state[1].mu[name]
            assert moment.sharding == value.sharding, name
        return seen, {name: np.asarray(value) for name, value in state.params.items()}


@pytest.fixture(scope="module")
def on_one_device(tiny_config: DecoderConfig):
    return run(tiny_config, None)


def assert_same(a: Any, b: Any) -> None:
    for ours, theirs in zip(a[0], b[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4), "metrics"
    for name, value in b[1].items():
        np.testing.assert_allclose(a[1][name], value, atol=2e-4, err_msg=name)


@pytest.mark.parametrize(
    "mesh",
    [pytest.param(m, marks=pytest.mark.slow) for m in ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8})],
    ids=lambda m: "-".join(f"{axis}{size}" for axis, size in m.items()),
)
def test_three_steps_on_a_mesh_are_those_of_one_device(
    tiny_config: DecoderConfig, on_one_device: Any, mesh: dict[str, int]
):
    assert_same(run(tiny_config, mesh), on_one_device)


@pytest.mark.slow
def test_the_same_bits_each_time_and_those_of_one_device_but_for_rounding(
    tiny_config: DecoderConfig, on_one_device: Any
):
    first, second = (run(tiny_config, {"context": 2, "fsdp": 4}) for _ in range(2))
    assert first[0] == second[0]
    assert all(np.array_equal(value, second[1][name]) for name, value in first[1].items())
    assert_same(first, on_one_device)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "parts"), [(None, 8), ({"fsdp": 2, "tensor": 4}, 4)], ids=str)
def test_accumulation_is_the_large_batch(tiny_config: DecoderConfig, on_one_device: Any, mesh: Any, parts: int):
    """Also though the parts have different numbers of targets."""
    assert_same(run(tiny_config, mesh, parts=parts), on_one_device)


@pytest.mark.slow
def test_accumulation_unrolled_with_a_tied_head_on_a_mesh_is_the_large_batch(tiny_config: DecoderConfig):
    """Also though the parts have different numbers of targets."""
    config, compute = dataclasses.replace(tiny_config, tie_embeddings=True), Compute(scan_layers=False, loss_chunk=8)
    assert_same(run(config, {"data": 2, "fsdp": 2, "tensor": 2}, compute=compute, parts=2), run(config, None))


@pytest.mark.slow
def test_shares_of_unequal_parts_are_those_of_the_whole(tiny_config: DecoderConfig):
    """What experts report of parts, and of devices' rows, with different numbers of real tokens."""
    experts = Experts(4, 8, SoftmaxTopK(2, normalize=True), "silu", gated=True, capacity_factor=0.75)
    config = dataclasses.replace(tiny_config, feed_forward=experts, num_layers=1)
    batch = batch_of()
    padding = np.arange(LENGTH) >= np.array([16, 1, 9, 0, 2, 0, 16, 0])[:, None]
    batch |= {name: np.where(padding, 0, batch[name]) for name in ("segment_ids", "weights", "positions")}
    found = []
    for parts, mesh in ((1, {}), (2, {"data": 4})):
        with jax.set_mesh(make_mesh(mesh, jax.devices()[: 4 if mesh else 1])):
            step = make_train_step(config, COMPUTE, accumulation_steps=parts)
            _, metrics = step(start(config), placed(batch), HYPER)
        found.append({name: np.asarray(value) for name, value in metrics.items()})
    assert 0.02 < found[0]["dropped_share"] < 0.9
    assert found[0]["experts_load"].shape == (4,)
    assert not any(name.startswith("of.") for name in found[0])
    for name in ("dropped_share", "experts_load", "loss"):
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=1e-5, err_msg=name)


def start(config: DecoderConfig) -> TrainState:
    return jax.jit(init_state)(first_values(config), HYPER)


def test_loss_is_the_mean_over_targets(tiny_config: DecoderConfig):
    batch, state = batch_of(), start(tiny_config)
    nats, targets = make_eval_step(tiny_config, COMPUTE)(state.params, placed(batch))
    _, metrics = make_train_step(tiny_config, COMPUTE)(state, placed(batch), HYPER)
    assert float(targets) == float(metrics["num_targets"]) == batch["weights"].sum()
    # The z-loss is trained on and not told.
    assert float(metrics["loss"]) == pytest.approx(float(nats / targets), rel=1e-6)
    assert float(metrics["loss"]) == pytest.approx(np.log(40), rel=0.02)


def test_state_is_donated(tiny_config: DecoderConfig):
    state = start(tiny_config)
    make_train_step(tiny_config, COMPUTE)(state, placed(batch_of()), HYPER)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))


def test_other_hyper_parameters_compile_nothing(tiny_config: DecoderConfig, caplog: pytest.LogCaptureFixture):
    step = make_train_step(tiny_config, COMPUTE)
    state, batch = start(tiny_config), placed(batch_of())
    rates = []
    other = AdamW(0.3, 7, 0.2, 0.5, 0.3, 0.1, label_smoothing=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    other = numbers_of(other, 77, seed=1)
    assert all(float(a) != float(b) for a, b in zip(*map(jax.tree.leaves, (HYPER, other)), strict=True))
    with jax.log_compiles():
        for i, hyper in enumerate((HYPER, other, HYPER)):
            with caplog.at_level(logging.WARNING):
                caplog.clear()
                state, metrics = step(state, batch, hyper)
                rates.append(float(metrics["learning_rate"]))
            compiled = [r.message for r in caplog.records if "Compiling" in r.message and "train_step" in r.message]
            assert len(compiled) == (i == 0), compiled
    assert rates[0] != rates[1]


def test_every_hyper_parameter_matters(tiny_config: DecoderConfig):
    config = dataclasses.replace(tiny_config, dropout=0.1)  # for the seed to matter
    step, batch = make_train_step(config, COMPUTE), placed(batch_of())

    def after(hyper: Hyper) -> list[np.ndarray]:
        state = start(tiny_config)
        for _ in range(5):
            state, _ = step(state, batch, hyper)
        return [np.asarray(value) for value in state.params.values()]

    before = after(HYPER)
    assert all(np.array_equal(a, b) for a, b in zip(before, after(HYPER), strict=True))
    values, tree = jax.tree.flatten(HYPER)
    for i, value in enumerate(values):
        other = np.ones_like(value) if value.dtype == np.uint32 else np.float32(value / 2 + 1e-3)
        changed = after(jax.tree.unflatten(tree, [*values[:i], other, *values[i + 1 :]]))
        assert not all(np.array_equal(a, b) for a, b in zip(before, changed, strict=True)), (i, value)


def test_overfits_one_batch(tiny_config: DecoderConfig):
    step, state, batch = make_train_step(tiny_config, COMPUTE), start(tiny_config), placed(batch_of())
    hyper = numbers_of(AdamW(learning_rate=0.03, warmup_steps=5, weight_decay=0.0), 60)
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch, hyper)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 3.5
    assert losses[-1] < 0.3


@pytest.mark.slow
def test_overfits_one_batch_with_each(tiny_config: DecoderConfig):
    for optimizer in (Lion(1e-2, 5), SGD(0.3, 5, weight_decay=0.0), Adafactor(0.1, 5), Muon(0.03, 5)):
        step, hyper = make_train_step(tiny_config, COMPUTE), optimizer.hyper(60)
        state, batch, losses = jax.jit(init_state)(first_values(tiny_config), hyper), placed(batch_of()), []
        for _ in range(60):
            state, metrics = step(state, batch, hyper)
            losses.append(float(metrics["loss"]))
        assert losses[-1] < 0.5 * losses[0], (type(optimizer).__name__, losses[::10])


def test_gpus_have_their_options_where_xla_knows_them(tiny_config: DecoderConfig, monkeypatch: pytest.MonkeyPatch):
    assert compiler_options(tiny_config, "gpu") == step.GPU_COMPILER_OPTIONS
    monkeypatch.setattr(step, "GPU_COMPILER_OPTIONS", {"xla_gpu_of_another_version": True})
    assert compiler_options(tiny_config, "gpu") is None
