"""One of several processes is lost: the others end within a minute and name it, and the run goes on."""

import hashlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
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
STEPS = 6
WITHIN = 60  # seconds
TRIALS = [  # (processes, victim, moment, action)
    (2, 1, "step@4", "KILL"),
    (2, 0, "validation@3", "STOP"),
    (2, 1, "save@4", "KILL"),
    (2, 1, "batch@5", "HANG"),
    (2, 0, "compilation@1", "KILL"),
    (4, 2, "step@4", "STOP"),
    (2, 1, "compilation@1", "STOP"),
    (2, 0, "save@4", "KILL"),
    (2, 1, "validation@3", "KILL"),
    (4, 0, "step@5", "KILL"),
    (2, 0, "step@3", "STOP"),
    (4, 3, "save@2", "STOP"),
]


def start(command: list[Any], told: Path) -> subprocess.Popen[bytes]:
    """Start a process with one device, whose stderr goes into the file `told`."""
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    with told.open("w") as stderr:
        environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)


class Group:
    """`count` processes with one device each that train together; one of them may be struck (see process.py)."""

    def __init__(self, count: int, folder: Path, config: RunConfig, *strike: Any, **options: Any):
        folder.mkdir(parents=True)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        values = {
            "data.path": config.data.path[0],
            "data.cache_dir": config.data.cache_dir,
            "num_steps": STEPS,
            "global_batch_size": 12,
            "checkpoint.every_steps": 2,
            "checkpoint.keep_last": 9,
            "logging.validate_every_steps": 3,
            "logging.sample_prompts": "",
            "checks.stall_seconds": 8,
            "num-processes": count,
        } | {name.replace("__", "."): value for name, value in options.items()}
        if count > 1:
            values["coordinator-address"] = f"127.0.0.1:{port}"
        else:
            del values["num-processes"]
        self.folder, self.victim = folder, (strike or (-1,))[0]
        strike = strike or (-1, "never", "KILL")
        self.all = [
            start(
                [sys.executable, HERE / "process.py", folder, *map(str, strike), ROOT / "tests" / "tiny_run.py"]
                + [f"--{key}={value}" for key, value in (values | ({"process-id": i} if count > 1 else {})).items()],
                folder / f"stderr_{i}",
            )
            for i in range(count)
        ]

    def end(self) -> tuple[list[int], float]:
        """Return the exit codes, and the seconds from the strike to the end of the last of the others."""
        try:
            for i, process in enumerate(self.all):
                if i != self.victim:
                    process.wait(timeout=600)
            ended = time.time()
        finally:
            for process in self.all:
                process.kill()
        struck = self.folder / "struck"
        return [process.wait() for process in self.all], ended - float(struck.read_text()) if struck.exists() else 0

    def told(self) -> list[str]:
        return [(self.folder / f"stderr_{i}").read_text() for i in range(len(self.all))]

    def rows(self) -> dict[int, list[tuple[int, str]]]:
        """Return the (row, hash) of every batch by step, of all processes."""
        found = defaultdict[int, list[tuple[int, str]]](list)
        for file in self.folder.glob("rows_*.txt"):
            for step, row, text in map(str.split, file.read_text().splitlines()):
                found[int(step)].append((int(row), text))
        return found


def final_state(directory: Path) -> list[np.ndarray]:
    run = open_run(directory)
    abstract = jax.eval_shape(init_state, abstract_params(run.config.model), run.config.optimizer.hyper(STEPS))
    state = CheckpointStore(directory / "checkpoints").load(STEPS, abstract)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
    return len(ours) > 30 and all(a.tobytes() == b.tobytes() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_a_lost_process_ends_the_others_and_the_run_goes_on(
    run_config: RunConfig, tmp_path: Path, num_trials: Callable[[int, int], int], tally: Callable[..., None]
):
    references: dict[int, list[np.ndarray]] = {}
    trials = TRIALS[: num_trials(3, len(TRIALS))]
    times, failures = list[float](), list[str]()
    for number, (count, victim, moment, action) in enumerate(trials):
        if count not in references:
            place = tmp_path / f"reference_{count}"
            assert Group(count, place / "told", run_config, run_dir=place / "run").end()[0] == [0] * count
            references[count] = final_state(place / "run")
        place = tmp_path / str(number)
        group = Group(count, place / "struck", run_config, victim, moment, action, run_dir=place / "run")
        codes, seconds = group.end()
        times.append(seconds)
        told = group.told()
        name = f"process {victim}( of {count})?"
        others = [i for i in range(count) if i != victim]
        good = seconds < WITHIN and all(codes[i] == 76 and re.search(f"failed: .*{name} ", told[i]) for i in others)
        if action == "HANG":
            good = good and f"stalls in the batch of step {moment[6:]}" in told[victim] and "in strike" in told[victim]
        steps = open_run(place / "run").steps()
        again = Group(count, place / "again", run_config, run_dir=place / "run")
        good = again.end()[0] == [0] * count and good and same(final_state(place / "run"), references[count])
        # It goes on from the step after the last one that was saved.
        good = good and min(again.rows()) == max(steps, default=0) + 1
        if not good:
            failures.append(f"{trials[number]}: {codes}, {seconds:.0f} s, {steps}, {told}")
    tally(
        "one of several processes killed, stopped or hanging",
        "the others end within 60 s and name it; the run continues to the same bits",
        tried=len(trials),
        held=len(trials) - len(failures),
        figures=f"ended after {min(times):.0f} to {max(times):.0f} s",
    )
    assert not failures


@pytest.mark.slow
def test_other_numbers_of_processes_repeat_and_skip_no_batch(
    run_config: RunConfig, tmp_path: Path, tally: Callable[..., None]
):
    """4, then 2, then 3, then 1, each but the last killed."""
    directory, held = tmp_path / "run", 0
    taken: dict[int, list[tuple[int, str]]] = {}
    for count, strike in ((4, (3, "step@3", "KILL")), (2, (1, "step@5", "KILL")), (3, (2, "step@6", "KILL")), (1, ())):
        before = open_run(directory).steps() if directory.exists() else []
        group = Group(count, tmp_path / f"{count}", run_config, *strike, run_dir=directory)
        codes, _ = group.end()
        assert codes == ([0] if not strike else [76] * (count - 1) + [-signal.SIGKILL]), group.told()
        assert min(group.rows()) == max(before, default=0) + 1
        taken |= group.rows()
    run: Run = open_run(directory)
    for step in range(STEPS):
        expected = [(row, hashlib.sha256(x.tobytes()).hexdigest()) for row, x in enumerate(run.batch(step)["tokens"])]
        held += sorted(taken[step + 1]) == expected
    tally("4, 2, 3 and 1 processes in turn", "every batch is taken once, row by row", tried=STEPS, held=held)


@pytest.mark.slow
def test_the_loop_of_the_launch_page_finishes_a_run_in_which_a_process_is_killed(run_config: RunConfig, tmp_path: Path):
    """The page's loop as it is, but for the command that it starts."""
    page = (ROOT / "docs" / "launch" / "README.md").read_text("utf-8")
    loop = next(block for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) if "until " in block)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command, num_replaced = re.subn(
        r"until .*?train\.py .*?--coordinator-address \S+", 'until "${START[@]}"', loop, flags=re.DOTALL
    )
    assert num_replaced == 1
    options = {
        "data.path": run_config.data.path[0],
        "data.cache_dir": run_config.data.cache_dir,
        "num_steps": STEPS,
        "checkpoint.every_steps": 2,
        "run-dir": tmp_path / "run",
        "coordinator-address": f"127.0.0.1:{port}",
    }
    hosts = []
    for i in range(2):
        train = [sys.executable, HERE / "process.py", tmp_path, 1, "step@4", "KILL", ROOT / "tests" / "tiny_run.py"]
        words = " ".join(map(shlex.quote, map(str, [*train, *(f"--{key}={value}" for key, value in options.items())])))
        hosts.append(
            start(["bash", "-c", f"START=({words})\n{command}", "loop", str(i), "2"], tmp_path / f"stderr_{i}")
        )
    codes = [host.wait(timeout=900) for host in hosts]
    told = [(tmp_path / f"stderr_{i}").read_text() for i in range(2)]
    assert codes == [0, 0], told
    assert "failed: process 1 of 2" in told[0]
    assert open_run(tmp_path / "run").steps()[-1] == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_save_that_one_of_two_cannot_write_is_repeated_by_both(
    run_config: RunConfig, tmp_path: Path, victim: int, tally: Callable[..., None]
):
    """Once: a second failure ends both, and the same command goes on from the last good step."""

    def trained(name: str, *strike: Any, run: str = "") -> tuple[list[int], list[str], float, Group]:
        group = Group(2, tmp_path / name, run_config, *strike, run_dir=tmp_path / "runs" / (run or name))
        group.victim = -1  # it ends by itself
        codes, seconds = group.end()
        return codes, group.told(), seconds, group

    assert trained("plain")[0] == [0, 0]
    codes, told, *_ = trained("once", victim, "save@4", "REFUSE")
    assert codes == [0, 0], told
    (line,) = told[0].splitlines()
    assert re.fullmatch(
        rf"warning: .* step 4 cannot be .* on process {victim} of 2 .* of step 2: trying once more", line
    )
    plain = final_state(tmp_path / "runs" / "plain")
    held = [told[1] == "", same(final_state(tmp_path / "runs" / "once"), plain)]
    held.append(4 not in open_run(tmp_path / "runs" / "once").steps())
    codes, told, seconds, _ = trained("always", victim, "save@4", "REFUSES")
    assert codes == [1, 1], told
    assert re.fullmatch(r"failed: the checkpoint of step .*: make room there, then start.*", told[0].splitlines()[-1])
    held += [seconds < WITHIN, len(told[0].splitlines()) == 2, told[1] == ""]
    codes, told, _, again = trained("again", run="always")
    held += [codes == [0, 0], min(again.rows()) == 3, same(final_state(tmp_path / "runs" / "always"), plain)]
    promise = "both repeat it once, then end in a sentence; the run continues to the same bits"
    tally(f"the disk of process {victim} of 2 refuses a checkpoint", promise, tried=len(held), held=sum(held))
