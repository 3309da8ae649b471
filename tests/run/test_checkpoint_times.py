"""Checkpoints by time and kept ones, with a clock that moves a minute in every step."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_jax.config import UserError, override
from llama_jax.run import RunConfig, train, training


@pytest.fixture
def minutes(loss_of: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time in minutes, by step; a list of one number that may be set."""
    now = [0.0]
    programs = training.programs

    def stepping(config: RunConfig) -> Any:
        made = programs(config)

        def train_step(*args: Any) -> Any:
            now[0] += 1
            return made.train_step(*args)

        return dataclasses.replace(made, train_step=train_step)

    monkeypatch.setattr(training, "programs", stepping)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: 60 * now[0]))  # other threads keep theirs
    return now


@pytest.mark.quick("changes1-steps1")
@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"every_minutes": 3.5}, [4, 8, 12, 14]),
        ({"every_minutes": 5.0, "every_steps": 3}, [3, 6, 9, 12, 14]),  # every save starts the clock again
        ({"every_minutes": 4.0, "every_steps": 7}, [4, 7, 11, 14]),
        ({"every_minutes": 4.0, "keep_every_steps": 6}, [4, 6, 10, 12, 14]),
    ],
)
def test_times_of_checkpoints(
    quick: RunConfig, minutes: list[float], tmp_path: Path, changes: dict[str, Any], steps: list[int]
):
    base = {"every_steps": None, "keep_last": 99, "keep_best": 0}
    config = override(quick, {f"checkpoint.{name}": value for name, value in (base | changes).items()})
    assert train(dataclasses.replace(config, num_steps=14), tmp_path / "run").steps() == steps


@pytest.mark.slow
def test_kept_ones_stay(quick: RunConfig, minutes: list[float], loss_of: dict[int, float], tmp_path: Path):
    """Beside the last and the best, also where the run is continued."""
    loss_of.update({-3: 0.1})
    change = {"every_steps": 1, "keep_last": 2, "keep_best": 1, "keep_every_steps": 5}
    config = override(quick, {f"checkpoint.{name}": value for name, value in change.items()})
    config = override(config, {"num_steps": 14, "logging.validate_every_steps": 3})
    run = train(config, tmp_path / "run")
    assert run.steps() == [3, 5, 10, 13, 14]
    shutil.rmtree(run.directory / "checkpoints" / "14")
    assert train(config, run.directory).steps() == [3, 5, 10, 13, 14]


@pytest.mark.slow
def test_a_checkpoint_by_time_continues_the_same_run(
    run_config: RunConfig, finished_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    change = {"checkpoint.every_steps": None, "checkpoint.every_minutes": 1e-9, "checkpoint.keep_last": 99}
    config = override(run_config, change | {"logging.sample_prompts": ()})
    run = train(config, tmp_path / "run")
    for step in run.steps()[5:]:
        shutil.rmtree(run.directory / "checkpoints" / str(step))
    lines = [[line["loss"], line["grad_norm"]] for line in train(config, run.directory).metrics()]
    assert lines == [[line["loss"], line["grad_norm"]] for line in finished_run.metrics()]


@pytest.mark.parametrize("change", ["every_minutes=0.0", "every_minutes=-1.0", "keep_every_steps=0"])
def test_impossible_times(quick: RunConfig, change: str):
    name, _, value = change.partition("=")
    with pytest.raises(UserError, match=rf"checkpoint\.{change} must be"):
        override(quick, {f"checkpoint.{name}": value})
