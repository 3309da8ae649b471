"""The processor time of each test, that of the processes it starts included, and a limit for it.

`--budget SECONDS` prints the seconds by directory and the dearest tests, and fails where one test is over the limit.
Wall time would also measure what else runs on the machine. A test over the limit is measured against a loop whose time
on the reference machine is known, so that the limit means the same on a slower one.
"""

import os
import time
from collections import Counter
from collections.abc import Generator

import pytest

PROPERTY = "cpu_seconds"
LOOPS, LOOP_SECONDS = 1_000_000, 0.02  # an EPYC core with Python 3.12


def cpu_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def slowness() -> float:
    """Return how many times slower than the reference machine this one is now; at least 1."""

    def measure() -> float:
        begin = time.process_time()
        for _ in range(LOOPS):
            pass
        return time.process_time() - begin

    return max(1.0, min(measure() for _ in range(5)) / LOOP_SECONDS)


class Budget:
    """Plugin that measures each test where it runs and adds up where the reports arrive.

    limit: processor seconds of one test, and as many of its fixtures.
    """

    def __init__(self, limit: float):
        self.limit = limit
        self.tests: Counter[str] = Counter()
        self._start = 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        self._start = cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        cost = cpu_seconds() - self._start
        self._start += cost
        if cost > self.limit:
            cost /= slowness()
        report.user_properties.append((PROPERTY, cost))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.tests[report.nodeid] += dict(report.user_properties).get(PROPERTY, 0.0)

    def over(self) -> list[str]:
        return [f"{cost:.0f} s  {test}" for test, cost in self.tests.most_common() if cost > self.limit]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        directories: Counter[str] = Counter()
        for test, cost in self.tests.items():
            directories["/".join(test.split("::")[0].split("/")[:2])] += cost
        terminalreporter.section(f"processor time: {self.tests.total():.0f} s")
        for name, cost in (directories + Counter()).most_common(30):
            terminalreporter.write_line(f"{cost:7.1f} s  {name}")
        terminalreporter.section("dearest tests")
        for name, cost in self.tests.most_common(30):
            terminalreporter.write_line(f"{cost:7.1f} s  {name}")
        for line in self.over():
            terminalreporter.write_line(f"over the budget of {self.limit:.0f} s: {line}", red=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.over() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
