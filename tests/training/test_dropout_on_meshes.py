"""A train step that drops numbers everywhere computes the same on every mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from llama_jax.config import override
from llama_jax.models import Compute, DecoderConfig, ModelConfig, abstract_params, frozen
from llama_jax.nn import MLP, Experts, LoRA, SwitchRouter
from llama_jax.parallel import make_mesh
from llama_jax.run.training import to_devices
from llama_jax.training import SGD, Constant, init_state, make_train_step
from llama_jax.zoo.bert import encoder

ROWS, LENGTH, RATE = 8, 16, 0.3
# Updates are the gradient, so many times that adding them to parameters rounds nothing away.
SCALE = 1e3
OPTIMIZER = SGD(SCALE, 0, momentum=0.0, weight_decay=0.0, clip_norm=1e9, schedule=Constant())


def batch() -> dict[str, np.ndarray]:
    """Rows of two documents, with different numbers of targets."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 40, (ROWS, LENGTH + 1), dtype=np.int32)
    columns, starts = np.arange(LENGTH), rng.integers(1, LENGTH, (ROWS, 1))
    second = columns >= starts
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": (rng.random((ROWS, LENGTH)) < np.linspace(0.2, 1, ROWS)[:, None]).astype(np.float32),
        "segment_ids": (1 + second).astype(np.int32),
        "positions": np.where(second, columns - starts, columns).astype(np.int32),
    }


def model(kind: str, base: DecoderConfig) -> ModelConfig:
    """Return a model that draws for embeddings, attention weights, feed-forwards, routers or adapters."""
    if kind == "encoder":
        sizes: dict[str, Any] = {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 24,
        }
        return encoder(**sizes, max_positions=LENGTH, eps=1e-12, dropout=RATE, attention_dropout=RATE)
    attention = override(base.attention, {"dropout": RATE})
    mlp = MLP(24, "gelu", bias=True, dropout=RATE)
    if kind == "decoder":
        return dataclasses.replace(base, attention=attention, feed_forward=mlp, dropout=RATE)
    if kind == "adapters":
        return dataclasses.replace(base, adapters=LoRA(rank=2, alpha=2.0, targets=("all-linear",), dropout=RATE))
    experts = Experts(4, 8, SwitchRouter(jitter=0.3), "silu", gated=True, load_balance_loss=0.1)
    return dataclasses.replace(base, feed_forward=experts, dropout=RATE)


def step(
    config: ModelConfig, values: dict[str, jax.Array], mesh: dict[str, int], *, parts: int, context: Any, seed: int
) -> dict[str, np.ndarray]:
    """Return the metrics and, by parameter, the gradient of one step on a mesh; {} is one device."""
    hyper = OPTIMIZER.hyper(10, seed)
    with jax.set_mesh(make_mesh(mesh, jax.devices()[: 8 if mesh else 1])):
        before = {name: np.asarray(value) for name, value in values.items()}
        placed = {name: jax.device_put(before[name], a.sharding) for name, a in abstract_params(config).items()}
        state = jax.jit(init_state, static_argnums=2)(placed, hyper, frozen(config))
        compute = Compute(loss_chunk=4, context=context)
        train_step = make_train_step(config, compute, accumulation_steps=parts)
        after, metrics = train_step(state, to_devices(batch(), range(ROWS), ROWS), hyper)
        moved = {name: (before[name] - np.asarray(value)) / SCALE for name, value in after.params.items()}
        return moved | {name: np.asarray(value) for name, value in metrics.items()}


MESHES = {
    "ring": {"context": 4, "tensor": 2},
    "all_gather": {"data": 2, "context": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "encoder", "adapters", "experts"])
def test_a_step_with_dropout_is_that_of_one_device(
    kind: str, two_layers: DecoderConfig, random_params: Callable[[ModelConfig], dict[str, jax.Array]]
):
    config, parts = model(kind, two_layers), 2 if kind == "decoder" else 1
    run = functools.partial(step, config, random_params(config), parts=parts)
    expected, other = (run({}, context="ring", seed=seed) for seed in (0, 1))
    assert abs(other["loss"] - expected["loss"]) > 1e-3, "numbers are drawn"
    for context, mesh in MESHES.items():
        found = run(mesh, context=context, seed=0)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            limit = 1e-5 * np.abs(value).max() + 1e-7  # a bias of keys moves no softmax: its gradient is rounding
            np.testing.assert_allclose(found[name], value, rtol=0, atol=limit, err_msg=f"{name} on {mesh}")
