"""`train` as one of several processes, watched: driver.py FOLDER MOMENT CONFIG [--key value ...].

MOMENT is `stop@N` (all processes are asked to end after step N), `hide@I` (process I sees no file that another one
writes), `crash@N` (process 1 fails before step N), `call@N` (a callback of process 0 ends the run at step N),
`spike@N` (the loss of step N is 1000 when it is first taken) or `never`. Into FOLDER go the global batches by step and
the global state as it was saved and loaded, put together from the parts of all processes.
"""

import dataclasses
import functools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import compiler
from jax.experimental import multihost_utils

from llama_jax import __main__ as command_line, commands
from llama_jax.checkpoint import CheckpointStore, to_disk
from llama_jax.run import Event, preparing, skipped, training


def whole(arrays: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    return {name: multihost_utils.process_allgather(array, tiled=True) for name, array in arrays.items()}


def spike_at(step: int) -> None:
    made, taken = training.programs, list[int]()

    def programs(config: Any) -> Any:
        found = made(config)

        def train_step(state: Any, *args: Any) -> Any:
            taken.append(int(state.step) + 1)
            state, metrics = found.train_step(state, *args)
            return state, metrics | ({"loss": np.float32(1000)} if taken[-1] == step == len(taken) else {})

        return dataclasses.replace(found, train_step=train_step)

    training.programs, skipped.LEAST = programs, 3


def main(folder: Path, moment: str, argv: list[str]) -> int:
    kind, _, number = moment.partition("@")
    # JAX lets process 0 alone keep its compilations; here all do, or every test would wait for the others'.
    compiler.distributed = types.SimpleNamespace(global_state=types.SimpleNamespace(process_id=0, client=None))
    original_place, original_save, original_load = training.to_devices, CheckpointStore.save, CheckpointStore.load
    steps: list[int] = []

    def keep(name: str, arrays: dict[str, jax.Array]) -> None:
        values = whole(arrays)
        if jax.process_index() == 0:
            np.savez(folder / name, **values)  # type: ignore[arg-type]

    def place(*args: Any) -> dict[str, jax.Array]:
        batch = original_place(*args)
        keep(f"batch_{len(steps)}", batch)
        steps.append(len(steps))
        if kind == "crash" and jax.process_index() == 1 and len(steps) == int(number):
            raise RuntimeError("crashed on purpose")
        return batch

    def save(self: CheckpointStore, state: Any, **kwargs: Any) -> None:
        keep(f"saved_{int(state.step)}", to_disk(state))
        original_save(self, state, **kwargs)

    def load(self: CheckpointStore, step: int, abstract: Any) -> Any:
        state = original_load(self, step, abstract)
        keep(f"loaded_{step}", to_disk(state))
        return state

    def unseen(*_: Any) -> None:
        if jax.process_index() == int(number):
            exists = Path.exists
            Path.exists = lambda self, **_: False
            try:
                check(*_)
            finally:
                Path.exists = exists

    training.to_devices, CheckpointStore.save, CheckpointStore.load = place, save, load
    check: Callable[..., None] = training.check_shared
    if kind == "hide":
        training.check_shared = preparing.check_shared = unseen
    if kind == "stop":
        multihost_utils.reached_preemption_sync_point = lambda step: step == int(number)
    if kind == "spike":
        spike_at(int(number))
    if kind == "call":

        def callback(event: Event) -> dict[str, float]:
            if event.step == int(number) and jax.process_index() == 0:
                event.stop("enough")
            total = sum(float(jax.numpy.abs(value).sum()) for value in event.load().model.params().values())
            return {"process": jax.process_index(), "total": total}

        commands.train = functools.partial(training.train, callbacks=(callback,))
    return command_line.main(["train", *argv])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
