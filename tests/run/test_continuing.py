"""What may differ when a run is continued, what is said of it, and what a crash may leave behind.

Steps without arithmetic: each metric is a function of the step alone.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llama_jax import __main__ as command_line
from llama_jax.__main__ import main
from llama_jax.config import UserError, load_config_module, override
from llama_jax.nn import RMSNorm
from llama_jax.run import Run, RunConfig, RunFailed, open_run, resume, train, training
from llama_jax.training import TrainState

STEP_SECONDS = 0.04


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def test_what_learns_the_same_may_differ_and_is_told(
    begun: Path, quick: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The same texts and tokenizer at another place, another way to compute the same; all of it is said."""
    texts = Path(shutil.copytree(quick.data.path[0], tmp_path / "elsewhere"))
    changes = {"data.path": (f"{texts}/",), "optimizer.accumulation_steps": 2, "logging.every_steps": 2}
    train(override(quick, changes), begun)
    said = capsys.readouterr().out
    assert f"changed: data.path={quick.data.path[0]} -> {texts}/" in said
    assert "changed: optimizer.accumulation_steps=1 -> 2" in said
    assert "changed: logging.every_steps=1 -> 2" in said
    assert open_run(begun).config.data.path == (f"{texts}/",)


def test_tokenizer_and_init_from_may_be_written_otherwise(
    begun: Path, quick: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(begun / "tokenizer", tokenizer)
    config = override(quick, {"tokenizer.path": str(tokenizer)})
    run = train(config, tmp_path / "with_tokenizer")
    train(override(config, {"tokenizer.path": f"{tokenizer}/"}), run.directory)
    train(override(config, {"tokenizer.path": str(run.directory / "tokenizer")}), run.directory)
    init = override(config, {"init_from": str(begun)})
    run = train(init, tmp_path / "with_init")
    monkeypatch.chdir(tmp_path)
    train(override(init, {"init_from": "run/"}), run.directory)
    with pytest.raises(UserError, match=r"init_from='run/', not '.*with_tokenizer'"):
        train(override(init, {"init_from": str(tmp_path / "with_tokenizer")}), run.directory)


def test_all_that_must_not_differ_is_told_with_the_way_out(begun: Path, quick: RunConfig):
    before = files_of(begun)
    change = {"optimizer.learning_rate": 0.005, "optimizer.beta1": 0.8, "optimizer.accumulation_steps": 2}
    with pytest.raises(UserError) as told:
        train(override(quick, change), begun)
    assert "holds a run with optimizer.learning_rate=0.01, not 0.005; optimizer.beta1=0.9, not 0.8: " in str(told.value)
    assert "allow this with --resume.allow optimizer.learning_rate,optimizer.beta1," in str(told.value)
    with pytest.raises(UserError, match="run with seed=0, not 1: continue it unchanged, or give another --run-dir"):
        train(override(quick, change | {"seed": 1, "resume.allow": ("optimizer",)}), begun)
    assert files_of(begun) == before


def test_what_the_message_of_a_failed_run_advises_can_be_done(
    begun: Path, quick: RunConfig, loss_of: dict[int, float], capsys: pytest.CaptureFixture[str]
):
    allow = "optimizer,data.skip-batches"
    loss_of[5] = float("nan")
    sentence = (
        r"at step 5 is nan, the last update was that of step 4: lower .* add 4 to data.skip_batches.*--resume.allow"
    )
    with pytest.raises(RunFailed, match=sentence):
        train(override(quick, {"checks.max_skipped_steps": 1}), begun)
    loss_of.clear()
    change = {"optimizer.learning_rate": 0.005, "data.skip_batches": "4"}
    capsys.readouterr()
    run = train(override(quick, change | {"resume.allow": allow}), begun)
    assert "changed: optimizer.learning_rate=0.01 -> 0.005" in capsys.readouterr().out
    assert [line["learning_rate"] for line in run.metrics()] == pytest.approx([0.01] * 4 + [0.005] * 2)
    plain = Run(begun, override(quick, {"num_steps": 7}))
    assert all(
        np.array_equal(run.batch(step)["tokens"], plain.batch(step + (step >= 4))["tokens"]) for step in range(6)
    )
    with pytest.raises(UserError, match=r"changes what .* has learned before its checkpoint of step 6 \(batch 3\)"):
        train(override(quick, change | {"data.skip_batches": "3,4", "resume.allow": allow}), begun)


def test_skipped_steps_are_counted_and_the_run_goes_on(
    quick: RunConfig, loss_of: dict[int, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Two in a row are fewer than three, twice; the counts of lines cover the steps between them."""
    loss_of.update(dict.fromkeys((2, 3, 5), float("nan")) | {6: float("inf")})
    change = {"num_steps": 8, "logging.every_steps": 4, "checks.max_skipped_steps": 3}
    run = train(override(quick, change), tmp_path / "run")
    assert [(line["step"], line["skipped"]) for line in run.metrics()] == [(1, 0), (4, 2), (6, 2), (8, 0)]
    told = capsys.readouterr().out
    for step, loss in ((2, "nan"), (3, "nan"), (5, "nan"), (6, "inf")):
        line = (
            f"step {step}/8 is skipped, nothing is updated: batch {step - 1} has loss {loss} and a gradient of norm 1"
        )
        assert told.count(line) == 1


@pytest.mark.parametrize(("every", "advised"), [(4, "5,6,7"), (6, "6,7")])
def test_batches_that_the_message_names_can_be_left_out(
    quick: RunConfig, loss_of: dict[int, float], tmp_path: Path, every: int, advised: str
):
    """Also where a checkpoint was saved among the skipped steps."""
    loss_of.update(dict.fromkeys((6, 7, 8), float("nan")))
    config = override(quick, {"num_steps": 9, "checkpoint.every_steps": every, "checks.max_skipped_steps": 3})
    with pytest.raises(RunFailed, match=f"step 8 is nan, the last update was that of step 5: .* add {advised} to data"):
        train(config, tmp_path / "run")
    loss_of.clear()
    change = {"data.skip_batches": advised, "resume.allow": "data.skip_batches"}
    run = train(override(config, change), tmp_path / "run")
    assert run.metrics()[-1]["step"] == 9
    plain = Run(tmp_path / "run", override(config, {"num_steps": 12}))
    last = 8 + len(advised.split(","))
    assert np.array_equal(run.batch(8)["tokens"], plain.batch(last)["tokens"])


@pytest.mark.slow
def test_a_spike_stops_the_run_with_the_command_that_leaves_its_batches_out(
    quick: RunConfig, loss_of: dict[int, float], tmp_path: Path
):
    """A loss of 100 times the median; ordinary noise stops nothing. The skip is in the run's record."""
    noise = np.random.default_rng(0).normal(size=61)
    loss_of.update({step: float(2 + 0.05 * noise[step]) for step in range(1, 61)} | {51: 200.0})
    config = override(quick, {"num_steps": 60, "checks.spike_zscore": 8.0, "logging.every_steps": 20})
    with pytest.raises(RunFailed, match=r"the loss at step 51 is 200\.0000, \d{4} deviations above") as told:
        train(config, tmp_path / "run")
    loss_of[51] = 2.0
    command = str(told.value).split("`")[1]
    assert command.endswith("--data.skip-batches 49,50 --resume.allow data.skip_batches")
    assert command_line.main(command.split()[3:]) == 0
    run = open_run(tmp_path / "run")
    plain = Run(tmp_path / "run", config)
    assert [np.array_equal(run.batch(48 + i)["tokens"], plain.batch(48 + j)["tokens"]) for i, j in ((0, 0), (1, 3))]
    (entry,) = run.history
    assert (entry["step"], entry["changes"]["data.skip_batches"]) == (48, [[], [49, 50]])


def test_another_batch_size_goes_on_where_the_data_was(quick: RunConfig, loss_of: dict[int, float], tmp_path: Path):
    """Twice in one run: every sequence of the order is taken once, in the order of a run that never changed."""
    config = override(quick, {"data.skip_batches": (2, 5)})
    run_dir = train(override(config, {"num_steps": 3}), tmp_path / "run").directory
    for size, steps in ((16, 5), (4, 8)):
        changes = {"global_batch_size": size, "num_steps": steps}
        with pytest.raises(UserError, match=r"allow this with --resume.allow global_batch_size"):
            resume(run_dir, changes)
        resume(run_dir, changes | {"resume.allow": "global_batch_size"})
    run = open_run(run_dir)
    taken = [run.batch(step)["tokens"] for step in range(8)]
    assert [len(batch) for batch in taken] == [8, 8, 8, 16, 16, 4, 4, 4]
    plain = Run(run_dir, override(quick, {"global_batch_size": 4, "num_steps": 24}))
    plain.history = []
    order = np.concatenate([plain.batch(number)["tokens"] for number in range(24)])
    # Batches are counted as they come: of 8 until the change, then of 16.
    kept = [row for row in range(len(order)) if not (16 <= row < 24 or 48 <= row < 64)]
    assert np.array_equal(np.concatenate(taken), order[kept][: sum(map(len, taken))])
    assert [(entry["step"], entry["changes"]["global_batch_size"]) for entry in run.history] == [
        (3, [8, 16]),
        (5, [16, 4]),
    ]


def test_every_change_is_in_the_history_and_none_without_one(begun: Path, quick: RunConfig):
    train(quick, begun)
    assert not (begun / "run.json").exists()
    changes = {"optimizer.learning_rate": 0.005, "logging.every_steps": 2, "num_steps": 8}
    run = resume(begun, changes | {"resume.allow": "optimizer.learning_rate"})
    assert run.config == override(quick, changes | {"resume.allow": "optimizer.learning_rate"})
    (entry,) = json.loads((begun / "run.json").read_text())["history"]
    assert entry.pop("date")
    assert entry == {
        "step": 6,
        "changes": {"optimizer.learning_rate": [0.01, 0.005], "num_steps": [6, 8], "logging.every_steps": [1, 2]},
    }
    before = (begun / "run.json").read_bytes()
    resume(begun)
    assert (begun / "run.json").read_bytes() == before
    with pytest.raises(UserError, match=r"optimizer.learning_rate=0.005, not 0.001"):  # allowed once, not for ever
        resume(begun, {"optimizer.learning_rate": 0.001})
    for checkpoint in (begun / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)  # back to before the change, which holds from there on
    assert [e["step"] for e in resume(begun).history] == [0]


@pytest.mark.parametrize("changes", [{"optimizer": "Lion"}, {"optimizer": "Muon"}, {"model.hidden_size": 64}])
def test_what_the_checkpoint_has_no_arrays_for_is_refused_before_anything_is_written(
    begun: Path, changes: dict[str, Any]
):
    before = files_of(begun)
    with pytest.raises(UserError, match=r"the checkpoint of step 4 .* does not have the arrays of .* --init-from"):
        resume(begun, changes | {"resume.allow": "optimizer,model"})
    assert files_of(begun) == before


def test_a_path_in_a_run_continues_it(
    begun: Path, quick: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for place in ("/checkpoints/4", "/metrics.jsonl"):
        assert main(["train", f"{begun}{place}"]) == 0
        assert open_run(f"{begun}{place}").steps()[-1] == 6
        assert capsys.readouterr().out.splitlines()[0] == f"continuing '{begun}' from step 4"
        shutil.rmtree(begun / "checkpoints" / "6")
    monkeypatch.chdir(begun / "checkpoints")
    assert main(["train", ".", "--num-steps", "5"]) == 0
    assert "changed: num_steps=6 -> 5" in capsys.readouterr().out
    assert main(["train", "4"]) == 2
    assert f"'{begun}' continues from its latest checkpoint, of step 5, not from step 4" in capsys.readouterr().err
    assert main(["train", str(begun), "--optimizer.learning-rate", "1", "--seed", "1"]) == 2
    said = capsys.readouterr().err
    assert "optimizer.learning_rate=0.01, not 1.0; seed=0, not 1: continue it unchanged, or" in said
    assert "(seed cannot change; for the others there is --resume.allow optimizer.learning_rate)" in said
    assert said.count("\n") == 1
    assert main(["train", str(begun.parent)]) == 2
    assert "is not a run: give a config" in capsys.readouterr().err


@dataclasses.dataclass(frozen=True)
class OwnNorm(RMSNorm):
    """A norm that the package does not have."""


def test_classes_of_the_config_need_not_be_named_again(quick: RunConfig, loss_of: dict[int, float], tmp_path: Path):
    own = override(quick, {"model.norm": OwnNorm(1e-5)})
    train(own, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    assert train(own, tmp_path / "run").steps()[-1] == 6
    with pytest.raises(UserError, match=r"to train.py the config file that defines it"):
        resume(tmp_path / "run")


def test_a_report_that_fails_leaves_a_complete_run(
    begun: Path, quick: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "own.py"
    file.write_text(
        "from llama_jax.run import open_run\n"
        f"def get_config(): return open_run({str(begun)!r}).config\n"
        "def report(run): run.metrics()[-1]['nothing']\n"
    )
    with pytest.raises(KeyError) as found:
        main(["train", str(file), "--run-dir", str(begun)])
    assert found.value.__notes__ == [f"'{begun}' is complete: only the report of '{file}' has failed"]
    assert open_run(begun).steps()[-1] == 6


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"data.validation_fraction": 0.0}, {"logging.validation_batches": 1}, {}])
def test_the_demos_report_prints_what_was_measured(
    run_config: RunConfig, change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    change = {
        "num_steps": 1,
        "compute.preflight": False,
        "logging.sample_prompts": "",
        "model.max_positions": 32,
    } | change
    load_config_module("tiny_python").report(train(override(run_config, change), tmp_path / "run"))
    said = capsys.readouterr().out
    assert "accepted by ast.parse" in said
    assert ("held-out files" in said) == ("data.validation_fraction" not in change)
    assert ("not measured" in said) == ("logging.validation_batches" in change)
    assert ("no validation: data.validation_fraction=0.0" in said) == ("data.validation_fraction" in change)


def test_a_disk_with_too_little_room_is_told_before_the_first_step(
    begun: Path, quick: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(total=1 << 40, free=100_000))
    with pytest.raises(RunFailed, match=r"step 6 cannot be .* has 0.3 MB, and 0.1 MB are free\), the last good .* 4: "):
        train(quick, begun)
    assert "the disk has 0.0001 GB free, and a checkpoint may take 0.0003" in capsys.readouterr().out


def test_keys_that_are_none_cannot_be_allowed(quick: RunConfig, tmp_path: Path):
    with pytest.raises(UserError, match=r"resume.allow=optimizer.learning_rat is no key .*'optimizer.learning_rate'"):
        train(override(quick, {"resume.allow": ("optimizer.learning_rat",)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fewer_steps_than_are_done_change_nothing(begun: Path, quick: RunConfig, capsys: pytest.CaptureFixture[str]):
    before = files_of(begun)
    capsys.readouterr()
    run = train(override(quick, {"num_steps": 3}), begun)
    assert capsys.readouterr().out == f"'{begun}' is at step 4, past num_steps=3: nothing changed\n"
    assert run.config == quick
    assert files_of(begun) == before
    with pytest.raises(UserError, match="seed=0, not 1"):
        train(override(quick, {"num_steps": 3, "seed": 1}), begun)


def test_another_length_tells_what_becomes_of_the_learning_rate(
    begun: Path, quick: RunConfig, capsys: pytest.CaptureFixture[str]
):
    train(quick, begun)
    capsys.readouterr()
    train(override(quick, {"num_steps": 20, "checkpoint.every_steps": 20}), begun)
    said = capsys.readouterr().out
    assert "changed: num_steps=6 -> 20" in said
    assert "learning rate at step 6: 0.001 -> 0.00933, because num_steps=6 -> 20; it ends at 0.00108" in said
    assert [entry["changes"]["num_steps"] for entry in open_run(begun).history] == [[6, 20]]


def test_what_does_nothing_is_told_at_the_start(
    quick: RunConfig, loss_of: dict[int, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train(quick, tmp_path / "plain")
    said = capsys.readouterr().out
    assert not any(word in said for word in ("changed", "warmup_steps", "profile", "do not meet", "MFU:"))
    change = {"optimizer.warmup_steps": 600, "profile.start_step": 6, "logging.validate_every_steps": 5}
    train(override(quick, change), tmp_path / "run")
    said = capsys.readouterr().out
    assert "optimizer.warmup_steps=600 is longer than num_steps=6: the learning rate ends at 1.0% of its peak" in said
    assert "profile records nothing: steps 6 to 9 are not among those from 0 to 6" in said
    assert (
        "keep_best keeps none but the last: checkpoints (every 4 steps) and validations (every 5) do not meet" in said
    )


def test_a_window_that_began_before_is_recorded_from_where_the_run_continues(
    begun: Path, quick: RunConfig, monkeypatch: pytest.MonkeyPatch
):
    @contextlib.contextmanager
    def trace(directory: str, **_: Any) -> Iterator[None]:
        recorded.append(directory)
        yield

    recorded: list[str] = []
    monkeypatch.setattr(jax.profiler, "trace", trace)
    train(override(quick, {"profile.start_step": 3, "profile.num_steps": 2}), begun)
    assert recorded == [str(begun / "profile")]


@pytest.mark.quick("1-4-losses1-kept1", "20-5-losses3-kept3")
@pytest.mark.parametrize(
    ("every", "validate", "losses", "kept"),
    [
        (4, 3, {3: 0.1}, [3, 12, 14]),  # measured between two checkpoints
        (1, 4, {4: 0.1}, [4, 13, 14]),  # checkpoints that were not measured
        (3, 3, {3: float("nan"), 6: 0.3}, [6, 12, 14]),
        (20, 5, {5: 0.1}, [14]),  # told at the start
        (4, 5, {5: 0.1}, [12, 14]),
    ],
)
def test_the_best_that_was_measured_stays(
    quick: RunConfig,
    loss_of: dict[int, float],
    tmp_path: Path,
    every: int,
    validate: int,
    losses: dict[int, float],
    kept: list[int],
):
    """Whatever the two periods, if they meet, and with a continuation in between."""
    loss_of.update({-step: loss for step, loss in losses.items()})
    change = {"checkpoint.every_steps": every, "logging.validate_every_steps": validate, "num_steps": 14}
    run = train(override(quick, change), tmp_path / "run")
    assert run.steps() == kept
    shutil.rmtree(run.directory / "checkpoints" / "14")
    assert train(override(quick, change), run.directory).steps() == kept


@pytest.mark.parametrize(
    ("damage", "left", "dropped"),
    [
        (lambda lines: b"".join(lines) + b"\0" * 300 + b"\n", 6, 1),
        (lambda lines: b"".join(lines[:2]) + lines[2][:20] + b"".join(lines[3:]), 4, 1),
        (lambda lines: b"".join(lines[:2]) + b"\0" * 9 + b"".join(lines[2:]), 6, 0),
        (lambda lines: b"\xff\xfe\n[1]\n{}\nnull\n\n" + b"".join(lines), 6, 5),
        (lambda lines: b"".join(lines)[:-1], 5, 0),
    ],
    ids=["zeros", "cut within", "zeros before", "no objects", "cut at the end"],
)
def test_damaged_lines_of_metrics_stop_nothing(
    begun: Path, quick: RunConfig, damage: Callable, left: int, dropped: int, capsys: pytest.CaptureFixture[str]
):
    file = begun / "metrics.jsonl"
    file.write_bytes(damage(file.read_bytes().splitlines(keepends=True)))
    assert len(open_run(begun).metrics()) == left
    capsys.readouterr()
    run = train(quick, begun)
    assert (f"{dropped} damaged lines of 'metrics.jsonl' are dropped" in capsys.readouterr().out) == (dropped > 0)
    steps = [json.loads(line)["step"] for line in file.read_text().splitlines()]
    assert steps == sorted(set(steps)) == [line["step"] for line in run.metrics()]
    assert steps[-2:] == [5, 6]


def test_metrics_are_strict_json_where_a_loss_is_no_number(quick: RunConfig, loss_of: dict[int, float], tmp_path: Path):
    loss_of.update({3: float("inf"), -2: float("nan")})
    with pytest.raises(RunFailed, match="the loss at step 3 is inf"):
        train(override(quick, {"logging.validate_every_steps": 2, "checks.max_skipped_steps": 1}), tmp_path / "run")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert [line["loss"] for line in lines] == [1.0, 1.0, None]
    assert lines[1]["val_loss"] is None
    (tmp_path / "run" / "metrics.jsonl").write_text(text.replace("null", "NaN"))  # as runs before wrote it
    assert open_run(tmp_path / "run").metrics() == lines
    loss_of.clear()
    assert [line["loss"] for line in train(quick, tmp_path / "run").metrics()] == [1.0] * 6


def test_no_interval_is_faster_than_its_steps(run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Steps that are computed within the call, as small ones are: none of them is counted in another's interval."""

    def train_step(state: TrainState, batch: Any, hyper: Any) -> Any:
        time.sleep(STEP_SECONDS)
        value = jax.block_until_ready(1 / (1 + state.step))
        metrics = dict.fromkeys(("loss", "grad_norm", "learning_rate"), value)
        return dataclasses.replace(state, step=state.step + 1), metrics

    made = training.programs
    monkeypatch.setattr(training, "programs", lambda config: dataclasses.replace(made(config), train_step=train_step))
    monkeypatch.setattr(training, "checked", lambda *_: [])
    change = {"logging.sample_prompts": (), "logging.validate_every_steps": 5, "num_steps": 11}
    change |= {"logging.every_steps": 3, "checkpoint.every_steps": 7, "checkpoint.keep_best": 0}
    run = train(override(run_config, change), tmp_path / "run")
    speeds = {line["step"]: line.get("tokens_per_second") for line in run.metrics()}
    assert list(speeds) == [1, 3, 5, 6, 9, 10, 11]
    tokens = run_config.global_batch_size * run_config.sequence_length
    assert speeds.pop(1) is None
    for step, speed in speeds.items():
        assert speed is not None
        assert speed <= 1.02 * tokens / STEP_SECONDS, step


@pytest.mark.slow
def test_repeated_trainings_and_loads_hold_nothing(quick: RunConfig, loss_of: dict[int, float], tmp_path: Path):
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("counts what Linux lists under /proc")
    counts = []
    for times in (2, 20):
        for _ in range(times):
            train(quick, tmp_path / "run")
            run = open_run(tmp_path / "run")
            run.load(), run.steps(), run.batch(0), run.metrics()
            shutil.rmtree(tmp_path / "run" / "checkpoints" / "6", ignore_errors=True)
        counts.append(held())
    assert all(after <= before + 10 for before, after in zip(*counts, strict=True)), counts
