"""A step whose loss or gradient is not finite, on any device, updates nothing."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from llama_jax.models import Compute, DecoderConfig, abstract_params, frozen
from llama_jax.nn import Experts, SigmoidTopK
from llama_jax.parallel import make_mesh
from llama_jax.run.training import to_devices
from llama_jax.training import SGD, Adafactor, AdamW, Lion, Muon, Optimizer, init_state, make_train_step

ROWS, LENGTH = 8, 8
OTHERS = [
    pytest.param(kind(learning_rate=0.01, warmup_steps=2), marks=pytest.mark.slow)
    for kind in (SGD, Lion, Muon, Adafactor)
]


def batch_of(seed: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(seed).integers(0, 40, (ROWS, LENGTH + 1), dtype=np.int32)
    ones = np.ones((ROWS, LENGTH), np.int32)
    places = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    weights = ones.astype(np.float32)
    rest = {"weights": weights, "segment_ids": ones, "positions": places}
    return {"tokens": ids[:, :-1], "targets": ids[:, 1:]} | rest


def first_values(config: DecoderConfig) -> dict[str, jax.Array]:
    """Random values on the current mesh."""
    rng, places = np.random.default_rng(0), abstract_params(config)
    drawn = {name: ("norm" in name) + 0.1 * rng.normal(size=a.shape) for name, a in places.items()}
    return {name: jax.device_put(np.float32(x), places[name].sharding) for name, x in drawn.items()}


def host(state: Any) -> Any:
    return jax.tree.map(np.array, state)


def assert_same_bits(ours: Any, theirs: Any) -> None:
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "optimizer", [AdamW(learning_rate=0.01, warmup_steps=2), *OTHERS], ids=lambda o: type(o).__name__
)
def test_nothing_is_updated_by_numbers_that_are_not_finite(tiny_config: DecoderConfig, optimizer: Optimizer):
    """Of the eight devices' rows those of one: loss and gradient; of all, the norm of the gradient alone."""
    router = SigmoidTopK(2, normalize=True, scaling=1.0, num_groups=1, top_groups=1, bias_update_rate=0.01)
    config = dataclasses.replace(tiny_config, feed_forward=Experts(4, 8, router, "silu", gated=True))
    hyper, names = optimizer.hyper(10), frozen(config)
    assert names  # the routers' biases
    step = make_train_step(config, Compute(loss_chunk=4))
    with jax.set_mesh(make_mesh({"data": 4, "fsdp": 2})):
        place = lambda batch: to_devices(batch, range(ROWS), ROWS)  # noqa: E731
        state = jax.jit(init_state, static_argnames="buffer_names")(first_values(config), hyper, buffer_names=names)
        state, metrics = step(state, place(batch_of(0)), hyper)
        assert metrics["skipped"] == 0
        for value in (np.nan, np.inf):
            before, bad = host(state), batch_of(1)
            bad["weights"][3, 2] = value
            state, metrics = step(state, place(bad), hyper)
            assert metrics["skipped"] == 1
            assert not np.isfinite(metrics["loss"])
            assert int(state.step) == before.step + 1
            assert_same_bits(dataclasses.replace(host(state), step=before.step), before)
        head = "lm_head.weight"  # scores of 1e25: a large loss, and squares of gradients that are no numbers any more
        state = dataclasses.replace(state, params=state.params | {head: state.params[head] * 1e25})
        before = host(state)
        state, metrics = step(state, place(batch_of(2)), hyper)
        assert np.isfinite(metrics["loss"])
        assert metrics["grad_norm"] == np.inf
        assert_same_bits(host(state).params, before.params)
        assert_same_bits(host(state).opt_state, before.opt_state)


@pytest.mark.slow
def test_each_lane_skips_for_itself(tiny_config: DecoderConfig):
    """Steps in lock step (`run.together`): the lane beside a skipped one takes the step that it takes alone."""
    hyper = AdamW(learning_rate=0.01, warmup_steps=2).hyper(10)
    step = make_train_step(tiny_config, Compute(loss_chunk=4)).__wrapped__  # type: ignore[attr-defined]
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        state = jax.jit(init_state)(first_values(tiny_config), hyper)
        good, bad = batch_of(0), batch_of(0)
        bad["weights"][0, 0] = np.nan
        lanes = jax.tree.map(lambda x: np.stack([np.asarray(x)] * 3), state)
        batches = {name: np.stack([good[name], bad[name], good[name]]) for name in good}
        after, metrics = jax.jit(jax.vmap(step, in_axes=(0, 0, None)))(lanes, batches, hyper)
    assert metrics["skipped"].tolist() == [0, 1, 0]
    assert after.step.tolist() == [1, 1, 1]
    first, second, third = (jax.tree.map(lambda x, i=i: x[i], host(after)) for i in range(3))
    assert_same_bits(second.params, host(state).params)
    assert_same_bits(first, third)
    assert not np.array_equal(first.params["lm_head.weight"], second.params["lm_head.weight"])
