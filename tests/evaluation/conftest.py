"""One tiny run, and task files of lm-evaluation-harness's form."""

import json
from pathlib import Path

import pytest

TASKS = {
    "tiny_pick": """
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_target: "{{label}}"
doc_to_choice: "choices"
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1.5}
""",
    "tiny_write": """
output_type: generate_until
fewshot_split: test
num_fewshot: 1
doc_to_text: "{{query}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
    "tiny_code": """
unsafe_code: true
output_type: generate_until
doc_to_text: "{{query}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: !function utils_of_code.run_it}]
filter_list: [{name: made, filter: [{function: custom, filter_fn: !function utils_of_code.made}]}]
""",
}


@pytest.fixture(scope="session")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks and their items; the functions of the one about code end the process when they are read."""
    import datasets.config

    folder = tmp_path_factory.mktemp("tasks")
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    choices = [" mat", " river", " red barn", " noise"]
    items = [{"query": "the cat sat on a", "choices": choices, "label": i % 4, "answer": "mat"} for i in range(6)]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "utils_of_code.py").write_text("raise SystemExit('code of the task ran')\n")
    for name, text in TASKS.items():
        data = f"dataset_kwargs: {{data_files: {{test: {folder}/items.jsonl}}}}"
        (folder / f"{name}.yaml").write_text(f"task: {name}\ndataset_path: json\n{data}\ntest_split: test\n{text}")
    return folder
