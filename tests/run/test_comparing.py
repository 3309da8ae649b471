"""Runs compared: what differs, what is best, seeds as one row; what the command prints, and its mistakes."""

import json
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_jax.__main__ import main
from llama_jax.run import Run, compare_runs, differing_keys, rows_of

type Make = Callable[..., Path]


@pytest.fixture
def make(finished_run: Run, tmp_path: Path) -> Make:
    """Return a function that makes a run with these keys, and with a validation loss that falls to `best`."""

    def run(
        name: str, keys: dict[str, Any] | None = None, best: float = 2.0, steps: int = 12, bits: bool = True
    ) -> Path:
        folder = tmp_path / "runs" / name
        config = json.loads((finished_run.directory / "config.json").read_text())
        for key, value in (keys or {}).items():
            *path, last = key.split(".")
            part = config
            for part_name in path:
                part = part[part_name]
            part[last] = value
        shutil.copytree(finished_run.directory / "tokenizer", folder / "tokenizer")
        shutil.copy(finished_run.directory / "data.json", folder)
        (folder / "config.json").write_text(json.dumps(config))
        with (folder / "metrics.jsonl").open("w") as file:
            for step in range(1, steps + 1):
                line = {"step": step, "loss": best + 1 / step, "tokens_per_second": 1000.0 * step}
                if step % 3 == 0:
                    line["val_loss"] = best + abs(step - 9) / 10
                    line |= {"val_bits_per_byte": best / 2} if bits else {}
                file.write(json.dumps(line) + "\n")
        return folder

    return run


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The output of a comparison that succeeds."""
    capsys.readouterr()
    assert main(["compare", *map(str, words)]) == 0
    found = capsys.readouterr()
    assert found.err == ""
    return found.out


def rows(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    return json.loads(printed(capsys, *words, "--json"))["rows"]


def test_best_run_is_first_and_has_what_differs(make: Make, capsys: pytest.CaptureFixture[str]):
    a = make("a", {"optimizer.learning_rate": 0.5, "logging.every_steps": 7}, best=2.5)
    b = make("b", {"model.hidden_size": 64, "model.attention.dropout": 0.1, "model.dropout": 0.2}, best=1.5)
    c = make("c", best=2.0)
    [first, second, third] = rows(capsys, a, b, c)
    assert [row["name"] for row in (first, second, third)] == ["b", "c", "a"]
    assert set(first["config"]) == {
        "optimizer.learning_rate", "model.hidden_size", "model.attention.dropout", "model.dropout"
    }  # fmt: skip
    assert third["config"]["optimizer.learning_rate"] == 0.5
    assert (first["mean"]["best"], first["mean"]["best_step"]) == (1.5, 9)
    assert first["mean"]["last"] == pytest.approx(1.8)
    assert first["num_parameters"] != second["num_parameters"] == third["num_parameters"]
    header, *lines = printed(capsys, a, b, c).splitlines()
    assert header.split()[:6] == ["run", "hidden_size", "attention.dropout", "model.dropout", "learning_rate", "params"]
    assert [line.split()[0] for line in lines[:3]] == ["b", "c", "a"]
    assert "every_steps" not in header
    assert "every_steps" in printed(capsys, a, b, c, "--all").splitlines()[0]


def test_seeds_are_one_row(make: Make, capsys: pytest.CaptureFixture[str]):
    losses = [2.0, 2.3, 2.1]
    for seed, best in enumerate(losses):
        make(f"wide-s{seed}", {"seed": seed}, best)
    other = make("narrow", {"model.hidden_size": 64, "seed": 5}, best=2.05)
    folder = other.parent
    [one, group] = rows(capsys, folder)
    assert (one["name"], group["name"], len(group["runs"])) == ("narrow", "wide-s*", 3)
    assert group["mean"]["best"] == pytest.approx(statistics.fmean(losses))
    assert group["std"]["best"] == pytest.approx(statistics.stdev(losses))
    assert (one["std"]["best"], "seed" in group["config"]) == (None, False)
    assert "wide-s* n=3" in (text := printed(capsys, folder))
    assert "2.1333 ±0.15 @9" in text
    assert [row["name"] for row in rows(capsys, folder, "--all")] == ["wide-s0", "narrow", "wide-s2", "wide-s1"]


def test_numbers_of_a_row(make: Make):
    [record] = compare_runs([make("a")])
    numbers = record.numbers("val_loss")
    assert numbers["loss"] == pytest.approx(statistics.fmean(2 + 1 / step for step in range(3, 13)))
    assert numbers["tokens_per_second"] == 6500
    tokens = record.config["global_batch_size"] * record.config["sequence_length"]
    assert numbers["seconds"] == pytest.approx(sum(tokens / (1000 * step) for step in range(1, 13)))
    assert record.numbers("tokens_per_second")["best"] == 12000  # the most is the best


def test_paths_of_all_kinds_name_each_run_once(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("a", "b", "deep/a"):
        make(name)
    monkeypatch.chdir(tmp_path)
    assert [run.name for run in compare_runs(["runs"])] == ["a", "b"]
    assert [run.name for run in compare_runs(["runs/?", "runs/a/metrics.jsonl", "runs/b/checkpoints", "runs/b/"])] == [
        "a", "b"
    ]  # fmt: skip
    assert [run.name for run in compare_runs(["runs/a", Path("runs/deep/a")])] == ["runs/a", "deep/a"]
    assert compare_runs([f"file://{tmp_path}/runs/a"])[0].metrics


def test_runs_that_go_on_or_have_nothing_yet(make: Make, capsys: pytest.CaptureFixture[str]):
    going, new, broken = make("going", best=1.9), make("new"), make("broken", best=1.8)
    with (going / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "loss": 1.')
    for name in ("metrics.jsonl", "data.json"):
        (new / name).unlink()
    shutil.rmtree(new / "tokenizer")
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "loss": null}\n')
    assert [(row["name"], row["mean"]["step"]) for row in rows(capsys, going, new, broken, "--all")] == [
        ("broken", 13), ("going", 12), ("new", 0)
    ]  # fmt: skip
    assert "note: broken: the loss is not finite at step 13" in (text := printed(capsys, going, new, broken, "--all"))
    assert "0/12" in text
    assert "new" in printed(capsys, new)


def test_other_tokenizers_are_compared_by_bytes(make: Make, capsys: pytest.CaptureFixture[str]):
    a, b = make("a"), make("b", {"tokenizer.vocab_size": 299}, best=1.0)
    # Only what surrounds a prompt, as the objectives of encoder-decoders have it: the tokens are the same.
    (b / "tokenizer" / "prompt_rule.json").write_text('{"prefix_ids": [], "suffix_ids": [3]}')
    assert "tokenizers differ" not in printed(capsys, a, b)
    file = next(file for file in (b / "tokenizer").iterdir() if file.name != "prompt_rule.json")
    file.write_bytes(file.read_bytes() + b"\n")
    text = printed(capsys, a, b)
    assert "val_bits_per_byte" in text.splitlines()[0]
    assert "tokenizers differ: losses are per token of different vocabularies and cannot be compared" in text
    c = make("c", {"tokenizer.vocab_size": 298}, bits=False)
    assert "best val_loss" in printed(capsys, a, b, c).splitlines()[0]


def test_keys_of_an_older_version(make: Make):
    old, new, changed = make("old"), make("new"), make("changed", {"model.dropout": 0.1})
    config = json.loads((old / "config.json").read_text())
    del config["model"]["dropout"], config["resume"]
    (old / "config.json").write_text(json.dumps(config))
    assert differing_keys(compare_runs([old, new]), every=True) == {}
    assert list(differing_keys(compare_runs([old, changed]))) == ["model.dropout"]
    assert len(rows_of(compare_runs([old, new]), "loss")) == 2


def test_a_class_from_outside_is_shown_without_its_parameters(make: Make, capsys: pytest.CaptureFixture[str]):
    a, b = make("a"), make("b")
    config = json.loads((b / "config.json").read_text())
    config["model"]["attention"] = {"type": "Mine", "heads": 3}
    (b / "config.json").write_text(json.dumps(config))
    found = {row["name"]: row for row in rows(capsys, a, b)}
    assert found["b"]["num_parameters"] is None
    assert found["b"]["config"] == {"model.attention": "Mine"}


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit_the_terminal(make: Make, capsys: pytest.CaptureFixture[str], width: int, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    for i in range(9):
        keys = {"optimizer.learning_rate": 10.0**-i, "data.path": ["a-folder/with/a/long/name/indeed/" + str(i)]}
        make(f"run-of-some-length-{i}", keys, best=i)
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed(capsys, make("last").parent))
    assert max(map(len, text.splitlines())) <= width
    for title in ("learning_rate", "best val_loss", "tokens/s", "time"):
        assert title in text
    assert "drawn: the best 7 of 10" in text
    assert "val_loss (nats per token)" in text


def test_many_keys_are_lines(make: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    learning = {"learning_rate": 0.5, "warmup_steps": 7, "weight_decay": 0.3, "clip_norm": 3.0, "beta2": 0.5}
    b = make("b", {f"optimizer.{key}": value for key, value in learning.items()} | {"sequence_length": 16})
    lines = printed(capsys, make("a"), b).splitlines()
    assert lines[0].split() == ["key", "a", "b"]
    assert [line.split()[0] for line in lines[1:7]] == [*learning, "sequence_length"]
    assert lines[1].split() == ["learning_rate", "0.01", "0.5"]


def test_image(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert f"curves: {tmp_path}/a.png" in printed(capsys, make("a"), make("b"), "--png", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "the following arguments are required: RUN"),
        ("absent", "there is nothing at 'absent': give the directories of runs"),
        ("no*", "there is nothing at 'no*'"),
        ("empty", "has no run: give the directories of runs"),
        ("a --metric val_los", "no run has the metric 'val_los': did you mean 'val_loss'?"),
        ("a --metric speed", "no run has the metric 'speed': they have loss, tokens_per_second,"),
        ("a --png absent/a.png", "--png=absent/a.png cannot be written"),
        ("a --png a.txt", "--png=a.txt cannot be written"),
        ("a --png s3://bucket/a.png", "--png=s3://bucket/a.png must be a local file"),
        ("damaged", "is not valid JSON"),
    ],
)
def test_mistakes(make: Make, words: str, sentence: str, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(make("a").parent)
    Path("empty").mkdir()
    (make("damaged") / "config.json").write_text("{")
    assert main(["compare", *words.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert sentence in said
    assert said.count("\n") == 1
