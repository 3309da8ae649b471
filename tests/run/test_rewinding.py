"""A run that goes back by itself is the run that is continued by hand, to the last bit."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llama_jax.__main__ import main
from llama_jax.checkpoint import CheckpointStore
from llama_jax.config import UserError, override
from llama_jax.models import abstract_params
from llama_jax.run import Preempted, Run, RunConfig, RunFailed, open_run, skipped, train, training
from llama_jax.training import TrainState, init_state

NUM_STEPS, BEFORE = 10, 3
VALUES = ("loss", "grad_norm", "learning_rate", "val_loss", "skipped")


@pytest.fixture
def real(run_config: RunConfig) -> RunConfig:
    change = {"num_steps": NUM_STEPS, "checkpoint.every_steps": 4, "checkpoint.keep_last": 9, "global_batch_size": 8}
    return override(run_config, change | {"logging.sample_prompts": (), "checks.spike_zscore": 30.0})


@pytest.fixture
def bad(finished_run: Run, real: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let batches have another loss wherever they come: bad(loss, numbers)."""
    monkeypatch.setattr(skipped, "LEAST", BEFORE)
    values: dict[bytes, float] = {}
    made = training.programs

    def programs(config: RunConfig) -> Any:
        found = made(config)

        def train_step(state: TrainState, batch: Any, hyper: Any) -> Any:
            tokens = np.asarray(batch["tokens"]).tobytes()
            state, metrics = found.train_step(state, batch, hyper)
            return state, metrics | ({"loss": np.float32(values[tokens])} if tokens in values else {})

        return dataclasses.replace(found, train_step=train_step)

    def bad(loss: float, numbers: Iterable[int]) -> None:
        plain = Run(finished_run.directory, real)
        for number in numbers:
            values[plain.batch(number)["tokens"].tobytes()] = loss

    monkeypatch.setattr(training, "programs", programs)
    return bad


def states(run: Run) -> dict[int, list[bytes]]:
    """Return the bytes of every checkpoint's arrays."""
    abstract = jax.eval_shape(init_state, abstract_params(run.config.model), run.config.optimizer.hyper(NUM_STEPS))
    store = CheckpointStore(run.directory / "checkpoints")
    return {
        step: [np.asarray(x).tobytes() for x in jax.tree.leaves(store.load(step, abstract))] for step in run.steps()
    }


def lines(run: Run) -> list[dict[str, Any]]:
    return [{name: line[name] for name in ("step", *VALUES) if name in line} for line in run.metrics()]


@pytest.mark.parametrize(
    ("loss", "numbers", "back_to", "left_out"),
    [
        (200.0, (5,), 4, [4, 5]),
        pytest.param(200.0, (3,), 0, [2, 3], marks=pytest.mark.slow),  # before the first checkpoint
        pytest.param(200.0, (8,), 8, [8], marks=pytest.mark.slow),  # the batch before it is in the checkpoint
        pytest.param(float("nan"), (5, 6), 4, [5, 6], marks=pytest.mark.slow),
    ],
)
def test_a_run_that_rewinds_is_the_run_continued_by_hand(
    loss: float,
    numbers: tuple[int, ...],
    back_to: int,
    left_out: list[int],
    real: RunConfig,
    bad: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """And the run that leaves the batches out from its first step."""
    bad(loss, numbers)
    config = override(real, {"checks.max_skipped_steps": len(numbers)})
    with pytest.raises(RunFailed):
        train(config, tmp_path / "by_hand")
    text = ",".join(map(str, left_out))
    words = ["train", str(tmp_path / "by_hand"), "--data.skip-batches", text, "--resume.allow", "data.skip_batches"]
    assert main(words) == 0
    capsys.readouterr()
    own = train(override(config, {"checks.max_rewinds": 1}), tmp_path / "own")
    (told,) = [line for line in capsys.readouterr().out.splitlines() if ": rewind 1 of 1" in line]
    assert told.startswith(f"the loss at step {numbers[-1] + 1} is {loss:.4f}")
    assert told.endswith(f"rewind 1 of 1, without batches {text}")
    whole = train(override(config, {"data.skip_batches": left_out}), tmp_path / "whole")

    by_hand = open_run(tmp_path / "by_hand")
    assert lines(own) == lines(by_hand) == lines(whole)
    assert [line["step"] for line in lines(own)] == [*range(1, NUM_STEPS + 1)]
    assert states(own) == states(by_hand) == states(whole)
    assert list(states(own)) == [4, 8, 10]
    found = [json.loads((run.directory / "run.json").read_text())["history"] for run in (own, by_hand)]
    assert [[{**entry, "date": None} for entry in history] for history in found] == [
        [{"step": back_to, "date": None, "changes": {"data.skip_batches": [[], left_out]}}]
    ] * 2
    assert open_run(own.directory).config == override(by_hand.config, {"checks.max_rewinds": 1})


@pytest.fixture
def spiked(quick: RunConfig, loss_of: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run of steps without arithmetic, whose loss jumps at step 6 and again at step 11."""
    monkeypatch.setattr(skipped, "LEAST", BEFORE)
    loss_of.update({6: 200.0, 11: 300.0})
    return override(quick, {"num_steps": 14, "checks.spike_zscore": 8.0, "checks.max_rewinds": 2})


def test_above_the_limit_the_run_stops(spiked: RunConfig, loss_of: dict[int, float], tmp_path: Path):
    loss_of[12] = loss_of.pop(11)
    with pytest.raises(RunFailed, match=r"step 12 is 300.* --data.skip-batches 4,5,12,13 --resume.allow data.skip"):
        train(override(spiked, {"checks.max_rewinds": 1}), tmp_path / "run")
    assert open_run(tmp_path / "run").config.data.skip_batches == (4, 5)
    # As with all that is in the run's history, it does not matter where the run was started again.
    with pytest.raises(RunFailed, match="step 12 is 300"):
        train(override(spiked, {"checks.max_rewinds": 1}), tmp_path / "run")


def test_the_command_that_began_a_run_continues_it(
    spiked: RunConfig, loss_of: dict[int, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = train(spiked, tmp_path / "run")
    assert [(entry["step"], *entry["changes"]["data.skip_batches"]) for entry in run.history] == [
        (4, [], [4, 5]),
        (8, [4, 5], [4, 5, 11, 12]),
    ]
    assert [line["step"] for line in run.metrics()] == [*range(1, 15)]
    shutil.rmtree(run.directory / "checkpoints" / "14")
    capsys.readouterr()
    again = train(spiked, run.directory)
    assert "changed:" not in capsys.readouterr().out
    assert again.history == run.history
    assert again.config.data.skip_batches == (4, 5, 11, 12)
    for change in ({"checks.max_rewinds": 0}, {"data.skip_batches": (4, 5, 13)}):
        with pytest.raises(
            UserError, match=r"data.skip_batches=\(4, 5, 11, 12\), not .* --resume.allow data.skip_batches"
        ):
            train(override(spiked, change), run.directory)


def test_the_state_that_is_given_up_is_not_kept(spiked: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Or a model that fills its devices could not go back."""
    sizes: list[int] = []
    original = training.Loop._state

    def state(self: Any) -> Any:
        sizes.append(sum(array.nbytes for array in jax.live_arrays()))
        return original(self)

    monkeypatch.setattr(training.Loop, "_state", state)
    train(spiked, tmp_path / "run")
    assert len(sizes) == 3
    assert max(sizes) < min(sizes) + 1000  # a model has 100 times as much


def test_a_signal_is_not_lost_in_a_rewind(spiked: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original = training.rewinding

    def signalled(run: Run, first: Any, again: Any) -> Run:
        return original(run, first, lambda run: os.kill(os.getpid(), signal.SIGTERM) or again(run))

    monkeypatch.setattr(training, "rewinding", signalled)
    with pytest.raises(Preempted, match="stopped at step 5 with a checkpoint saved"):
        train(spiked, tmp_path / "run")
    assert open_run(tmp_path / "run").steps()[-1] == 5


def test_rewinds_cannot_be_negative(quick: RunConfig):
    with pytest.raises(UserError, match="max_rewinds=-1 must be at least 0"):
        override(quick, {"checks.max_rewinds": -1})
