"""The notebooks run, show what they promise, and are what their scripts say."""

import os
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(notebook) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_there_are_notebooks():
    scripts = {path.stem for path in NOTEBOOKS[0].parent.glob("*.py") if "jupytext" in path.read_text(encoding="utf-8")}
    assert "quickstart" in scripts
    assert {path.stem for path in NOTEBOOKS} == scripts


@by_name
def test_notebook_and_script_are_paired(path: Path):
    script = path.with_suffix(".py")
    assert cells(nbformat.read(path, 4)) == cells(jupytext.read(script)), (
        f"after an edit of the script: jupytext --update --to ipynb notebooks/{script.name}; "
        f"after one of the notebook: jupytext --to py:percent notebooks/{path.name}"
    )


@by_name
def test_outputs_are_stripped(path: Path):
    code = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert [cell.source for cell in code if cell.outputs or cell.execution_count] == []
    assert [cell.source for cell in code if "execution" in cell.metadata] == []


def run(name: str, tmp_path: Path) -> tuple[list, str, list[str]]:
    """What a notebook's code cells show, print, and warn of."""
    notebook = nbformat.read(next(path for path in NOTEBOOKS if path.stem == name), 4)
    # One device: what a notebook has on a laptop.
    env = os.environ | {"LLAMA_JAX_QUICK": "1", "TMPDIR": str(tmp_path), "XLA_FLAGS": ""}
    # Jupyter starts a kernel in the notebook's folder, where its helper modules are.
    env["PYTHONPATH"] = os.pathsep.join([str(NOTEBOOKS[0].parent), os.environ.get("PYTHONPATH", "")])
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(env=env, cwd=str(tmp_path))
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.data for output in outputs if "data" in output]
    said = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    warned = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    return shown, said, warned


@pytest.mark.slow
def test_quickstart_runs(tmp_path: Path):
    shown, said, warned = run("quickstart", tmp_path)
    assert warned == []
    assert sum("image/png" in data for data in shown) == 3
    # The bars at their ends, one display each, and not a line a step.
    bars = [data["text/html"] for data in shown if "<b>training</b>" in data.get("text/html", "")]
    assert ["8/8" in bar for bar in bars] == [True, True]
    assert not any("step 1/8" in data.get("text/html", "") for data in shown)
    assert "Did you mean 'model.attention.num_kv_heads'?" in said
    assert said.count("held-out loss") == 2
    assert "SquaredReLUModule" in said


@pytest.mark.slow
def test_tokenizers_and_objectives_runs(tmp_path: Path):
    shown, said, warned = run("tokenizers_and_objectives", tmp_path)
    assert warned == []
    assert sum("image/png" in data for data in shown) == 4
    assert sum("unknown" in data.get("text/plain", "") for data in shown) == 2
    assert "ab|ab|c: 0.148148 = 4/27" in said
    assert "B follows A." in said
    assert "B is from another document." in said
