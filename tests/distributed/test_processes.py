"""Real processes on this machine, each with devices of its own, train as one process does."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_jax.checkpoint import CheckpointStore, to_disk
from llama_jax.config import override
from llama_jax.run import Run, RunConfig, open_run, train
from llama_jax.run.training import Loop

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TIMEOUT = 600  # seconds; a machine that is shared may take long


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Processes:
    """`train` started as `count` processes with `devices` each, watched into `folder` (see driver.py)."""

    def __init__(
        self, count: int, devices: int, folder: Path, config: RunConfig, moment: str = "never", **options: Any
    ):
        self.folder = folder / f"watched_{moment}"
        self.folder.mkdir(parents=True)
        values = {
            "data.path": config.data.path[0],
            "data.cache_dir": config.data.cache_dir,
            "data.packing": config.data.packing,
            "num_steps": config.num_steps,
            "logging.sample_prompts": "",
            "compute.preflight": "false",
            "run-dir": folder / "run",
            "coordinator-address": f"127.0.0.1:{free_port()}",
            "num-processes": count,
        } | {name.replace("__", "."): value for name, value in options.items()}
        # Compiling takes longer than these steps do.
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        self.all = [
            subprocess.Popen(
                [sys.executable, HERE / "driver.py", self.folder, moment, ROOT / "tests" / "tiny_run.py"]
                + [f"--{key}={value}" for key, value in (values | {"process-id": i}).items()],
                env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(count)
        ]

    def end(self) -> tuple[list[int], list[str], list[str]]:
        """Exit codes, and what each has printed on stdout and stderr."""
        try:
            told = [process.communicate(timeout=TIMEOUT) for process in self.all]
        finally:
            for process in self.all:
                process.kill()
        codes = [process.returncode for process in self.all]
        return codes, [out for out, _ in told], [error for _, error in told]

    def watched(self, name: str) -> dict[str, np.ndarray]:
        return dict(np.load(self.folder / f"{name}.npz"))


@pytest.fixture(scope="module")
def config(run_config: RunConfig) -> RunConfig:
    """Six steps of rows that are planned, measured at the end."""
    return override(run_config, {"num_steps": 6, "logging.sample_prompts": (), "data.packing": "best_fit"})


@pytest.fixture(scope="module")
def reference(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run by one process with eight devices, never stopped."""
    return train(config, tmp_path_factory.mktemp("reference") / "run")


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def losses(run: Run) -> list[list[float]]:
    return [[m[name] for name in ("loss", "grad_norm", "val_loss") if name in m] for m in run.metrics()]


@pytest.mark.slow
def test_saved_by_four_continued_by_two_then_by_one(
    config: RunConfig, reference: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # A tensor axis over several processes: each two of them need the same rows of a batch.
    four = Processes(4, 2, tmp_path, config, "stop@2", mesh__fsdp=2, mesh__tensor=4)
    codes, outs, errors = four.end()
    assert codes == [75] * 4, errors
    told = outs[0].splitlines()
    assert told[2] == "devices  8 x cpu of 4 processes, mesh fsdp 2, tensor 4"
    assert re.fullmatch(r"data: \d+ rows, 9\d.\d% full; 0.\d\d epochs", told[6])
    assert told[9].startswith("step 1/6  loss")
    assert "Gloo" not in outs[0]
    assert outs[1:] == [""] * 3
    assert errors == ["stopped at step 2 with a checkpoint saved: start again to continue\n", "", "", ""]

    # A context axis over several processes: both need all rows, and half of the columns.
    two = Processes(2, 2, tmp_path, config, "stop@4", mesh__fsdp=1, mesh__context=4, compute__preflight="true")
    codes, outs, errors = two.end()
    assert codes == [75, 75], errors
    told = outs[0].splitlines()
    changed = [line for line in told if line.startswith("changed: ")]
    assert "changed: mesh.tensor=4 -> 1" in changed
    assert "changed: mesh.context=1 -> 4" in changed
    first, *_, mesh = [line for line in told if line not in changed][:4]
    assert first == f"continuing '{tmp_path / 'run'}' from step 2"
    assert mesh == "devices  4 x cpu of 2 processes, mesh context 4"
    assert any(re.match("attention kernel '.*' agrees with the reference", line) for line in told)
    assert any(line.startswith("step 3/6  loss") for line in told)
    assert outs[1] + errors[1] == ""

    loaded: dict[str, Any] = {}
    load = CheckpointStore.load

    def watch(self: CheckpointStore, step: int, abstract: Any) -> Any:
        state = load(self, step, abstract)
        loaded[str(step)] = to_disk(state)
        return state

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "load", watch)
        # The state is donated to the first step: look at it before.
        patch.setattr(Loop, "_steps", lambda *args: loaded.update(copy(loaded)) or steps(*args))
        run = train(config, tmp_path / "run")

    assert_same(two.watched("loaded_2"), four.watched("saved_2"))
    assert_same(loaded["4"], two.watched("saved_4"))
    assert_same(two.watched("batch_0"), reference.batch(2))  # the preflight's
    for processes, number, step in ((four, 0, 0), (four, 1, 1), (two, 1, 2), (two, 2, 3)):
        assert_same(processes.watched(f"batch_{number}"), reference.batch(step))
    assert [m["step"] for m in run.metrics()] == list(range(1, 7))
    for ours, theirs in zip(losses(run), losses(reference), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


steps = Loop._steps


def copy(loaded: dict[str, Any]) -> dict[str, Any]:
    return {step: {name: np.array(value) for name, value in state.items()} for step, state in loaded.items()}


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_the_same_step(config: RunConfig, tmp_path: Path):
    rarely = {"logging__validate_every_steps": 100000, "checkpoint__every_steps": 100000}
    two = Processes(2, 1, tmp_path, config, num_steps=100000, **rarely)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in two.all), two.end()
        time.sleep(0.2)
    two.all[1].send_signal(signal.SIGTERM)
    codes, outs, errors = two.end()
    assert codes == [75, 75], errors
    run = open_run(tmp_path / "run")
    (step,) = run.steps()
    assert [m["step"] for m in run.metrics()] == list(range(1, step + 1))
    assert errors[0] == f"stopped at step {step} with a checkpoint saved: start again to continue\n"
    assert errors[1].count("\n") <= 1  # JAX itself notes that it caught the signal
    assert "stopped" not in errors[1]
    assert outs[1] == ""


@pytest.mark.slow
def test_a_mistake_is_told_once(config: RunConfig, tmp_path: Path):
    both = Processes(2, 1, tmp_path, config, model__attention__num_kv_heads=3)
    codes, outs, errors = both.end()
    assert codes == [2, 2]
    assert outs == ["", ""]
    assert errors[0].startswith("error: model.attention.num_kv_heads=3 does not divide num_heads=4")
    assert errors[0].count("\n") == 1
    assert errors[1] == ""


@pytest.mark.slow
def test_a_place_that_is_not_shared(config: RunConfig, tmp_path: Path):
    codes, outs, errors = Processes(2, 1, tmp_path, config, "hide@1").end()
    assert codes == [2, 2]
    assert outs == ["", ""]
    assert errors[0].startswith("error: '")
    assert errors[0].count("\n") == 1
    assert "was written by process 0 and is not here: set data.cache_dir to a place that all hosts share" in errors[0]
    assert "on process 1" in errors[0]
    assert errors[1] == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_crash_of_one_is_shown_and_ends_all(config: RunConfig, tmp_path: Path):
    two = Processes(2, 1, tmp_path, config, "crash@2", num_steps=100000)
    codes, _, errors = two.end()
    assert codes[1] == 1
    assert codes[0] != 0
    assert "RuntimeError: crashed on purpose" in errors[1]


@pytest.mark.slow
def test_samples_are_those_of_one_process(run_config: RunConfig, finished_run: Run, tmp_path: Path):
    options = {"num_steps": run_config.num_steps, "logging__sample_prompts": "the cat", "mesh__tensor": 2}
    codes, _, errors = Processes(2, 4, tmp_path, run_config, **options).end()
    assert codes == [0, 0], errors
    run = open_run(tmp_path / "run")
    assert run.steps() == finished_run.steps()
    assert (run.directory / "samples.txt").read_text().startswith("the cat")
    for ours, theirs in zip(losses(run), losses(finished_run), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_process_0_decides_what_callbacks_and_clocks_ask_for(config: RunConfig, reference: Run, tmp_path: Path):
    often: dict[str, Any] = {"checkpoint__every_minutes": 1e-9, "checkpoint__keep_last": 9, "logging__every_steps": 2}
    codes, outs, errors = Processes(2, 4, tmp_path, config, "call@4", **often).end()
    assert codes == [0, 0], errors
    assert "stopped at step 4/6 by a callback: enough" in outs[0].splitlines()
    run = open_run(tmp_path / "run")
    assert run.steps() == [1, 2, 4]
    assert [line["step"] for line in run.metrics()] == [1, 2, 4]
    assert [line["process"] for line in run.metrics()] == [0.0] * 3
    total = sum(float(np.abs(value).sum()) for value in run.load().model.params().values())
    assert run.metrics()[-1]["total"] == pytest.approx(total, rel=1e-5)


@pytest.mark.slow
def test_two_rewind_as_they_are_continued_by_hand(config: RunConfig, tmp_path: Path):
    options: dict[str, Any] = {"checkpoint__every_steps": 2, "checks__spike_zscore": 100}
    own = Processes(2, 1, tmp_path / "own", config, "spike@4", checks__max_rewinds=1, **options)
    codes, outs, errors = own.end()
    assert codes == [0, 0], errors
    assert outs[0].count(": rewind 1 of 1, without batches 2,3\n") == 1
    assert outs[1] + "".join(errors) == ""

    stopped = Processes(2, 1, tmp_path / "by_hand", config, "spike@4", **options)
    codes, _, errors = stopped.end()
    assert codes == [1, 1], errors
    assert "--data.skip-batches 2,3 --resume.allow data.skip_batches`" in errors[0]
    skip = {"data__skip_batches": "2,3", "resume__allow": "data.skip_batches"}
    by_hand = Processes(2, 1, tmp_path / "by_hand", config, **options, **skip)
    codes, _, errors = by_hand.end()
    assert codes == [0, 0], errors

    for step in (4, 6):
        assert_same(own.watched(f"saved_{step}"), by_hand.watched(f"saved_{step}"))
    found, expected = (open_run(tmp_path / name / "run") for name in ("own", "by_hand"))
    assert losses(found) == losses(expected)
    assert [entry["changes"] for entry in found.history] == [entry["changes"] for entry in expected.history]
