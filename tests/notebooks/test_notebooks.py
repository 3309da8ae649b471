"""The notebooks run, show what they promise, and are what their scripts say."""

import dataclasses
import importlib.machinery
import math
import re
import sys
from pathlib import Path

import jupytext
import nbformat
import notebook_tools
import pytest
import run_notebooks

NOTEBOOKS = sorted(run_notebooks.FOLDER.glob("*.ipynb"))
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(notebook) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_there_are_notebooks():
    scripts = {path.stem for path in NOTEBOOKS[0].parent.glob("*.py") if "jupytext" in path.read_text(encoding="utf-8")}
    assert "quickstart" in scripts
    assert {path.stem for path in NOTEBOOKS} == scripts
    table = (run_notebooks.FOLDER / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\((\w+)\.ipynb\)", table)) == sorted(scripts)


@by_name
def test_some_test_runs_it(path: Path):
    assert f"test_{path.stem}_runs" in globals()


@by_name
def test_notebook_and_script_are_paired(path: Path):
    script = path.with_suffix(".py")
    assert cells(nbformat.read(path, 4)) == cells(jupytext.read(script)), (
        f"after an edit of the script: jupytext --update --to ipynb notebooks/{script.name}; "
        f"after one of the notebook: jupytext --to py:percent notebooks/{path.name}"
    )


@by_name
def test_script_hides_no_module(path: Path):
    """A kernel finds the scripts in its folder before anything that is installed."""
    root = run_notebooks.FOLDER.parent  # the tests' own folders are on the path, too
    elsewhere = [p for p in sys.path if "site-packages" in p or not Path(p).resolve().is_relative_to(root)]
    assert importlib.machinery.PathFinder.find_spec(path.stem, elsewhere) is None


@by_name
def test_outputs_are_stripped(path: Path):
    code = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert [cell.source for cell in code if cell.outputs or cell.execution_count] == []
    assert [cell.source for cell in code if "execution" in cell.metadata] == []


@dataclasses.dataclass
class Shown:
    """What a notebook's code cells show: displays by media type, the text they print, and warnings."""

    data: list[dict[str, str]]
    said: str
    warned: list[str]

    @property
    def num_figures(self) -> int:
        return sum("image/png" in data for data in self.data)


def run(name: str, tmp_path: Path) -> Shown:
    """Run a notebook in the reduced mode."""
    notebook = run_notebooks.execute(run_notebooks.FOLDER / f"{name}.ipynb", tmp_path, quick=True)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    streams = [output for output in outputs if output.output_type == "stream"]
    return Shown(
        data=[output.data for output in outputs if "data" in output],
        said="".join(output.text for output in streams if output.name == "stdout"),
        warned=[output.text for output in streams if output.name == "stderr"],
    )


@pytest.mark.slow
def test_quickstart_runs(tmp_path: Path):
    shown = run("quickstart", tmp_path)
    assert shown.warned == []
    assert shown.num_figures == 3
    # The bar at its end, one display, and not a line a step.
    bars = [data["text/html"] for data in shown.data if "<b>training</b>" in data.get("text/html", "")]
    assert ["8/8" in bar for bar in bars] == [True]
    assert not any("step 1/8" in data.get("text/html", "") for data in shown.data)
    assert "Did you mean 'model.attention.num_kv_heads'?" in shown.said
    # The table has the interval of the difference, and the same number of parameters.
    table = next(data["text/plain"] for data in shown.data if "baseline" in data.get("text/plain", ""))
    assert re.search(r"squared ReLU +[\d.]+ ± [\d.]+ +-?[\d.]+ ± [\d.]+", table)
    assert "the same in all: parameters" in table


@pytest.mark.slow
def test_tokenization_runs(tmp_path: Path):
    shown = run("tokenization", tmp_path)
    assert shown.warned == []
    assert shown.num_figures == 2
    assert sum("unknown" in data.get("text/plain", "") for data in shown.data) == 2
    assert "ab|ab|c: 0.148148 = 4/27" in shown.said
    assert "农民" in shown.said


@pytest.mark.slow
def test_objectives_runs(tmp_path: Path):
    shown = run("objectives", tmp_path)
    assert shown.warned == []
    assert shown.num_figures == 3
    assert "B follows A." in shown.said
    assert "B is from another document." in shown.said


@pytest.mark.slow
def test_sharding_runs(tmp_path: Path):
    shown = run("sharding", tmp_path)
    assert shown.warned == []
    assert shown.num_figures == 5
    gaps = [float(gap) for gap in re.findall(r"largest difference at any step (\S+)", shown.said)]
    assert len(gaps) == 3
    assert max(gaps) < 1e-5
    tables = "".join(data.get("text/plain", "") for data in shown.data)
    assert "all-gather" in tables
    assert "--optimizer.accumulation-steps" in tables


@pytest.mark.slow
def test_attention_runs(tmp_path: Path):
    shown = run("attention", tmp_path)
    assert shown.warned == []
    assert shown.num_figures == 4
    assert "MLA                36,864 bytes per token" in shown.said  # 32 layers, 512 + 64 numbers of 2 bytes
    assert "MLA has equal quality" in shown.said
    assert "MHA's bytes over MLA's)\n    measured 3.56 times\n    claimed above 1: holds" in shown.said


@pytest.mark.slow
def test_positions_runs(tmp_path: Path):
    shown = run("positions", tmp_path)
    assert shown.warned == []
    assert shown.num_figures == 6
    errors = [float(error) for error in re.findall(r"positions: (\S+)|up to (\S+)", shown.said)[0] if error]
    assert max(errors) < 1e-4
    scores = re.search(r"distance 50: .* on +(.*)", shown.said)[1].split()
    assert max(map(float, scores)) - min(map(float, scores)) < 1e-3
    assert shown.said.count("extrapolates") == 4
    assert shown.said.count("not judged: it does not use what it reads") == 2  # four steps teach nothing


@pytest.mark.slow
def test_norms_runs(tmp_path: Path):
    shown = run("norms", tmp_path)
    assert shown.warned == []
    assert shown.num_figures == 2
    assert "RMSNorm has equal quality (loss minus LayerNorm's)" in shown.said
    assert "The last layer's first gradient is larger with post-norm" in shown.said


@pytest.mark.slow
def test_feed_forwards_runs(tmp_path: Path):
    shown = run("feed_forwards", tmp_path)
    assert shown.warned == []
    assert shown.num_figures == 4
    texts = [" ".join(data.get("text/plain", "").split()) for data in shown.data]
    tables = [text for text in texts if "baseline" in text]
    assert "intermediate_size=264 for parameters 133,440, to match 133,440" in tables[0]  # 3 x 176 in 2 matrices
    assert "intermediate_size=87 for flops 849,408" in tables[1]  # half of 176, less the router
    assert "SwiGLU beats ReLU" in shown.said


@pytest.mark.slow
def test_model_kinds_runs(tmp_path: Path):
    shown = run("model_kinds", tmp_path)
    assert shown.warned == []
    assert shown.num_figures == 5
    sizes = [int(size.replace(",", "")) for size in re.findall(r"([\d,]+) parameters", shown.said)]
    assert len(sizes) == 5
    assert max(sizes) < 1.01 * min(sizes)
    assert "encoder-decoder  sees all tokens so far and all of the source; writes text" in shown.said
    assert re.search(r"n-gram +sees the last 5 tokens; writes text", shown.said)
    assert re.search(r"encoder +[\d.]+ ± [\d.]+ +[\d.]+ ± [\d.]+ +letter by letter only", shown.said)


@pytest.mark.slow
def test_released_checkpoint_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LLAMA_JAX_TEST_DATA", raising=False)  # the model is the notebook's own
    shown = run("released_checkpoint", tmp_path)
    assert shown.warned == []
    assert shown.num_figures == 3
    assert "9,856 parameters in adapters" in shown.said
    # The run, the adapters in their base and the merged export are one model, which is not the base.
    gaps = [float(gap) for gap in re.findall(r"largest difference of a logit (\S+):", shown.said)]
    assert len(gaps) == 2
    assert max(gaps) < 1e-5
    learned, kept_back = re.findall(r": ([\d.]+) before, ([\d.]+) after, nats", shown.said)
    assert float(learned[1]) < float(learned[0])
    assert kept_back != learned


def test_claims_are_judged_by_the_whole_interval():
    regions = {"holds": (0.0, 1.0), "does not hold": (0.4, 1.0), "not decided at this size": (0.2, 1.0)}
    assert {notebook_tools.judge((0.1, 0.3), region): region for region in regions.values()} == regions


def test_interval_of_the_median_is_between_values_that_cover_it():
    """Of six values the median is outside of all of them in 2 of 64 cases; five leave more than 5 %."""
    assert notebook_tools.median_interval([3, 1, 2, 6, 5, 1000]) == (1, 1000)
    assert notebook_tools.median_interval([3, 1, 2, 6, 5]) == (-math.inf, math.inf)
