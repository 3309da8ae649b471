"""A notebook as a page of the site: its text and code, and its outputs where `make notebooks` has kept them."""

import base64
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import nbformat

FENCE = "~~~~~~"  # longer than any that outputs have


def notebook_page(source: Path, kept: Path, names: Collection[str]) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and the figures that it links to, by path from the page's folder.

    `kept` is the notebook with its outputs, which are shown where it has the cells that `source` has now. `names` are
    the notebooks that have a page.
    """
    notebook, ran = nbformat.read(source, 4), ""
    if kept.is_file():
        executed = nbformat.read(kept, 4)
        if [cell.source for cell in executed.cells] == [cell.source for cell in notebook.cells]:
            notebook, ran = executed, executed.metadata["llama_jax"]
    figures: dict[str, bytes] = {}
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(link_pages(cell.source, names))
            continue
        parts.append(f"{FENCE}python\n{cell.source}\n{FENCE}")
        heading = next((found[-1] for part in reversed(parts) if (found := re.findall("(?m)^#+ (.*)", part))), "")
        for output in merged(cell.outputs):
            parts.append(shown(output, source.stem, heading.replace("`", ""), figures))
    last = f"This page was {ran}." if ran else f"Not run yet: `make notebooks NOTEBOOK={source.stem}` adds the outputs."
    title, *rest = parts
    file = f"[The notebook]({source.name}){{ download }} to run it yourself, see [how](README.md#run-them)."
    return "\n\n".join([title, file, *rest, "---", f"*{last}*", ""]), figures


def link_pages(text: str, names: Collection[str]) -> str:
    """Return Markdown whose links to notebooks lead to their pages."""
    return re.sub(r"(\]\([^)\s:]*?)\b(\w+)\.ipynb\)", lambda m: f"{m[1]}{m[2]}.md)" if m[2] in names else m[0], text)


def merged(outputs: list[Any]) -> Iterator[Any]:
    """Yield outputs, neighbouring texts on one stream as one."""
    before: Any = None
    for output in outputs:
        if before is not None and output.output_type == before.output_type == "stream" and output.name == before.name:
            before.text += output.text
            continue
        if before is not None:
            yield before
        before = output
    if before is not None:
        yield before


def shown(output: Any, name: str, heading: str, figures: dict[str, bytes]) -> str:
    """Return an output as Markdown: a figure, HTML, or text."""
    if output.output_type == "stream":
        return text_block(output.text)
    data = output.data
    if "image/png" in data:
        path = f"{name}/figure-{len(figures) + 1}.png"
        figures[path] = base64.b64decode(data["image/png"])
        width = output.metadata.get("image/png", {}).get("width")
        size = f' width="{width}"' if width else ""
        return f"![Figure: {heading}]({path}){{ .notebook-output{size} }}"
    if "text/html" in data:
        return f'<div class="notebook-output" tabindex="0">\n{data["text/html"].strip()}\n</div>'
    return text_block(data["text/plain"])


def text_block(text: str) -> str:
    """Return a text as it is, without the colours of a terminal."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", text).rstrip("\n")
    return f"{FENCE}{{ .text .no-copy .notebook-text }}\n{plain}\n{FENCE}"
