"""A run that is killed again and again ends as the one that never was: the same bits."""

import os
import signal
import subprocess
import sys
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
    """A process that trains on one device, in accumulated parts; `moment` says when it dies (see driver.py)."""

    def __init__(self, run_dir: Path, config: RunConfig, moment: str = "never"):
        options = {
            "data.path": config.data.path[0],
            "data.cache_dir": config.data.cache_dir,
            "optimizer.accumulation_steps": 2,
            "logging.sample_prompts": "",
            "run-dir": run_dir,
        }
        self._process = subprocess.Popen(
            [sys.executable, HERE / "driver.py", moment, ROOT / "tests" / "tiny_run.py"]
            + [f"--{key}={value}" for key, value in options.items()],
            env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[int, str]:
        _, error = self._process.communicate(timeout=300)
        return self._process.returncode, error


def told(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "mfu")} for line in run.metrics()]


def final_state(run: Run) -> list[np.ndarray]:
    abstract = jax.eval_shape(init_state, abstract_params(run.config.model), run.config.optimizer.hyper(12))
    state = CheckpointStore(run.directory / "checkpoints").load(12, abstract)
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
