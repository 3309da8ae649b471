"""The code is as small as architecture.md says, and within its limits."""

from typing import Any

import measure_code
import pytest


@pytest.fixture(scope="module")
def measures() -> dict[str, Any]:
    return measure_code.measure()


@pytest.mark.slow
def test_page_has_what_is_measured(measures: dict[str, Any]):
    page = measure_code.PAGE.read_text("utf-8")
    assert measure_code.written(measures) == page, "run: python docs/measure_code.py"


@pytest.mark.slow
def test_a_token_passes_few_files_and_frames(measures: dict[str, Any]):
    assert {"llama_jax/training/step.py", "llama_jax/training/losses.py"} <= set(measures["to_loss"])
    assert set(measures["to_loss"]) < set(measures["train"])
    assert set(measures["to_token"]) < set(measures["load_and_sample"])
    assert len(measures["to_loss"]) <= measure_code.MAX_FILES
    assert len(measures["to_token"]) <= measure_code.MAX_FILES
    assert measures["frames"][0].endswith("train_step")
    assert any(name.endswith("Projection.__call__") for name in measures["frames"])
    assert len(measures["frames"]) <= measure_code.MAX_FRAMES


def test_functions_are_simple():
    found = measure_code.complexities(measure_code.functions())
    assert [(name, complexity) for name, complexity in found if complexity > measure_code.MAX_COMPLEXITY] == []


def test_code_is_short():
    assert measure_code.lines_by_package().total() <= measure_code.MAX_LINES
