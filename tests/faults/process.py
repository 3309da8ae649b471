"""`train` as one of several processes, struck at a moment: process.py FOLDER VICTIM MOMENT ACTION CONFIG [--key ...].

Process VICTIM sends itself the signal ACTION (KILL or STOP), goes on no more (HANG), or the disk refuses its files for
one save (REFUSE) or from then on (REFUSES), at MOMENT: when it begins its
`compilation@1`, or the `batch@N`, `step@N` or `validation@N` of the update to step N, or in the middle of `save@N`, or
`never`; once for a FOLDER. Each process writes the hashes of its rows of a step's batch into FOLDER.
"""

import hashlib
import os
import resource
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import jax
from jax._src import compiler

from llama_jax import __main__ as command_line
from llama_jax.checkpoint import CheckpointStore
from llama_jax.run import training, watchdog
from llama_jax.run.training import Loop


def limit_files(num_bytes: int) -> None:
    """Let the system refuse files above a size, as a full disk refuses all."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def main(folder: Path, victim: int, moment: str, action: str, argv: list[str]) -> int:
    # JAX lets process 0 alone keep its compilations; here all do, or every test would wait for the others'.
    compiler.distributed = types.SimpleNamespace(global_state=types.SimpleNamespace(process_id=0, client=None))
    watchdog.FIRST = 2  # nothing that is compiled here takes minutes
    original_steps, original_save, original_place = Loop._steps, Loop._save, training.to_devices
    original_fail = CheckpointStore._fail
    work: list[tuple[str, int]] = []

    def strike(kind: str, step: int) -> None:
        if f"{kind}@{step}" == moment and jax.process_index() == victim and not (folder / "struck").exists():
            (folder / "struck").write_text(str(time.time()))
            if action == "HANG":
                time.sleep(1000)
            elif action.startswith("REFUSE"):
                limit_files(10_000)
            else:
                os.kill(os.getpid(), getattr(signal, f"SIG{action}"))

    def steps(self: Loop, *args: Any) -> Any:
        original = self.beat

        def beat(kind: str, step: int) -> None:
            original(kind, step)
            if kind == "step" and not any(earlier == "step" for earlier, _ in work):
                strike("compilation", 1)
            work.append((kind, step))
            if kind != "save" or action.startswith("REFUSE"):
                strike(kind, step)

        self.beat = beat
        return original_steps(self, *args)

    def save(self: Loop, *args: Any) -> None:
        original_save(self, *args)  # a thread writes the files
        strike("save", work[-1][1])

    def fail(self: CheckpointStore, *args: Any) -> None:
        if action == "REFUSE":
            limit_files(resource.RLIM_INFINITY)
        original_fail(self, *args)

    def place(values: Any, rows: Any, num_rows: int) -> Any:
        if work and work[-1][0] == "step":
            with (folder / f"rows_{jax.process_index()}.txt").open("a") as file:
                for row, tokens in zip(rows, values["tokens"], strict=True):
                    file.write(f"{work[-1][1]} {row} {hashlib.sha256(tokens.tobytes()).hexdigest()}\n")
        return original_place(values, rows, num_rows)

    Loop._steps, Loop._save, training.to_devices, CheckpointStore._fail = steps, save, place, fail
    return command_line.main(["train", *argv])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:]))
