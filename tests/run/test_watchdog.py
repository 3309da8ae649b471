"""The watchdog ends a run when a kind of work takes too long, or another process is silent, and not before."""

from collections.abc import Callable
from typing import Any

import pytest

from llama_jax.parallel import distributed
from llama_jax.run import watchdog
from llama_jax.run.watchdog import CALLBACKS, EVERY, FIRST, LEFT, SILENT, Watchdog


class Ended(Exception):
    pass


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`f(seconds, at, until)`: (second, reason) of the end by a watchdog whose time passes at once, or None.

    `at(dog, second)` is called in each second.
    """

    def end(why: str, **_: Any) -> None:
        raise Ended(why)

    monkeypatch.setattr(watchdog, "_end", end)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda _: None)

    def run(
        seconds: float | None, at: Callable[[Watchdog, int], None], until: int = 10_000, stopped: int | None = None
    ) -> tuple[int, str] | None:
        dog, now = Watchdog(seconds), [0]

        def wait(_: float) -> bool:
            at(dog, now[0])
            now[0] += 1
            return now[0] > until

        monkeypatch.setattr(dog._closed, "wait", wait)
        monkeypatch.setattr(
            watchdog.time, "monotonic", lambda: now[0] + 1000 * (stopped is not None and now[0] > stopped)
        )
        try:
            dog._watch()
        except Ended as error:
            return now[0], str(error)
        return None

    return run


@pytest.mark.parametrize(("usual", "limit"), [(1, 60), (3, 60), (10, 200)])
def test_a_step_may_take_its_usual_time_many_times(watch: Callable[..., Any], usual: int, limit: int):
    """The first may take an hour, a later one 60 seconds or 20 times the median; 50 seconds more hide no median."""

    def at(dog: Watchdog, second: int) -> None:
        if second == 0:
            dog.beat("batch", 1)
        elif second >= 3000 and (step := second - 3000) < 900 and step % usual == 0:
            dog.beat("batch", step)

    second, why = watch(60, at)
    last = 3000 + 899 // usual * usual
    assert second - last == limit + 1
    assert f"stalls in the batch of step {last - 3000}: more than {limit} s" in why


def test_what_has_not_ended_before_may_compile_and_callbacks_may_take_any_time(watch: Callable[..., Any]):
    found = watch(60, lambda dog, second: dog.beat("step", 1) if second == 5 else None)
    assert found[0] == 5 + 60 * FIRST + 1
    assert watch(60, lambda dog, second: dog.beat(CALLBACKS, 1) if second == 5 else None) is None
    assert watch(None, lambda dog, second: dog.beat("step", 1) if second == 5 else None) is None


def test_a_process_that_was_stopped_and_goes_on_is_given_its_time(watch: Callable[..., Any]):
    """Stopped for 1000 seconds within a step, with all of its threads."""

    def at(dog: Watchdog, second: int) -> None:
        if second < 20:
            dog.beat("step", second)

    assert watch(60, at, stopped=40)[0] == watch(60, at)[0] - 4
    assert watch(60, at)[0] == 19 + 60 + 1


def test_a_silent_process_is_named_and_one_that_has_left_is_not(
    watch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    def signs(stops: int, last: str) -> Callable[[Watchdog, int], None]:
        def at(dog: Watchdog, second: int) -> None:
            if second % EVERY == 0:
                dog._seen["1"] = f"process 1 of 2 (host a)|{second}", second
                if second < stops:
                    dog._seen["2"] = f"process 2 of 3 (host b)|{second}", second
                elif second == stops:
                    dog._seen["2"] = f"process 2 of 3 (host b)|{last}", second

        return at

    second, why = watch(None, signs(100, "last"))
    assert second == 100 + SILENT + 1
    assert why.startswith("process 2 of 3 (host b) gave no sign of life for 30 s")
    assert watch(None, signs(100, LEFT)) is None


def test_what_waits_for_others_ends_after_the_one_that_it_waits_for(
    watch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    """Of several processes, one that waits for a batch of another, or for a lost one, is not the first to end."""
    monkeypatch.setattr(distributed, "several", lambda: True)
    monkeypatch.setattr(distributed, "own_name", lambda: "process 1 of 2")

    def begins(kind: str, seconds: float) -> int:
        def at(dog: Watchdog, second: int) -> None:
            if second < 10:
                dog.beat(kind, second)

        return watch(seconds, at)[0]

    for seconds in (5, 60):
        for kind in ("step", "save", "validation"):
            assert begins(kind, seconds) > max(begins("batch", seconds), 10 + SILENT + EVERY) + 2 * EVERY
