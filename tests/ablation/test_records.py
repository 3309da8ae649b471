"""The files of a sweep, read back: also of one that goes on, was killed or has failed runs."""

import json
from pathlib import Path

import pytest

from llama_jax.ablation import VariantRecord, read_sweep
from llama_jax.ablation.records import trial_directory
from llama_jax.config import UserError
from tests.ablation.made import curve, write_run, write_sweep
from tests.tiny_run import get_config

VARIANTS = (
    VariantRecord("base", num_parameters=1000, failures={"2": "the loss at step 3 is nan"}),
    VariantRecord("num_kv_heads=1", {"model.attention.num_kv_heads": 1}, matched={"key": "a", "value": 3}),
)


def test_what_was_written_is_read(tmp_path: Path):
    sweep = read_sweep(write_sweep(tmp_path / "sweep", VARIANTS, lambda place, seed: 2 + place + seed / 10))
    assert (sweep.metric, sweep.baseline, sweep.seeds, sweep.variants) == ("val_loss", "base", (0, 1, 2), VARIANTS)
    assert [(trial.variant, trial.seed) for trial in sweep.trials[2:4]] == [("base", 2), ("num_kv_heads=1", 0)]
    assert sweep.trials_of("num_kv_heads=1")[1].final("val_loss") == pytest.approx(3.1)
    assert [trial.state for trial in sweep.trials] == ["done", "done", "failed", "done", "done", "done"]
    assert sweep.trials[2].final("val_loss") is None


def test_a_sweep_that_was_killed_has_what_is_there(tmp_path: Path):
    folder = write_sweep(tmp_path / "sweep", VARIANTS, lambda place, seed: 2.0)
    place = trial_directory(folder, VARIANTS[1], 0)
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve(2.0)[:7]))
    write_run(trial_directory(folder, VARIANTS[1], 1), get_config(), [{"step": 1, "loss": None}])
    (trial_directory(folder, VARIANTS[1], 2) / "metrics.jsonl").unlink()
    trials = read_sweep(folder / "sweep.json").trials_of("num_kv_heads=1")
    assert [(trial.state, trial.step) for trial in trials] == [("running", 7), ("failed", 1), ("waiting", 0)]


@pytest.mark.parametrize(
    "names", [("a/b", "a b"), ("norm=LayerNorm", "norm=layer norm"), ("\u6ce8", "\u610f"), ("..", ".")]
)
def test_directories_are_distinct_and_inside(tmp_path: Path, names: tuple[str, str]):
    places = {trial_directory(tmp_path, VariantRecord(name), 0) for name in names}
    assert len(places) == 2
    assert all(place.resolve().parent.parent == tmp_path.resolve() for place in places)


@pytest.mark.parametrize(("contents", "expected"), [(None, "has no sweep.json"), ("[]", "is not of a sweep")])
def test_what_is_not_a_sweep_is_refused(tmp_path: Path, contents: str | None, expected: str):
    if contents is not None:
        (tmp_path / "sweep.json").write_text(contents)
    with pytest.raises(UserError, match=expected):
        read_sweep(tmp_path)
