"""A run that is killed again and again ends as the one that never was: the same bits."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llama_jax.checkpoint import CheckpointStore
from llama_jax.models import abstract_params
from llama_jax.run import Run, RunConfig, open_run
from llama_jax.training import init_state

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


class Start:
    """A process that trains on one device, in accumulated parts; `moment` says when it dies (see driver.py).

    Without a `moment` it is the command line, which a test kills from outside. `keys` are of the config.
    """

    def __init__(self, run_dir: Path, config: RunConfig, moment: str | None = "never", **keys: Any):
        options = {
            "data.path": config.data.path[0],
            "data.cache_dir": config.data.cache_dir,
            "optimizer.accumulation_steps": 2,
            "logging.sample_prompts": "",
            "run-dir": run_dir,
            **keys,
        }
        program = ["-m", "llama_jax", "train"] if moment is None else [HERE / "driver.py", moment]
        self.process = subprocess.Popen(
            [sys.executable, *program, ROOT / "tests" / "tiny_run.py"]
            + [f"--{key}={value}" for key, value in options.items()],
            env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[int, str]:
        _, error = self.process.communicate(timeout=300)
        return self.process.returncode, error


def told(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "mfu")} for line in run.metrics()]


def final_state(run: Run) -> list[np.ndarray]:
    steps = run.config.num_steps
    abstract = jax.eval_shape(init_state, abstract_params(run.config.model), run.config.optimizer.hyper(steps))
    state = CheckpointStore(run.directory / "checkpoints").load(steps, abstract)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.mark.slow
def test_killed_killed_while_saving_and_terminated(run_config: RunConfig, tmp_path: Path):
    reference = Start(tmp_path / "uninterrupted", run_config)
    directory = tmp_path / "run"
    checkpoints = directory / "checkpoints"
    # In the first epoch, after the checkpoint of step 4.
    assert Start(directory, run_config, "kill@6").end()[0] == -signal.SIGKILL
    assert open_run(directory).metrics()[-1]["step"] == 5
    # Again from step 4; the checkpoint of step 8 is never finished.
    assert Start(directory, run_config, "save@8").end()[0] == -signal.SIGKILL
    assert (checkpoints / "8.orbax-checkpoint-tmp").is_dir()
    assert open_run(directory).steps() == [4]
    # Asked to stop at step 10, in the second epoch: that step's checkpoint is not due, and is written.
    code, error = Start(directory, run_config, "terminate@9").end()
    assert code == 75
    assert "start again to continue" in error
    assert open_run(directory).steps() == [8, 10]
    assert Start(directory, run_config).end()[0] == 0

    assert reference.end()[0] == 0
    run, uninterrupted = open_run(directory), open_run(tmp_path / "uninterrupted")
    assert [line["step"] for line in told(run)] == list(range(1, 13))
    assert told(run) == told(uninterrupted)
    states = final_state(run), final_state(uninterrupted)
    assert len(states[0]) > 30
    for ours, theirs in zip(*states, strict=True):
        assert np.array_equal(ours, theirs)
    windows = [run.batch(step)["tokens"] for step in range(12)]
    assert len({row.tobytes() for batch in windows for row in batch}) < 12 * 8, "the run should reach a second epoch"
    assert not list(checkpoints.glob("*tmp*"))


def same_end(run: Run, other: Run) -> bool:
    """Whether two runs have ended in the same bits, and have told the same of every step."""
    pairs = zip(final_state(run), final_state(other), strict=True)
    return all(np.array_equal(ours, theirs) for ours, theirs in pairs) and told(run) == told(other)


def handles(process: subprocess.Popen[str]) -> bool:
    """Whether a process has a handler of SIGTERM."""
    status = Path(f"/proc/{process.pid}/status").read_text().split("SigCgt:")[1].split()[0]
    return bool(int(status, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="what Linux lists under /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_signals_at_random_instants(
    number: signal.Signals,
    run_config: RunConfig,
    tmp_path: Path,
    num_trials: Callable[[int, int], int],
    tally: Callable[..., None],
):
    """With saves at every step. A SIGKILL comes while it trains, a SIGTERM from the first import on."""
    rng, trials, held, oldest = random.Random(int(number)), num_trials(1, 50), 0, 0
    keys = {"num_steps": 20 * (trials + 1), "checkpoint.every_steps": 1, "logging.validate_every_steps": 7}
    assert Start(tmp_path / "undisturbed", run_config, None, **keys).end()[0] == 0
    directory, before = tmp_path / "run", 0
    for _ in range(trials):
        start = Start(directory, run_config, None, **keys)
        while start.process.poll() is None and not handles(start.process):
            time.sleep(0.01)
        begun = directory / ".lock" if number == signal.SIGKILL else tmp_path
        while start.process.poll() is None and not begun.exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 8))
        start.process.send_signal(number)
        code, error = start.end()
        steps = open_run(directory).committed_steps() if (directory / "config.json").exists() else []
        logged = max((line["step"] for line in open_run(directory).metrics()), default=0) if steps else 0
        newest = max(steps, default=0)
        oldest = max(oldest, logged - newest)
        if code == 0:  # it had ended
            good = newest == keys["num_steps"]
        elif number == signal.SIGKILL:
            good = code == -number and newest >= before and logged - newest <= 2
        else:
            named = f"stopped at step {newest} with" in error or "nothing was trained yet" in error
            good = code == 75 and (named or "stopped by SIGTERM" in error) and "Traceback" not in error
        if not good:
            print(f"code {code}, steps {steps}, logged {logged}: {error[-1000:]}")
        held, before = held + good, newest
    assert Start(directory, run_config, None, **keys).end()[0] == 0
    assert same_end(open_run(directory), open_run(tmp_path / "undisturbed"))
    assert not list((directory / "checkpoints").glob("*tmp*"))
    promise = "the newest step is loaded" if number == signal.SIGKILL else "exit code 75, nothing lost"
    figures = f"the end is bitwise that of an undisturbed run; at most {oldest} steps came again"
    tally(f"{number.name} at a random instant", promise, tried=trials, held=held, figures=figures)
