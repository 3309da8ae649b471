"""A sweep as a process sees it: killed at some instant, and twenty of them in one kernel."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import llama_jax
from llama_jax.ablation import read_sweep
from llama_jax.config import override
from llama_jax.run import RunConfig

VARIANTS = {"base": {}, "slow": {"optimizer.learning_rate": 1e-3}}
CHILD = """
import sys
import tiny_run
import llama_jax
from llama_jax.config import override
base = override(tiny_run.get_config(), eval(sys.argv[1]))
llama_jax.ablate(base, eval(sys.argv[2]), seeds=2, run_dir=sys.argv[3], quiet=True)
"""


def losses(folder: Path) -> list[list[Any]]:
    return [
        [(line["step"], line["loss"], line.get("val_loss")) for line in t.metrics] for t in read_sweep(folder).trials
    ]


@pytest.mark.slow
def test_killed_and_called_again_it_ends_the_same(sweep_base: RunConfig, tmp_path: Path):
    changes = {
        "data.path": sweep_base.data.path[0],
        "data.cache_dir": str(tmp_path / "cache"),
        "logging.sample_prompts": (),
        "compute.preflight": False,
        "checkpoint.every_steps": 3,
        "num_steps": 40,
    }
    config = override(sweep_base, changes)
    llama_jax.ablate(config, VARIANTS, seeds=2, run_dir=tmp_path / "whole", quiet=True)
    arguments = [sys.executable, "-c", CHILD, repr(changes | {"optimizer.warmup_steps": 1}), repr(VARIANTS)]
    paths = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *sys.path])
    child = subprocess.Popen([*arguments, str(tmp_path / "s")], env={**os.environ, "PYTHONPATH": paths})
    try:
        while child.poll() is None and not list(tmp_path.glob("s/*/seed-*/checkpoints/[369]*/*")):
            time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL
    assert losses(tmp_path / "s") != losses(tmp_path / "whole")
    llama_jax.ablate(config, VARIANTS, seeds=2, run_dir=tmp_path / "s", quiet=True)
    assert losses(tmp_path / "s") == losses(tmp_path / "whole")


def resident() -> int:
    """Bytes of memory that this process has."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_memory_does_not_grow_from_sweep_to_sweep(sweep_base: RunConfig, tmp_path: Path):
    sizes: list[int] = []
    for number in range(9):
        seeds = [2 * number, 2 * number + 1]
        llama_jax.ablate(sweep_base, VARIANTS, seeds=seeds, steps=2, run_dir=tmp_path / str(number), quiet=True)
        sizes.append(resident())
    assert sizes[-1] - sizes[3] < 16e6, [size // 10**6 for size in sizes]
