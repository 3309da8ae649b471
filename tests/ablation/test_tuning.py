"""The search for a variant's values: it finds a known best, costs what it says, and goes on where it was stopped."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import llama_jax
from llama_jax import UserError
from llama_jax.ablation import read_sweep
from llama_jax.ablation.tuning import SEED, TUNE_FILE, Tuning, check_tune
from llama_jax.config import override
from llama_jax.run import RunConfig

RATE = "optimizer.learning_rate"
type Candidates = Mapping[Path, Mapping[str, Any]]


@pytest.fixture
def config(sweep_base: RunConfig) -> RunConfig:
    return override(sweep_base, {"num_steps": 64})


def loss_of(changes: Mapping[str, Any], until: int, best: float) -> float:
    """A loss that is lowest at the rate `best`, and falls with the steps."""
    return (math.log(changes[RATE]) - math.log(best)) ** 2 + 1 / until


@pytest.mark.parametrize("best", [1e-4, 1.3e-3, 0.02, 0.5])
def test_the_known_best_is_found(config: RunConfig, tmp_path: Path, best: float):
    tuning = Tuning(tmp_path, config, {RATE: (1e-4, 0.1)})
    steps: dict[Path, int] = {}

    def trials(candidates: Candidates, until: int) -> list[float | None]:
        steps.update(dict.fromkeys(candidates, until))
        return [loss_of(changes, until, best) for changes in candidates.values()]

    found = tuning.search(trials)
    nearest = min(tuning.candidates, key=lambda values: abs(math.log(values[0] / best)))
    assert found["value"] == nearest[0]
    assert tuning.total_steps == sum(steps.values()) == 4 * 8 + 2 * 16 + 2 * 64
    assert found["tokens"] == tuning.total_steps * 8 * 32
    assert [len([t for t in found["trials"] if t[1] == until]) for until in (8, 16, 64)] == [8, 4, 2]
    assert (tuning.warning(found) is None) == (best in (1.3e-3, 0.02))


def test_a_search_that_was_stopped_goes_on(config: RunConfig, tmp_path: Path):
    tuning, asked = Tuning(tmp_path, config, {RATE: (1e-4, 0.1)}), list[int]()

    def trials(candidates: Candidates, until: int) -> list[float | None]:
        asked.append(until)
        if asked == [8, 16]:
            raise KeyboardInterrupt
        return [loss_of(changes, until, 1e-3) for changes in candidates.values()]

    with pytest.raises(KeyboardInterrupt):
        tuning.search(trials)
    found = tuning.search(trials)
    assert asked == [8, 16, 16, 64]
    again = Tuning(tmp_path / "new", config, {RATE: (1e-4, 0.1)}).search(trials)
    assert {k: v for k, v in found.items() if k != "seconds"} == {k: v for k, v in again.items() if k != "seconds"}


def test_several_keys_and_lists(config: RunConfig, tmp_path: Path):
    tuning = Tuning(tmp_path, config, {RATE: (1e-3, 1e-1), "optimizer.warmup_steps": [0, 4, 8]})
    assert len(tuning.candidates) == 4 * 3
    found = tuning.search(lambda c, until: [loss_of(v, until, 0.1) + v["optimizer.warmup_steps"] for v in c.values()])
    assert found["key"] == "optimizer.learning_rate,optimizer.warmup_steps"
    assert tuning.changes(found["value"]) == {RATE: 0.1, "optimizer.warmup_steps": 0}
    failing = Tuning(tmp_path / "f", config, {RATE: [1.0, 2.0]}).search(lambda c, until: [None for _ in c])
    assert failing["value"] is None


@pytest.mark.parametrize(
    ("tune", "sentence"),
    [
        ({RATE: (0.1, 0.01)}, r"give \(low, high\) with 0 < low < high, or a list of values"),
        ({RATE: []}, "or a list of values"),
        ({"optimizer.rate": (1, 2)}, "unknown key 'optimizer.rate'"),
        ({"model.attention": (1, 2)}, "is not of type Mixer|which is no number"),
        (RATE, r"must be \{key: \(low, high\)\}"),
    ],
)
def test_refused(config: RunConfig, tune: Any, sentence: str):
    with pytest.raises(UserError, match=sentence):
        check_tune(config, tune)


@pytest.mark.slow
def test_each_variant_is_trained_with_its_own_value(sweep_base: RunConfig, tmp_path: Path):
    variants = {"base": {}, "SGD": {"optimizer": "SGD"}}
    options: dict[str, Any] = {"seeds": 1, "tune": {RATE: [1e-2, 1e30, 1e-3]}, "run_dir": tmp_path, "quiet": True}
    llama_jax.ablate(sweep_base, variants, **options)
    found = read_sweep(tmp_path)
    for variant, trial in zip(found.variants, found.trials, strict=True):
        assert variant.tuned is not None
        assert trial.config["optimizer"]["learning_rate"] == variant.tuned["value"]
        assert trial.config["seed"] == 0
        assert variant.tuned["seconds"] > 0
        losses = {value: loss for value, steps, loss in variant.tuned["trials"] if steps == 4}
        assert losses[variant.tuned["value"]] == min(loss for loss in losses.values() if loss is not None)
        (metrics,) = (tmp_path / "tune" / variant.name).glob(f"{variant.tuned['value']}/metrics.jsonl")
        assert json.loads(metrics.read_text().splitlines()[-1])["val_loss"] == losses[variant.tuned["value"]]
        assert json.loads((metrics.parent / "config.json").read_text())["seed"] == SEED
        assert (tmp_path / "tune" / variant.name / TUNE_FILE).is_file()
