"""A thread that ends a run that stalls, with the process that does and its stacks named.

Each of several processes also gives signs of life, and ends where another one stops to.
"""

import collections
import contextlib
import ctypes
import faulthandler
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax

from llama_jax.parallel import distributed

EXIT_CODE = 76
SILENT = 30  # seconds without a sign of life, after which a process is lost
EVERY = 4  # seconds between two signs of life
FIRST = 60  # the first of a kind of work may compile: it may take so many times `seconds`
USUAL = 20  # times the median of the earlier ones, that a later one may take
LEFT = "left"  # the last sign of life of a process that has done its part
CALLBACKS = "callbacks"  # the kind of work that may always take any time
type Beat = Callable[[str, int], None]


class Watchdog:
    """The thread that watches this process, and of several the one that exchanges signs of life.

    Time is counted by the thread itself: a process that was stopped as a whole and goes on has lost 5 seconds at most.
    """

    def __init__(self, seconds: float | None):
        self._seconds = seconds
        self._now = 0.0
        self._work: tuple[str, int, float] | None = None  # its kind, its step, when it began
        self._durations = collections.defaultdict[str, collections.deque[float]](lambda: collections.deque(maxlen=50))
        self._seen: dict[str, tuple[str, float]] = {}  # the last sign of life of other processes, and when it came
        self._told: str | None = None  # why another process has ended
        self._closed = threading.Event()
        self._signs = threading.Thread(target=self._exchange, name="signs of life", daemon=True)

    def beat(self, kind: str, step: int) -> None:
        """Note that the main thread begins a kind of work, for the update to `step`."""
        if self._work is not None:
            self._durations[self._work[0]].append(self._now - self._work[2])
        self._work = kind, step, self._now

    def start(self) -> None:
        """Start the threads."""
        if distributed.several():
            if not distributed.is_main():
                self._seen[f"{distributed.ALIVE}/{0:08}/now"] = "process 0", self._now
            # Where process 0 has ended, JAX aborts the others.
            ctypes.CDLL(None).signal(int(signal.SIGABRT), _aborted)
            self._signs.start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """End the threads."""
        self._closed.set()
        if distributed.several():
            self._signs.join(EVERY)
            ctypes.CDLL(None).signal(int(signal.SIGABRT), None)

    def limit(self, kind: str) -> float:
        """Return the seconds that this kind of work may take now."""
        assert self._seconds is not None
        earlier = self._durations[kind]
        usual = max(self._seconds, USUAL * statistics.median(earlier)) if earlier else FIRST * self._seconds
        # All but the batch waits for other processes: one that is lost or stalls elsewhere should be named before.
        return usual if kind == "batch" or not distributed.several() else max(usual, SILENT) + 4 * EVERY

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(1):
            self._now, last = self._now + min(time.monotonic() - last, 5), time.monotonic()
            if self._told is not None:
                _end(self._told, told=True)
            for sign, at in [*self._seen.values()]:
                name, _, what = sign.partition("|")
                if what != LEFT and self._now - at > SILENT:
                    _end(f"{name} gave no sign of life for {SILENT} s: it was killed or stopped, or its host is lost")
            if self._seconds is None or self._work is None:
                continue
            kind, step, began = self._work
            if kind != CALLBACKS and self._now - began > (limit := self.limit(kind)):
                print("the stacks of this process:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(2)
                _end(f"{distributed.own_name()} stalls in the {kind} of step {step}: more than {limit:.0f} s")

    def _exchange(self) -> None:
        """Give signs of life and look for others: process 0 for those of all, the others for that of process 0."""
        watched = distributed.ALIVE if distributed.is_main() else f"{distributed.ALIVE}/{0:08}"
        # Without process 0 there is no service: its silence is noticed by the other thread.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while True:
                distributed.give_sign(str(self._now))
                for key, sign in distributed.published(watched).items():
                    if sign != self._seen.get(key, ("", 0))[0]:
                        self._seen[key] = sign, self._now
                self._told = next(iter(distributed.published(distributed.ENDED).values()), None)
                if self._closed.wait(EVERY):
                    break
            distributed.give_sign(LEFT)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
    _end("process 0 has ended, or JAX has aborted this process for the reason above", told=True)


def _end(why: str, *, told: bool = False) -> None:
    """End this process, and before it all others, unless they `told` it to this one."""
    if not told:
        distributed.announce(why)
    if distributed.several() and (distributed.is_main() or not told):
        time.sleep(EVERY + 2)  # the others read it, from a service that ends with process 0
    print(f"failed: {why}; start again to continue", file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)


@contextlib.contextmanager
def watching(seconds: float | None) -> Iterator[Beat]:
    """Watch the block; yields the function that is called when the main thread begins a kind of work for a step.

    A kind of work may take `seconds`, or `USUAL` times the median where that is longer; None: any time. An interactive
    Python is not ended for its own work.
    """
    watchdog = Watchdog(None if hasattr(sys, "ps1") else seconds)
    watchdog.start()
    try:
        yield watchdog.beat
    except jax.errors.JaxRuntimeError as error:
        # A computation with a process that is lost: the thread will name that one, and end this one.
        if distributed.several() and "RESOURCE_EXHAUSTED" not in str(error):
            watchdog.beat(CALLBACKS, 0)
            time.sleep(SILENT + 3 * EVERY)
        raise
    finally:
        watchdog.close()
