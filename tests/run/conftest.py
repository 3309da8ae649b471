"""Runs whose steps cost nothing."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_jax.config import override
from llama_jax.run import RunConfig, train, training
from llama_jax.training import TrainState


def without_cost(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
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
def loss_of(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Steps of no cost; losses, and validation losses (under -step), that are not 1 can be set."""
    return without_cost(monkeypatch)


@pytest.fixture(scope="module")
def quick(run_config: RunConfig) -> RunConfig:
    change = {"num_steps": 6, "checkpoint.every_steps": 4, "mesh.fsdp": 4, "mesh.tensor": 2}
    return override(run_config, change | {"logging.sample_prompts": ()})


@pytest.fixture(scope="module")
def begun_once(quick: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that is at its fourth. Only to be read."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_cost(monkeypatch)
        run = train(quick, tmp_path_factory.mktemp("begun") / "run")
    shutil.rmtree(run.directory / "checkpoints" / "6")
    return run.directory


@pytest.fixture
def begun(begun_once: Path, loss_of: dict[int, float], tmp_path: Path) -> Path:
    """A copy of it, which goes on with steps of no cost."""
    return Path(shutil.copytree(begun_once, tmp_path / "run"))
