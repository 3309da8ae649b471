"""A run directory has one writer, its side files stop nothing, and what is not as it was is said or refused."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llama_jax.__main__ import main
from llama_jax.config import UserError, override
from llama_jax.data import prepare_corpus
from llama_jax.run import Run, RunConfig, open_run, train, training
from llama_jax.run.directory import LOCK_FILE, writing
from llama_jax.run.reporting import JsonLines
from llama_jax.tokenizers import load_tokenizer
from llama_jax.training import TrainState

HOLD = """
import sys, time
from pathlib import Path
from llama_jax.run.directory import writing
with writing(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "binary": lambda content: bytes(range(256)) * 4,
    "zeros": lambda content: bytes(len(content)),
    "other JSON": lambda content: b'[{"step": null}, 1e999]\n',
    "nested": lambda content: b"[" * 100_000 + b"\n",
    "digits": lambda content: b'{"step": ' + b"9" * 5000 + b"}\n",
}


@pytest.fixture
def trained(run_config: RunConfig, finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A copy of the finished run, whose last checkpoint is missing, and that is continued by steps of no cost."""

    def train_step(state: TrainState, *_: Any) -> Any:
        return dataclasses.replace(state, step=state.step + 1), dict.fromkeys(
            ("loss", "grad_norm", "learning_rate"), np.float32(1)
        )

    made = training.programs
    steps = {"train_step": train_step, "eval_step": lambda *_: (np.float32(1), np.float32(1))}
    monkeypatch.setattr(training, "programs", lambda config: dataclasses.replace(made(config), **steps))
    directory = shutil.copytree(finished_run.directory, tmp_path / "run")
    shutil.rmtree(directory / "checkpoints" / "12")
    return Run(directory, override(run_config, {"logging.sample_prompts": ()}))


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def test_a_directory_has_one_writer_and_a_killed_one_leaves_it(trained: Run, tally: Callable[..., None]):
    directory = trained.directory
    with subprocess.Popen([sys.executable, "-c", HOLD, directory], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        try:
            before = files_of(directory)
            with pytest.raises(UserError, match=rf"'{directory}' is written by process {holder.pid} on \S+: wait for"):
                train(trained.config, directory)
            unchanged = files_of(directory) == before
            assert open_run(directory).steps()  # readers are free
        finally:
            holder.kill()
    assert (directory / LOCK_FILE).exists()
    assert train(trained.config, directory).steps()[-1] == 12
    assert not (directory / LOCK_FILE).exists()
    tally("a second start in a run directory", "refused, and nothing changed", tried=1, held=int(unchanged))


def test_of_many_writers_one_at_a_time_goes_on(tmp_path: Path):
    """Threads as processes: each opens the file anew; the directory is removed and made again in between."""
    inside, seen, refused = [0], list[int](), [0]

    def work() -> None:
        for _ in range(40):
            try:
                with writing(tmp_path / "a" / "run"):
                    inside[0] += 1
                    seen.append(inside[0])
                    time.sleep(1e-4)
                    inside[0] -= 1
            except UserError:
                refused[0] += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {1}
    assert len(seen) + refused[0] == 160
    assert not files_of(tmp_path)


@pytest.mark.parametrize("error", [FileExistsError, FileNotFoundError])
def test_a_directory_that_is_removed_meanwhile_has_a_lock_like_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
):
    """Path.mkdir's two errors where a directory goes between its questions: no file system without locks."""
    made, errors = Path.mkdir, [error()]

    def mkdir(path: Path, *args: Any, **kwargs: Any) -> None:
        if errors:
            raise errors.pop()
        made(path, *args, **kwargs)

    with writing(tmp_path / "run"):
        monkeypatch.setattr(Path, "mkdir", mkdir)
        with pytest.raises(UserError, match="is written by process"), writing(tmp_path / "run"):
            pass
    assert not errors


@pytest.mark.slow
def test_no_side_file_stops_a_run(
    trained: Run, num_trials: Callable[[int, int], int], tally: Callable[..., None], capsys: pytest.CaptureFixture[str]
):
    """Also not `sample` and `compare`, which write nothing."""
    directory, tried, held = trained.directory, 0, 0
    kept = shutil.copytree(directory, directory.with_name("kept"))
    files = ["metrics.jsonl", "starts.jsonl", "samples.txt"]
    pairs = list(itertools.product(files, DAMAGES))
    for file, kind in pairs[:: len(pairs) // num_trials(4, len(pairs))]:
        shutil.rmtree(directory)
        shutil.copytree(kept, directory)
        content = (directory / file).read_bytes() if (directory / file).exists() else b"{}"
        (directory / file).write_bytes(DAMAGES[kind](content))
        before = files_of(directory)
        assert main(["compare", str(directory)]) == 0
        assert open_run(directory).load().model is not None
        assert files_of(directory) == before
        run = train(trained.config, directory)
        tried, held = tried + 1, held + ([line["step"] for line in run.metrics()][-4:] == [9, 10, 11, 12])
        capsys.readouterr()
    tally("a side file of a run damaged", "the run goes on, readers too", tried=tried, held=held)


@pytest.mark.parametrize("name", ["config.json", "data.json", "run.json", "tokenizer"])
def test_what_is_needed_is_one_sentence(trained: Run, name: str, capsys: pytest.CaptureFixture[str]):
    file = trained.directory / name
    file = next(file.iterdir()) if file.is_dir() else file
    for kind, damage in DAMAGES.items():
        content = file.read_bytes() if file.exists() else b"{}"
        file.write_bytes(damage(content))
        capsys.readouterr()
        assert main(["train", str(trained.directory)]) == 2, kind
        (line,) = capsys.readouterr().err.splitlines()
        assert file.name in line or "is not a run: give a config" in line, kind
        file.write_bytes(content) if name != "run.json" else file.unlink()
    if name in ("data.json", "tokenizer"):
        shutil.rmtree(file.parent) if name == "tokenizer" else file.unlink()
        with pytest.raises(UserError, match=f"{name}' is missing, which the run at step 8 had: bring it back"):
            train(trained.config, trained.directory)


def test_checkpoints_that_are_gone_are_not_begun_again(trained: Run):
    shutil.rmtree(trained.directory / "checkpoints")
    before = files_of(trained.directory)
    with pytest.raises(UserError, match="has metrics up to step 12 and no 'checkpoints': bring it back"):
        train(trained.config, trained.directory)
    assert files_of(trained.directory) == before


def test_an_index_of_rows_is_made_again(run_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = override(run_config, {"data.packing": "best_fit", "data.cache_dir": str(tmp_path / "cache")})
    first = Run(tmp_path, config)
    first.tokenizer = load_tokenizer(train_tokenizer_of(run_config, tmp_path))
    batch = first.batch(0)
    (file,) = (tmp_path / "cache").rglob("rows/*/train.json")
    for kind, damage in DAMAGES.items():
        content = file.read_bytes()
        file.write_bytes(damage(content))
        again = Run(tmp_path, config)
        again.tokenizer = first.tokenizer
        assert np.array_equal(again.batch(0)["tokens"], batch["tokens"]), kind
        assert file.read_bytes() == content
        assert f"'{file}' is damaged: it is made again" in capsys.readouterr().err


def train_tokenizer_of(config: RunConfig, folder: Path) -> Path:
    assert main(["tokenizer", "train", config.data.path[0], "--vocab-size", "300", "--output", f"{folder}/tok"]) == 0
    return folder / "tok"


def test_a_shard_that_is_cut_is_a_sentence(finished_run: Run, tmp_path: Path):
    config = override(finished_run.config, {"data.cache_dir": str(tmp_path / "cache")})
    run = Run(finished_run.directory, config)
    batch = run.batch(0)["tokens"]
    file = next(file for file in (tmp_path / "cache").rglob("train-*") if run.dataset.train[0].num_rows)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=r"'.*train-.*' was cut to .* bytes while it was read: bring it back"):
        run.batch(0)
    assert batch.shape == (8, 32)


def test_two_prepares_in_one_cache(finished_run: Run, tmp_path: Path, tally: Callable[..., None]):
    config = dataclasses.replace(finished_run.config.data, cache_dir=str(tmp_path / "cache"))
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(prepare_corpus(config, finished_run.tokenizer))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same = [corpus.content_hash == finished_run.dataset.content_hash for corpus in found] if found else []
    assert len({str(corpus.directory) for corpus in found}) == 1
    assert not list((tmp_path / "cache").rglob("*.partial*"))
    tally("two `prepare` in one cache", "the same corpus", tried=4, held=len(found))
    assert all(np.array_equal(c.train.read(0, 10**9), found[0].train.read(0, 10**9)) for c in found), same


@pytest.mark.slow
def test_a_reader_while_checkpoints_are_written(
    trained: Run, num_trials: Callable[[int, int], int], tally: Callable[..., None]
):
    """It always finds a whole one, and what it finds is loaded or is named in a sentence."""
    done, seen, wrong = threading.Event(), list[int](), list[BaseException]()

    def read() -> None:
        while not done.is_set():
            try:
                run = open_run(trained.directory)
                seen.append(run.committed_steps()[-1])
                run.read_metrics()
            except UserError:
                pass
            except BaseException as error:
                wrong.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        train(
            override(trained.config, {"checkpoint.every_steps": 1, "num_steps": 8 + num_trials(6, 32)}),
            trained.directory,
        )
    finally:
        done.set()
        thread.join()
    assert seen == sorted(seen)
    tally("a reader while a run saves", "a whole checkpoint", tried=len(seen), held=len(seen) - len(wrong))


def test_a_step_that_is_not_repeated_is_said(trained: Run, capsys: pytest.CaptureFixture[str]):
    """Steps of no cost have the loss 1, the run's had another."""
    train(trained.config, trained.directory)
    said = capsys.readouterr()
    assert "WARNING: the loss of step 9 was " in said.err
    assert "restored: step 8, 2,048 tokens seen, the data at batch 8 (epoch " in said.out
    before = open_run(trained.directory).metrics()
    shutil.rmtree(trained.directory / "checkpoints" / "12")
    train(trained.config, trained.directory)
    assert "WARNING" not in capsys.readouterr().err
    assert [line["loss"] for line in before][8:] == [1.0] * 4


def test_other_versions_and_files_are_said_or_refused(trained: Run, capsys: pytest.CaptureFixture[str]):
    starts = trained.directory / "starts.jsonl"
    (line,) = starts.read_text().splitlines()
    old = json.loads(line)
    old["versions"]["jax"], old["devices"] = "0.1.0", 3
    starts.write_text(json.dumps(old) + "\n" + line[:30])
    train(trained.config, trained.directory)
    said = capsys.readouterr().out
    assert f"changed: jax=0.1.0 -> {jax.__version__}" in said
    assert "changed: devices=3 -> 8" in said
    assert [json.loads(line)["step"] for line in starts.read_text().splitlines()] == [0, 8]


def test_a_changed_byte_of_text_or_tokenizer_is_refused(trained: Run, tmp_path: Path, tally: Callable[..., None]):
    tried = held = 0
    texts = Path(shutil.copytree(trained.config.data.path[0], tmp_path / "texts"))
    config = override(trained.config, {"data.path": (str(texts),)})
    files = [trained.directory / "tokenizer" / "tokenizer.model", *sorted(texts.iterdir())[:2]]
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        before = file.read_bytes()
        file.write_bytes(content)
        with contextlib.suppress(UserError):
            train(config, trained.directory)
            held -= 1
        tried, held = tried + 1, held + 1
        file.write_bytes(before)
    tally("a changed byte of a run's texts or tokenizer", "refused", tried=tried, held=held)


@pytest.mark.parametrize("step", [9, 12])
def test_a_directory_that_is_removed_in_mid_run(
    trained: Run, step: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    written = JsonLines.write

    def removed(self: Any, metrics: Any) -> None:
        if metrics["step"] == step:
            shutil.rmtree(trained.directory)
        written(self, metrics)

    monkeypatch.setattr(JsonLines, "write", removed)
    capsys.readouterr()
    assert main(["train", str(trained.directory), "--logging.sample-prompts", ""]) in (1, 2)
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == (
        f"error: '{trained.directory}/metrics.jsonl' is not there (No such file or directory): bring it back, or give "
        "another place"
    )
    assert len(said) == 2  # the first is of the step that is not repeated
