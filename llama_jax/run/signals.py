"""Termination signals: a run ends after the step that it is in, with a checkpoint."""

import signal
import sys
from collections.abc import Callable
from typing import Any

from jax.experimental import multihost_utils

from llama_jax.parallel import distributed


class Signals:
    """Context in which the first termination signal ends the run after the current step, and the second at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Callable[[int], bool]:
        # Of several processes, JAX itself receives a SIGTERM, and brings it to the others.
        numbers = (signal.SIGINT,) if distributed.several() else (signal.SIGTERM, signal.SIGINT)
        try:
            self._before = {number: signal.signal(number, self._stop) for number in numbers}
        except ValueError:  # not the main thread (a notebook server): no signals to handle
            self._before = {}
        return self.stopping

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        if distributed.several():
            signal.raise_signal(signal.SIGTERM)
        else:
            print("stopping after this step; once more to stop at once", file=sys.stderr)

    def stopping(self, step: int) -> bool:
        """Return whether the run ends after `step`: all of several processes do at the same one, without waiting."""
        if distributed.several():
            return multihost_utils.reached_preemption_sync_point(step)
        return self.received is not None
