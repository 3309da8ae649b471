"""The benchmarks of docs/evaluation.md: lm_eval's prompts and metrics, on local records of their data sets' form."""

import json
import re
from pathlib import Path

import lm_eval.tasks
import pytest

from llama_jax.evaluation import evaluate
from llama_jax.evaluation.harness import _folders_by_name
from llama_jax.run import Run

TASKS = Path(lm_eval.tasks.__file__).parent
PAGE = Path(__file__).parent.parent.parent / "docs" / "evaluation.md"
ARC = {"text": ["mat", "barn", "cat", "river"], "label": ["A", "B", "C", "D"]}
RECORDS = {
    "mmlu/default/mmlu_anatomy": {
        "question": "Where is it?",
        "choices": ARC["text"],
        "answer": 2,
        "subject": "anatomy",
    },
    "gsm8k/gsm8k": {"question": "What is 2 + 2?", "answer": "It is 4.\n#### 4"},
    "bbh/cot_fewshot/boolean_expressions": {"input": "not ( True ) is", "target": "False"},
    "hellaswag/hellaswag": {
        "activity_label": "Cat",
        "ctx_a": "A cat",
        "ctx_b": "it",
        "endings": ARC["text"],
        "label": "1",
    },
    "arc/arc_easy": {"question": "Where does it sit?", "choices": ARC, "answerKey": "B"},
    "arc/arc_challenge": {"question": "Where does it sit?", "choices": ARC, "answerKey": "C"},
    "super_glue/boolq/default": {"passage": "A cat sat.", "question": "did it sit", "label": 1},
    "piqa/piqa": {"goal": "sit down", "sol1": "take a mat", "sol2": "take a river", "label": 0},
    "nq_open/nq_open": {"question": "who sat on a mat", "answer": ["the cat"]},
    "triviaqa/default": {"question": "Who sat on a mat", "answer": {"aliases": ["the cat", "a cat"]}},
    "humaneval/humaneval": {"prompt": "def f(x):\n", "test": "def check(f): pass", "entry_point": "f"},
}
METRICS = {"acc", "acc_norm", "exact_match", "exact_match,strict-match", "exact_match,flexible-extract"}
METRICS |= {"exact_match,get-answer", "exact_match,remove_whitespace"}


@pytest.fixture(scope="module")
def local_tasks(task_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each benchmark as `local_N`: its own file, and records here in place of its data set."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for number, (name, record) in enumerate(RECORDS.items()):
        data = folder / f"{number}.jsonl"
        data.write_text(f"{json.dumps(record)}\n" * 9)
        splits = ", ".join(f"{split}: {data}" for split in ("train", "validation", "test", "dev"))
        text = f"include: {TASKS / name}.yaml\ntask: local_{number}\ntag: null\ndataset_path: json\n"
        text += f"dataset_name: null\ndataset_kwargs: {{data_files: {{{splits}}}}}\n"
        (folder / f"{number}.yaml").write_text(text)
    return folder


@pytest.mark.slow
def test_prompts_and_metrics_on_local_records(finished_run: Run, local_tasks: Path, tmp_path: Path):
    names = [f"local_{number}" for number in range(len(RECORDS))]
    output = tmp_path / "scores.json"
    scores = evaluate(finished_run, names, task_files=local_tasks, limit=2, output=output, quiet=True)
    *measured, code = names
    for name in measured:
        values = {key: value for key, value in scores.results[name].items() if "_stderr" not in key}
        assert values.pop("n") == 2
        assert values
        assert values.keys() <= METRICS
    assert [entry["prompt"] for entry in scores.details["tasks"][code]["texts"]] == ["def f(x):\n"] * 2
    assert len(scores.details["remarks"]) == 3  # fewer new tokens than 256 and 1024, and code that is not run


def test_names_of_the_page_are_tasks_of_lm_eval():
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`([a-z0-9_]+)`", row)}
    assert len(names) >= 11
    assert names <= _folders_by_name(TASKS).keys()
