"""Counters, gauges and histograms in the text format of Prometheus."""

import bisect
from collections import Counter
from collections.abc import Mapping

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """Counts of seconds up to each bound."""

    def __init__(self) -> None:
        self._counts, self._sum = [0] * (len(SECONDS) + 1), 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """Count a value."""
        self._counts[bisect.bisect_left(SECONDS, seconds)] += times
        self._sum += seconds * times

    def lines(self, name: str) -> list[str]:
        """Return the samples of the text format: counts up to each bound, their sum, the number of values."""
        total, found = 0, []
        for bound, count in zip((*SECONDS, "+Inf"), self._counts, strict=True):
            total += count
            found.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*found, f"{name}_sum {self._sum}", f"{name}_count {total}"]


class Metrics:
    """What a server counts.

    first_token: seconds from a request's arrival to the first tokens of each of its prompts.
    between_tokens: seconds between the tokens of a text, of those that come together each an equal share.
    """

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._tokens: Counter[str] = Counter()
        self.first_token, self.between_tokens = Histogram(), Histogram()

    def request(self, path: str, status: int) -> None:
        """Count an answered request; 499 is the status of one whose client has left."""
        self._requests[path, status] += 1

    def count_tokens(self, **counts: int) -> None:
        """Count tokens: `prompt` of prompts that were admitted, `generated` new ones."""
        self._tokens.update(counts)

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Return all of it, and `gauges`: {name: (help, value now)}."""
        lines: list[str] = []

        def add(name: str, kind: str, help: str, samples: list[str]) -> None:
            lines.extend([f"# HELP llama_jax_{name} {help}", f"# TYPE llama_jax_{name} {kind}", *samples])

        counted = [
            f'llama_jax_requests_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(self._requests.items())
        ]
        add("requests_total", "counter", "Requests by path and status; 499: the client has left.", counted)
        for name, what in (("prompt", "Tokens of admitted prompts."), ("generated", "New tokens.")):
            key = f"{name}_tokens_total"
            add(key, "counter", what, [f"llama_jax_{key} {self._tokens[name]}"])
        for name, (what, value) in gauges.items():
            add(name, "gauge", what, [f"llama_jax_{name} {value}"])
        for name, histogram, what in (
            ("time_to_first_token_seconds", self.first_token, "From a request's arrival to its first token."),
            ("time_between_tokens_seconds", self.between_tokens, "Between two tokens of a text."),
        ):
            add(name, "histogram", what, histogram.lines(f"llama_jax_{name}"))
        return "\n".join(lines) + "\n"
