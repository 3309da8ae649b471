"""The file of a run's metrics, read without JAX."""

import json
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
STARTS_FILE = "starts.jsonl"  # a line for each start of the run: its step, date and devices


def read_metrics(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Return a dict per logged step of a `METRICS_FILE`, which may be missing, and the number of damaged lines."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    # A killed process may leave a line without its end; after the machine itself went down, a file may have zeros
    # in place of what was not yet on disk.
    lines = [line.strip("\0\r ") for line in text.split("\n")[:-1]]
    found = [_metrics_of(line) for line in lines]
    return [metrics for metrics in found if metrics is not None], found.count(None)


def _metrics_of(line: str) -> dict[str, Any] | None:
    """Return a line of metrics, or None for a damaged one. Constants that JSON does not have (NaN) are None, too."""
    try:
        found = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):  # also numbers of too many digits
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None
