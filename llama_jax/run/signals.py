"""Termination signals: a run ends after the step that it is in, with a checkpoint."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from jax.experimental import multihost_utils

from llama_jax.parallel import distributed


@contextlib.contextmanager
def termination() -> Iterator[Callable[[int], bool]]:
    """End the run after the current step at the first termination signal, and at once at the second.

    Yields a function of a step that returns whether the run ends after it: all of several processes do at the same one.
    """
    received: list[int] = []

    def stop(number: int, _: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        if distributed.several():
            signal.raise_signal(signal.SIGTERM)
        else:
            print("stopping after this step; once more to stop at once", file=sys.stderr)

    # Of several processes, JAX itself receives a SIGTERM, and brings it to the others.
    numbers = (signal.SIGINT,) if distributed.several() else (signal.SIGTERM, signal.SIGINT)
    try:
        before = {number: signal.signal(number, stop) for number in numbers}
    except ValueError:  # not the main thread (a notebook server): no signals to handle
        before = {}
    try:
        yield (
            lambda step: (
                multihost_utils.reached_preemption_sync_point(step) if distributed.several() else bool(received)
            )
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
