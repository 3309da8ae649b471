"""A report as one HTML page: style, script and data are in it, so that it opens offline."""

import dataclasses
import html
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama_jax.config import UserError
from llama_jax.files import write_text
from llama_jax.remote import local_path
from llama_jax.reports.collecting import collect

HEIGHT = 720  # pixels, in a notebook


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """A report of runs, which a notebook shows as a page in its cell.

    data: what is shown, as JSON (`collect`).
    """

    data: dict[str, Any]

    def __repr__(self) -> str:
        return f"Report({self.data['title']!r}): .save('report.html') writes it"

    def html(self, *, watched: bool = False) -> str:
        """Return the page; with `watched` it asks the server that it came from for newer data, else it asks nobody.

        What files say is in the page as JSON alone, without the characters that end a script.
        """
        place = Path(__file__).parent
        data = json.dumps(self.data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
        parts = {
            "STYLE": (place / "page.css").read_text(encoding="utf-8"),
            "SCRIPT": (place / "page.js").read_text(encoding="utf-8"),
            "CONNECT": "'self'" if watched else "'none'",
            "TITLE": html.escape(self.data["title"]),
            "DATA": data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),
        }
        before, *pieces = (place / "page.html").read_text(encoding="utf-8").split("{{")
        for piece in pieces:
            name, _, text = piece.partition("}}")
            before += parts[name] + text
        return before

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, and return its path. Raises UserError where it cannot be written."""
        file = local_path(path, "path")
        try:
            write_text(file, self.html())
        except OSError as error:
            raise UserError(f"'{path}' cannot be written ({error.strerror}): give the path of a file") from None
        return file

    def _repr_html_(self) -> str:
        page = html.escape(self.html(), quote=True)
        return (
            f'<iframe srcdoc="{page}" sandbox="allow-scripts" title="Report of runs" '
            f'style="width:100%;height:{HEIGHT}px;border:1px solid #8886"></iframe>'
        )


def report(paths: str | Path | Iterable[str | Path], *, metric: str | None = None) -> Report:
    """Return a report of runs and sweeps: directories, folders that have runs, globs, or URLs.

    A notebook shows it, `.save("report.html")` writes it as a page that needs no network. `metric` is the one that runs
    are compared by, by default `val_loss`. Raises UserError where there is no run.
    """
    return Report(collect([paths] if isinstance(paths, str | Path) else list(paths), metric))
