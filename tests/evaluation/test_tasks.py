"""Tasks of lm-evaluation-harness from local files of its form, by `evaluate`, the command, and the callback."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest

import llama_jax
from llama_jax.__main__ import main
from llama_jax.config import UserError
from llama_jax.evaluation import Evaluation, HarnessLM, evaluate
from llama_jax.run import Run

NAMES = ["tiny_pick", "tiny_write", "tiny_code"]


@pytest.fixture(scope="module")
def scores(finished_run: Run, task_files: Path, tmp_path_factory: pytest.TempPathFactory):
    output = tmp_path_factory.mktemp("scores") / "scores.json"
    return evaluate(finished_run, NAMES, task_files=task_files, limit=4, output=output, quiet=True)


def test_numbers_by_task_and_metric(scores):
    pick = scores.results["tiny_pick"]
    assert pick["acc"] == 0.25  # one answer for all, and every label once
    assert pick["acc_stderr"] == pytest.approx(0.25)  # sqrt(p (1 - p) / (n - 1))
    assert pick["n"] == 4
    assert scores.results["tiny_write"].keys() == {"exact_match", "exact_match_stderr", "n"}
    saved = json.loads(scores.path.read_text())
    assert saved["results"] == scores.results
    task = saved["tasks"]["tiny_pick"]
    assert task["version"] == 1.5
    assert (task["items"], task["items_of_task"]) == (4, 6)
    assert len(task["hash"]) == 64
    assert saved["tasks"]["tiny_write"]["num_fewshot"] == 1
    assert saved["versions"].keys() == {"llama_jax", "jax", "lm_eval"}
    assert scores.metrics()["eval/tiny_pick/acc"] == 0.25
    cells = re.findall("<td[^>]*>([^<]*)</td>", scores._repr_html_())
    assert ["tiny_pick", "acc", "0.2500", "0.2500", "4"] in [cells[i : i + 5] for i in range(0, len(cells), 5)]
    assert ["tiny_pick", "acc", "0.2500", "0.2500", "4"] in [line.split() for line in repr(scores).splitlines()]
    assert {"name": "tiny_pick", "metric": "acc", "value": 0.25, "stderr": 0.25, "n": 4} in scores.records()


def test_code_of_a_task_is_not_run(scores):
    """The fixture's functions would end the process; the texts that the model wrote are kept."""
    assert [len(entry["text"]) > 0 for entry in scores.details["tasks"]["tiny_code"]["texts"]] == [True] * 4
    assert any("only the texts are kept" in remark for remark in scores.details["remarks"])


def test_choices_after_one_context_are_one_row(finished_run: Run):
    lm = HarnessLM(finished_run.load(), batch_size=8)
    rows = []
    score = lm.scorer.score
    lm.scorer.score = lambda given: rows.extend(given) or score(given)  # type: ignore[method-assign]
    best = int(np.asarray(lm.lm.model(np.array([[5, 6, 7]])))[0, -1].argmax())
    found = lm._loglikelihood_tokens([(None, [5, 6, 7], [i]) for i in (8, 9, 10, best)])
    assert [(list(inputs), list(choices)) for inputs, choices in rows] == [([5, 6, 7], [8, 9, 10, best])]
    assert [greedy for _, greedy in found] == [False, False, False, True]
    alone = [lm._loglikelihood_tokens([(None, [5, 6, 7], [i])])[0] for i in (8, 9, 10, best)]
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in alone], rel=1e-6)


def test_the_command_prints_its_table_alone(finished_run: Run, task_files: Path, tmp_path: Path, capfd):
    level = logging.root.manager.disable
    output = tmp_path / "scores.json"
    command = ["evaluate", str(finished_run.directory), "--tasks", "tiny_pick", "--task-files", str(task_files)]
    assert main([*command, "--limit", "4", "--num-fewshot", "0", "--output", str(output), "--mesh.fsdp", "8"]) == 0
    found = capfd.readouterr()
    lines = [line.split() for line in found.out.splitlines()]
    assert lines[0][:3] == ["evaluation", "metric", "value"]
    assert ["tiny_pick", "acc", "0.2500", "0.2500", "4"] in lines
    assert len(lines) == 3
    assert found.err.splitlines()[-1] == f"written to {output}"
    assert "it/s" not in found.err
    assert logging.root.manager.disable == level


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ("tiny_pik", "there is no task 'tiny_pik' in lm_eval, nor in --task-files: did you mean 'tiny_pick'"),
        ("hellaswga", "there is no task 'hellaswga' in lm_eval, nor in --task-files: did you mean 'hellaswag'"),
    ],
)
def test_unknown_tasks(finished_run: Run, task_files: Path, names: str, sentence: str, capsys):
    command = ["evaluate", str(finished_run.directory), "--tasks", names, "--task-files", str(task_files), "--quiet"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_a_missing_data_set_is_a_sentence(finished_run: Run, task_files: Path, tmp_path: Path):
    text = (task_files / "tiny_pick.yaml").read_text().replace("items.jsonl", "absent.jsonl")
    (tmp_path / "lost.yaml").write_text(text.replace("task: tiny_pick", "task: lost"))
    with pytest.raises(UserError, match=r"the data of task 'lost' \(json\) cannot be loaded \(FileNotFoundError"):
        evaluate(finished_run, "lost", task_files=tmp_path, quiet=True)


def test_evaluation_in_training(finished_run: Run, task_files: Path, tmp_path: Path):
    callback = Evaluation(every_steps=2, tasks="tiny_pick", task_files=task_files, limit=2)
    config = llama_jax.override(finished_run.config, {"num_steps": 3, "logging.sample_prompts": ()})
    run = llama_jax.train(config, tmp_path / "run", callbacks=(callback,), quiet=True)
    found = {entry["step"]: entry.get("eval/tiny_pick/acc") for entry in run.metrics()}
    assert {step for step, acc in found.items() if acc is not None} == {2, 3}
    files = sorted((run.directory / "evaluations").iterdir())
    assert [json.loads(file.read_text())["step"] for file in files] == [2, 3]
    last = evaluate(run, "tiny_pick", task_files=task_files, limit=2, output=tmp_path / "x.json", quiet=True)
    assert json.loads(files[-1].read_text())["results"] == last.results


def test_other_models_are_refused(finished_run: Run, tmp_path: Path):
    marian = llama_jax.load(Path(__file__).parent.parent / "directories" / "goldens" / "marian", dtype="float32")
    bert = llama_jax.load(Path(__file__).parent.parent / "directories" / "goldens" / "bert", dtype="float32")
    for lm, advice in ((marian, "BLEU"), (bert, "classifier")):
        with pytest.raises(UserError, match=advice):
            evaluate(lm, "hellaswag", quiet=True)
        with pytest.raises(UserError, match=advice):
            evaluate(lm, texts=__file__, quiet=True)
