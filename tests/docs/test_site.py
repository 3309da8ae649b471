"""The site of guides and API reference is built without a warning, and links from page to page work on it."""

import base64
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_site_is_built(tmp_path: Path):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    api = (tmp_path / "site" / "api" / "llama_jax.nn" / "index.html").read_text("utf-8")
    assert all(f'id="llama_jax.nn.{name}"' in api for name in ("GroupedQuery", "RMSNorm", "attend"))
    architecture = (tmp_path / "site" / "docs" / "architecture" / "index.html").read_text("utf-8")
    assert 'href="../launch/"' in architecture
    notebook = (tmp_path / "site" / "notebooks" / "objectives" / "index.html").read_text("utf-8")
    assert 'href="../objectives.ipynb"' in notebook
    assert "def packed_row" in re.sub("<[^>]*>", "", notebook)
    readme = (tmp_path / "site" / "index.html").read_text("utf-8")
    assert 'href="notebooks/quickstart/"' in readme  # the page, not the file


def test_page_of_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")
    from notebook_page import notebook_page

    make = nbformat.v4
    picture = base64.b64encode(b"pixels").decode()
    outputs = [
        make.new_output("stream", name="stdout", text="one\n"),
        make.new_output("stream", name="stdout", text="\x1b[31m```two\x1b[0m\n"),
        make.new_output("display_data", {"text/html": "<b>bar</b>", "text/plain": "bar"}),
        make.new_output("display_data", {"image/png": picture}, metadata={"image/png": {"width": 300}}),
    ]
    cells = [make.new_markdown_cell("# Title\n\n[next](other.ipynb), [file](far.ipynb)"), make.new_code_cell("1 + 1")]
    source, kept = tmp_path / "a.ipynb", tmp_path / "kept.ipynb"
    nbformat.write(make.new_notebook(cells=cells), source)

    text, figures = notebook_page(source, kept, ["a", "other"])
    assert "[next](other.md), [file](far.ipynb)" in text
    assert "1 + 1" in text
    assert figures == {}
    assert "make notebooks NOTEBOOK=a" in text

    cells[1].outputs = outputs
    nbformat.write(make.new_notebook(cells=cells, metadata={"llama_jax": "run on a day"}), kept)
    text, figures = notebook_page(source, kept, ["a"])
    assert "one\n```two\n~~~~~~" in text
    assert "<b>bar</b>" in text
    assert figures == {"a/figure-1.png": b"pixels"}
    assert '![Figure: Title](a/figure-1.png){ .notebook-output width="300" }' in text
    assert "This page was run on a day." in text

    # Changed since: what came out is of other code.
    nbformat.write(make.new_notebook(cells=[cells[0], make.new_code_cell("2 + 2")]), source)
    text, figures = notebook_page(source, kept, ["a"])
    assert "2 + 2" in text
    assert "bar" not in text
    assert figures == {}
