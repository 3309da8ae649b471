"""Termination signals: a run ends after the step that it is in, with a checkpoint."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from jax.experimental import multihost_utils

from llama_jax.parallel import distributed


class Preempted(Exception):
    """The run was asked to stop and saved a checkpoint; the command line exits with 75."""


@contextlib.contextmanager
def termination() -> Iterator[Callable[[int], bool]]:
    """End the run after the current step at the first termination signal, and at once at the second.

    Yields a function of a step that returns whether the run ends after it: all of several processes do at the same one.
    Until it is called there is nothing to save, and a signal raises KeyboardInterrupt: a SIGTERM with a sentence. One
    that comes after the last step raises Preempted when the block ends, after all that the block still saves.
    """
    received: list[int] = []
    point = 0  # of JAX, which has to ascend: a run may go back, and a sweep has several runs
    steps: list[int] = []

    def stop(number: int, _: Any) -> None:
        if not steps:
            told = ["stopped before a step was done: nothing was trained yet, start again to continue"]
            raise KeyboardInterrupt(*(told if number == signal.SIGTERM else []))
        if received:
            if number == signal.SIGTERM:
                os._exit(128 + number)  # as by a kill: what is on disk is whole
            raise KeyboardInterrupt
        received.append(number)
        if distributed.several():
            signal.raise_signal(signal.SIGTERM)
        else:
            print("stopping after this step; once more to stop at once", file=sys.stderr)

    def stops(step: int) -> bool:
        nonlocal point
        steps[:], point = [step], max(step, point + 1)
        return multihost_utils.reached_preemption_sync_point(point) if distributed.several() else bool(received)

    # Of several processes, JAX itself receives a SIGTERM, and brings it to the others.
    numbers = (signal.SIGINT,) if distributed.several() else (signal.SIGTERM, signal.SIGINT)
    try:
        before = {number: signal.signal(number, stop) for number in numbers}
    except ValueError:  # not the main thread (a notebook server): no signals to handle
        before = {}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise Preempted(f"stopped at step {steps[0]} with a checkpoint saved: start again to continue")
