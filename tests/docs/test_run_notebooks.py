"""`make notebooks` keeps what a notebook shows, and nothing where a cell fails."""

import re
from pathlib import Path

import nbformat
import pytest
import run_notebooks
from nbformat.v4 import new_code_cell, new_notebook


def test_unknown_name(capsys: pytest.CaptureFixture[str]):
    assert run_notebooks.main(["quickstat"]) == 2
    assert capsys.readouterr().err == "NOTEBOOK=quickstat does not exist in notebooks/: did you mean quickstart?\n"


@pytest.mark.slow
def test_kept_or_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(run_notebooks, "FOLDER", tmp_path)
    monkeypatch.setattr(run_notebooks, "KEPT", tmp_path / "kept")
    monkeypatch.setenv("LLAMA_JAX_QUICK", "1")  # of the tests, not of `make notebooks`
    whole = "import os, tempfile\nprint(os.environ.get('LLAMA_JAX_QUICK'), tempfile.gettempdir() == os.getcwd())"
    for name, code in (("whole", whole), ("broken", "1 / 0")):
        nbformat.write(new_notebook(cells=[new_code_cell(code)]), tmp_path / f"{name}.ipynb")
    assert run_notebooks.main(["whole"]) == 0
    kept = nbformat.read(tmp_path / "kept" / "whole.ipynb", 4)
    assert kept.cells[0].outputs[0].text == "None True\n"
    line = kept.metadata["llama_jax"]
    assert re.fullmatch(r"run on 20\d\d-\d\d-\d\d in .* s \(.* s of processor time\) on \d+ cores? of .+", line)
    assert capsys.readouterr().out == f"whole: {line}\n"

    assert run_notebooks.main(["broken"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert not (tmp_path / "kept" / "broken.ipynb").exists()
