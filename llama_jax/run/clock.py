"""Speed of training."""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Steps per second of training alone, without the first step (compilation) and pauses."""

    def __init__(self, start: int):
        self._step, self._seconds, self._first = start, 0.0, True
        self._since: float | None = time.perf_counter()  # None in a pause

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of the block."""
        self._count()
        self._since = None
        yield
        self._since = time.perf_counter()

    def speed(self, step: int) -> float | None:
        """Return the steps per second since the last call; None for the first."""
        self._count()
        seconds, steps, first = self._seconds, step - self._step, self._first
        self._step, self._seconds, self._first = step, 0.0, False
        return None if first or seconds <= 0 or steps <= 0 else steps / seconds

    def _count(self) -> None:
        """Add the time since the last count."""
        if self._since is not None:
            now = time.perf_counter()
            self._seconds, self._since = self._seconds + now - self._since, now
