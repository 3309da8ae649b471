"""A run that is long holds no more at its end than early on; a corpus that is stopped leaves no process."""

import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_jax.run import Run, RunConfig

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts what Linux lists under /proc"),
]

LONG = """
import json, os, sys, time
from pathlib import Path
import tiny_run
from llama_jax.config import override
from llama_jax.run import train

steps, texts, cache, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
changes = {"data.path": (texts,), "data.cache_dir": cache, "num_steps": steps, "logging.every_steps": 20}
changes |= {"logging.validate_every_steps": 200, "checkpoint.every_steps": 100, "logging.sample_prompts": ()}
rows = []

def record(event):
    if event.step % (steps // 40) == 0:
        files = [file.stat().st_size for file in (directory / "checkpoints").rglob("*") if file.is_file()]
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        counts = [len(os.listdir(f"/proc/self/{name}")) for name in ("task", "fd")]
        rows.append([time.process_time(), memory, *counts, sum(files)])

train(override(tiny_run.get_config(), changes), directory, callbacks=[record], quiet=True)
print("ROWS", json.dumps(rows))
"""


def test_a_long_run_is_flat(
    run_config: RunConfig, tmp_path: Path, num_trials: Callable[[int, int], int], tally: Callable[..., None]
):
    steps = num_trials(6_000, 20_000)
    words = [str(steps), run_config.data.path[0], run_config.data.cache_dir, str(tmp_path / "run")]
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    found = subprocess.run(
        [sys.executable, "-c", LONG, *map(str, words)], env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr[-2000:]
    rows = json.loads(found.stdout.split("ROWS ")[1])
    times, *held = zip(*rows, strict=True)
    seconds = [after - before for before, after in itertools.pairwise(times)]
    windows = slice(len(rows) // 4, len(rows) // 2), slice(3 * len(rows) // 4, None)
    early, late = ([statistics.median(values[window]) for values in (seconds, *held)] for window in windows)
    grown = {
        name: after / before
        for name, before, after in zip(("time", "memory", "threads", "descriptors", "disk"), early, late, strict=True)
    }
    allowed = {"time": 1.3, "memory": 1.05, "threads": 1.1, "descriptors": 1.1, "disk": 1.1}
    figures = f"{steps:,} steps; last quarter / second: " + ", ".join(f"{k} {v:.3f}" for k, v in grown.items())
    held_flat = sum(grown[name] <= allowed[name] for name in allowed)
    print(figures)
    tally("a long run with saves and validation", "what it holds is flat", tried=5, held=held_flat, figures=figures)


PREPARE = """
import sys
from llama_jax.data.readers import records
records.SHARD_BYTES = 200_000
from llama_jax.__main__ import console
console(["prepare", *sys.argv[1:]])
"""


def children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def alive(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_tokenization_that_is_stopped_leaves_no_process(
    finished_run: Run, tmp_path: Path, num_trials: Callable[[int, int], int], tally: Callable[..., None]
):
    rng, trials, held = random.Random(0), num_trials(1, 10), 0
    text = Path(next(Path(finished_run.config.data.path[0]).iterdir())).read_text()
    (tmp_path / "texts").mkdir()
    for number in range(60):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{number} " + text * 500)
    words = [str(tmp_path / "texts"), "--tokenizer", str(finished_run.directory / "tokenizer"), "--num-workers", "2"]
    words += ["--validation-fraction", "0"]
    command = [sys.executable, "-c", PREPARE, *words, "--output", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for _ in range(trials):
        started = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        while started.poll() is None and len(children(started.pid)) < 2:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 4))
        workers = children(started.pid)
        started.send_signal(signal.SIGTERM)
        error = started.communicate(timeout=120)[1]
        time.sleep(2)
        ended = not any(map(alive, workers))
        stopped = started.returncode == 75 and "stopped by SIGTERM" in error and "Traceback" not in error
        if not (good := ended and (started.returncode == 0 or stopped)):
            print(f"code {started.returncode}, all ended: {ended}: {error[-1500:]}")
        held += good
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
    tally("SIGTERM while a corpus is tokenized", "code 75, no process left", tried=trials, held=held)
