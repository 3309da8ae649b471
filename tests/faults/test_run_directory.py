"""A run directory has one writer, its side files stop nothing, and what is not as it was is said."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_jax.config import UserError
from llama_jax.run import Run, train
from llama_jax.run.directory import LOCK_FILE, writing


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


HOLD = """
import sys, time
from pathlib import Path
from llama_jax.run.directory import writing
with writing(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_directory_has_one_writer_and_a_killed_one_leaves_it(
    finished_run: Run, tmp_path: Path, tally: Callable[..., None]
):
    directory = tmp_path / "run"
    shutil.copytree(finished_run.directory, directory)
    with subprocess.Popen([sys.executable, "-c", HOLD, directory], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = files_of(directory)
        with pytest.raises(UserError, match=rf"'{directory}' is written by process {holder.pid} on \S+: wait for its"):
            train(finished_run.config, directory)
        assert files_of(directory) == before
        holder.kill()
    assert (directory / LOCK_FILE).exists()
    with writing(directory):
        pass
    assert not (directory / LOCK_FILE).exists()
