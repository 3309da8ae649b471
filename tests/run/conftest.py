"""Runs whose steps cost nothing."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from llama_jax.config import override
from llama_jax.run import RunConfig, training
from llama_jax.training import TrainState


@pytest.fixture
def loss_of(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Steps of no cost; losses, and validation losses (under -step), that are not 1 can be set."""
    values: dict[int, float] = {}
    now = [0]

    def train_step(state: TrainState, batch: Any, hyper: Any) -> Any:
        now[0] = int(state.step) + 1
        loss = np.float32(values.get(now[0], 1.0))
        metrics = {"loss": loss, "grad_norm": np.float32(1), "learning_rate": hyper.optimizer.learning_rate}
        return dataclasses.replace(state, step=state.step + 1), metrics

    def eval_step(*_: Any) -> tuple[np.float32, np.float32]:
        return np.float32(values.get(-now[0], 1.0)), np.float32(1)

    made = training.programs
    steps = {"train_step": train_step, "eval_step": eval_step}
    monkeypatch.setattr(training, "programs", lambda config: dataclasses.replace(made(config), **steps))
    monkeypatch.setattr(training, "checked", lambda *_: [])
    return values


@pytest.fixture
def quick(run_config: RunConfig) -> RunConfig:
    change = {"num_steps": 6, "checkpoint.every_steps": 4, "mesh.fsdp": 4, "mesh.tensor": 2}
    return override(run_config, change | {"logging.sample_prompts": ()})
