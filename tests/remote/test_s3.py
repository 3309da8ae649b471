"""Runs, models, tokenizers and corpora in a real object server on this machine, by s3fs."""

import logging
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

import llama_jax
from llama_jax import remote
from llama_jax.__main__ import main
from llama_jax.checkpoint import step_of, whole_steps
from llama_jax.config import UserError, override
from llama_jax.run import Preempted, Run, RunConfig, train
from llama_jax.run.preparing import first_params
from llama_jax.run.reporting import JsonLines
from llama_jax.tokenizers import load_tokenizer

SPEED = {"tokens_per_second", "mfu"}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An empty bucket, and a cache of its own."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("LLAMA_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
        fsspec.filesystem("s3").rm("bucket", recursive=True)  # all servers of a process have the same buckets
        fsspec.filesystem("s3").clear_instance_cache()
        server.stop()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test leaves a file in the current directory, such as a folder `s3:`."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    yield
    assert list(here.iterdir()) == []


def put(url: str, directory: Path) -> str:
    fsspec.filesystem("s3").put(f"{directory}/", f"{url}/", recursive=True)
    return url


def names(url: str) -> list[str]:
    return list(remote.Mirror(url).stamps())


def without_speed(run: Run) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in SPEED} for line in run.metrics()]


@pytest.mark.slow
def test_stopped_run_continues_without_its_local_copy(
    bucket: str, run_config: RunConfig, finished_run: Run, monkeypatch: pytest.MonkeyPatch
):
    url = f"{bucket}/runs/tiny"
    write = JsonLines.write

    def stop(self: JsonLines, metrics: dict[str, Any]) -> None:
        write(self, metrics)
        if metrics["step"] == 6:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(JsonLines, "write", stop)
    with pytest.raises(Preempted):
        train(run_config, url)
    monkeypatch.undo()
    assert max(whole_steps(names(url))) in (6, 7)
    assert {"config.json", "data.json", "metrics.jsonl", "tokenizer/tokenizer.model"} <= set(names(url))

    shutil.rmtree(os.environ["LLAMA_JAX_CACHE"])
    run = train(run_config, url)
    assert whole_steps(names(url)) == finished_run.steps() == llama_jax.open_run(url).steps()
    assert {step_of(name) for name in names(url)} == {None, *finished_run.steps()}
    assert without_speed(llama_jax.open_run(url)) == without_speed(run) == without_speed(finished_run)
    shutil.rmtree(os.environ["LLAMA_JAX_CACHE"])
    expected, found = finished_run.load().model.params(), llama_jax.load(url).model.params()
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(value))
    first = finished_run.steps()[0]
    value = llama_jax.open_run(Path(url)).load(first).model.params()["embedding.weight"]  # pathlib joins slashes
    np.testing.assert_array_equal(
        np.asarray(value), np.asarray(finished_run.load(first).model.params()["embedding.weight"])
    )
    assert "samples.txt" in names(url)


def test_another_run_is_refused_by_url(bucket: str, run_config: RunConfig, finished_run: Run):
    url = put(f"{bucket}/other", finished_run.directory)
    with pytest.raises(UserError, match="holds a run with seed=0, not 1") as refused:
        train(override(run_config, {"seed": 1}), url)
    assert remote.with_urls(str(refused.value)).startswith(f"'{url}' holds a run")
    fsspec.filesystem("s3").pipe("bucket/notes/todo.txt", b"buy milk")
    with pytest.raises(UserError, match="s3://bucket/notes' is not empty and not a run"):
        train(run_config, f"{bucket}/notes")
    assert names(f"{bucket}/notes") == ["todo.txt"]


@pytest.mark.slow
def test_sample_convert_init_from_and_tokenizer(
    bucket: str, finished_run: Run, run_config: RunConfig, capsys: pytest.CaptureFixture[str]
):
    url = put(f"{bucket}/runs/finished", finished_run.directory)
    assert main(["sample", url, "--prompt", "the cat", "--max-new-tokens", "5", "--tokenizer", f"{url}/tokenizer"]) == 0
    assert capsys.readouterr().out.startswith("the cat")
    assert main(["convert", url, f"{bucket}/hf", "--to", "hf"]) == 0
    assert main(["convert", f"{bucket}/hf", f"{bucket}/native", "--to", "native"]) == 0
    assert main(["convert", url, f"{bucket}/hf", "--to", "hf"]) == 2
    assert "'s3://bucket/hf' exists already" in capsys.readouterr().err
    lm = llama_jax.load(f"{bucket}/native")
    for name, value in finished_run.load().model.params().items():
        np.testing.assert_array_equal(np.asarray(lm.model.params()[name]), np.asarray(value))
    assert lm.tokenizer is not None
    text = "the cat <s> sat"  # an export has another file that does the same
    for path in (f"{bucket}/native/tokenizer", f"{bucket}/native/tokenizer/tokenizer.json"):
        assert load_tokenizer(path).fingerprint == lm.tokenizer.fingerprint
    assert lm.tokenizer.encode_prompt(text) == finished_run.tokenizer.encode_prompt(text)
    llama_jax.save(lm, f"{bucket}/saved")
    changes = {"init_from": f"{bucket}/saved", "tokenizer.path": f"{bucket}/native/tokenizer"}
    params, _ = first_params(override(run_config, changes))
    np.testing.assert_array_equal(np.asarray(params["norm.weight"]), np.asarray(lm.model.params()["norm.weight"]))


def test_corpora(bucket: str, run_config: RunConfig, finished_run: Run, tmp_path: Path, capsys):
    texts = put(f"{bucket}/texts", Path(run_config.data.path[0]))
    tokenizer = put(f"{bucket}/tokenizer", finished_run.directory / "tokenizer")
    command = ["prepare", texts, "--tokenizer", tokenizer, "--validation-fraction", "0.2"]
    assert main([*command, "--output", str(tmp_path / "local")]) == 0
    expected = capsys.readouterr().out.splitlines()
    url = f"{bucket}/tokenized"
    assert main([*command, "--output", url, "--shards", "0"]) == 0
    assert capsys.readouterr().out == f"{url}\n"
    assert "shard-00000.json" in names(url)
    assert "index.json" not in names(url)
    shutil.rmtree(os.environ["LLAMA_JAX_CACHE"])  # as on another host
    assert main([*command, "--output", url]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == [url, *expected[1:3]]
    store = fsspec.filesystem("s3")
    for name in names(url):
        assert store.cat(f"bucket/tokenized/{name}") == (tmp_path / "local" / name).read_bytes(), name
    assert main([*command, "--cache-dir", f"{bucket}/cache"]) == 0
    assert capsys.readouterr().out.startswith(f"{bucket}/cache/corpora/")
    shutil.rmtree(os.environ["LLAMA_JAX_CACHE"])
    assert main([*command, "--cache-dir", f"{bucket}/cache"]) == 0  # found there, not made again
    assert "tokens/s" not in capsys.readouterr().out
    capsys.readouterr()
    train_command = ["tokenizer", "train", f"{texts}/00.txt", "--vocab-size", "290", "--output", f"{bucket}/trained"]
    assert main(train_command) == 0
    assert capsys.readouterr().out == f"{bucket}/trained/tokenizer.model: bpe, 290 tokens\n"
    assert main(["tokenizer", "encode", f"{bucket}/trained", "the cat"]) == 0


@pytest.mark.parametrize(
    "command", [["sample", "{}"], ["tokenizer", "encode", "{}", "a"], ["convert", "{}", "x", "--to", "hf"]]
)
def test_what_is_not_there_is_said(bucket: str, command: list[str], capsys: pytest.CaptureFixture[str]):
    for url in (f"{bucket}/nothing", "s3://no-such-bucket/model"):
        assert main([word.format(url) for word in command]) == 2
        assert f"'{url}' does not exist" in capsys.readouterr().err


def test_no_bucket_to_write_to(bucket: str, run_config: RunConfig):
    with pytest.raises(UserError, match=r"'s3://no-such-bucket/run' cannot be written .*bucket does not exist"):
        train(run_config, "s3://no-such-bucket/run")
