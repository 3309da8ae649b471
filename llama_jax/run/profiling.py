"""Profile of a window of a run's steps."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from llama_jax.parallel import distributed
from llama_jax.run.clock import Clock
from llama_jax.run_config import RunConfig


class Profile:
    """Context that records the steps of `config.profile` into `directory` on process 0, and prints how to open it.

    `start` is the first step that this process takes, `say` prints a line; `clock` leaves out the time of writing.
    """

    def __init__(self, config: RunConfig, directory: Path, start: int, say: Callable[[str], None], clock: Clock):
        self._window = recorded(config, start) if distributed.is_main() else range(0)
        self._directory, self._say, self._clock = directory, say, clock
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def step(self, step: int, state: Any) -> contextlib.AbstractContextManager[Any]:
        """Return a context for the update from `step` to `step + 1`, which marks it; `state` is the one before it."""
        if self._window and step == self._window.start:
            self._stack.callback(self._describe)
            with self._clock.paused():
                self._stack.enter_context(jax.profiler.trace(str(self._directory), create_perfetto_trace=True))
        elif self._window and step == self._window.stop:
            jax.block_until_ready(state)
            with self._clock.paused():
                self._stack.close()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def _describe(self) -> None:
        """Print how to open what was recorded."""
        files = self._directory.glob("plugins/profile/*/perfetto_trace.json.gz")
        newest = max(files, key=lambda file: file.stat().st_mtime, default=None)
        perfetto = "" if newest is None else f", or open '{newest}' at https://ui.perfetto.dev"
        self._say(
            f"profile of {len(self._window)} steps from {self._window.start}: show it by "
            f"`xprof --logdir='{self._directory}'` (pip install 'llama_jax[profile]'){perfetto}"
        )


def recorded(config: RunConfig, start: int) -> range:
    """Return the steps from `start` on that are in the profile's window."""
    first, steps = config.profile.start_step, config.profile.num_steps
    if first is None:
        return range(0)
    return range(max(first, start), min(first + steps, config.num_steps))
