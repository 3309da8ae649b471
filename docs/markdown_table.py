"""Tables in Markdown, for the scripts that write them into the pages."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown(header: str, rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; `header` separates columns by `|`, and a column that ends with `>` is aligned to the right."""
    names = header.split("|")
    rule = "|".join("---:" if name.endswith(">") else "---" for name in names)
    lines = [f"| {' | '.join(name.removesuffix('>') for name in names)} |", f"|{rule}|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, cells))} |" for cells in rows)])
