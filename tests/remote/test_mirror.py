"""Mirrors of a store: only what has changed moves, and an upload that stops anywhere leaves what was whole whole."""

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from llama_jax import load, open_run, remote
from llama_jax.checkpoint import COMMIT_FILE, model_files, newest_good, run_files, step_of, whole_steps, write_manifest
from llama_jax.config import UserError
from llama_jax.parallel import distributed
from llama_jax.remote import Mirror, is_remote, local_copy, uploaded, url_of
from llama_jax.run import Run
from llama_jax.run.stored import StoredRun, local_run

URL = "memory://bucket/model"


class Killed(BaseException):
    """What ends a process at once."""


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    yield memory
    for name in memory.ls("/", detail=False):
        memory.rm(name, recursive=True)


def put(store, name: str, content: bytes | str) -> None:
    store.pipe(f"/bucket/{name}", content.encode() if isinstance(content, str) else content)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def stored(store, name: str) -> dict[str, bytes]:
    return {path.removeprefix(f"/bucket/{name}/"): store.cat(path) for path in store.find(f"/bucket/{name}")}


@pytest.mark.parametrize(
    "path", ["s3://b/x", "gs://b/x", "hf://a/b@main/c", "https://h/x.bin", "memory://x", "zip::s3://b/x"]
)
def test_urls_are_known_also_after_pathlib(path: str):
    assert is_remote(path)
    assert is_remote(Path(path))
    assert url_of(path) == url_of(Path(path)) == path


@pytest.mark.parametrize("path", ["runs/a", "/a/b:c/d", "c:/a", "./s3:/b", "a.b", "name: x", ""])
def test_local_paths_stay(path: str):
    assert not is_remote(path)
    assert local_copy(path) == Path(path)


def test_file_urls_are_local_paths(tmp_path: Path):
    for url in (f"file://{tmp_path}/x", Path(f"file://{tmp_path}/x"), f"local://{tmp_path}/x"):
        assert local_copy(url) == tmp_path / "x"


def test_only_what_has_changed_is_fetched(store, monkeypatch: pytest.MonkeyPatch):
    put(store, "model/config.json", "{}")
    put(store, "model/deep/er/a.bin", b"\0" * 1000)
    assert contents(local_copy(URL)) == stored(store, "model")
    fetched = []
    get = type(store).get_file
    monkeypatch.setattr(type(store), "get_file", lambda *args, **kw: (fetched.append(args[1]), get(*args, **kw)))
    local = local_copy(URL)
    assert fetched == []
    put(store, "model/config.json", "[]")
    put(store, "model/new", "x")
    store.rm("/bucket/model/deep/er/a.bin")
    (local / "spoiled").write_text("not of the store")
    assert contents(local_copy(URL)) == {"config.json": b"[]", "new": b"x", "spoiled": b"not of the store"}
    assert sorted(fetched) == ["/bucket/model/config.json", "/bucket/model/new"]
    (local / "new").write_text("y")  # somebody's edit of the copy
    assert (local_copy(URL) / "new").read_text() == "x"
    store.rm("/bucket/model", recursive=True)
    put(store, "model", "now a file")
    assert local_copy(URL).read_text() == "now a file"


def test_broken_download_leaves_no_half_file(store, monkeypatch: pytest.MonkeyPatch):
    put(store, "model/a", b"1" * 100)

    def half(self, rpath: str, lpath: str, **kw) -> None:
        Path(lpath).write_bytes(b"1" * 50)
        raise OSError("connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "get_file", half)
        with pytest.raises(UserError, match=r"model/a' cannot be read \(connection reset\)"):
            local_copy(URL)
        assert not [file for file in Path(os.environ["LLAMA_JAX_CACHE"]).rglob("*") if file.suffix == ".partial"]
    assert (local_copy(URL) / "a").read_bytes() == b"1" * 100


def test_names_that_lead_elsewhere_are_refused(store):
    put(store, "model/a", "x")
    store.store["/bucket/model/../../evil"] = store.store["/bucket/model/a"]
    try:
        with pytest.raises(UserError, match="no path below it"):
            local_copy(URL)
    finally:
        del store.store["/bucket/model/../../evil"]


def test_uploads_are_all_or_nothing_to_a_reader(store):
    put(store, "old/a", "x")
    with pytest.raises(UserError, match="'memory://bucket/old' exists already"), uploaded("memory://bucket/old"):
        raise AssertionError("nothing is made")
    with pytest.raises(Killed), uploaded(URL) as folder:
        raise Killed((folder / "config.json").write_text("{}"))
    assert store.find("/bucket") == ["/bucket/old/a"]
    with uploaded(URL, last=("config.json",)) as folder:
        for name in ("a", "config.json", "z/b"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)
    assert stored(store, "model") == {name: name.encode() for name in ("a", "config.json", "z/b")}
    assert list(Path(os.environ["LLAMA_JAX_CACHE"]).glob("upload-*")) == []


@pytest.mark.parametrize("url", ["hf://someone/model", "https://example.org/model"])
def test_read_only_stores_are_refused_before_anything_is_made(url: str, tmp_path: Path):
    for make in (lambda: uploaded(url).__enter__(), lambda: StoredRun(url)):
        with pytest.raises(UserError, match="can only be read, not written"):
            make()
    assert list(tmp_path.rglob("*")) == []


def test_a_whole_directory_of_others_is_not_fetched():
    names = [
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "tf_model.h5",
        "onnx/model.onnx",
        "original/a.pth",
    ]
    assert model_files(names) == ["config.json", "model.safetensors"]
    assert model_files([*names, "consolidated.safetensors"]) == ["config.json", "model.safetensors"]
    assert model_files(["config.json", "pytorch_model.bin"]) == ["config.json", "pytorch_model.bin"]
    for unlike in (
        "consolidated.safetensors",
        "voice.safetensors",
    ):  # of which the weights are not known to be the same
        both = ["config.json", "pytorch_model.bin", unlike]
        assert model_files(both) == both
    steps = [f"checkpoints/{step}/{name}" for step in (4, 8) for name in (COMMIT_FILE, "metrics/m", "state/d/x")]
    half = ["checkpoints/12/state/d/x", "checkpoints/12/metrics/m", "checkpoints/16.orbax-checkpoint-tmp/state/d/x"]
    names = ["config.json", *steps, *half]
    assert run_files(names) == [name for name in ["config.json", *steps] if name != "checkpoints/4/state/d/x"]
    assert run_files(names, 4) == [name for name in ["config.json", *steps] if name != "checkpoints/8/state/d/x"]
    assert run_files(names, arrays=False) == [name for name in ["config.json", *steps] if "state" not in name]


# A run in a store, without the run: its files as a loop and Orbax would write them.


def write_step(directory: Path, step: int) -> None:
    for name in (COMMIT_FILE, "metrics/metrics", "state/a", f"state/d/{os.urandom(4).hex()}"):
        file = directory / "checkpoints" / str(step) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{name} of {step}, {os.urandom(4).hex()}")
    write_manifest(directory / "checkpoints" / str(step), step)
    if not (directory / "config.json").exists():
        (directory / "config.json").write_text("{}")
    (directory / "metrics.jsonl").write_text("".join(f"{i}\n" for i in range(step)))
    (directory / f"checkpoints/{step + 4}.orbax-checkpoint-tmp").mkdir()
    (directory / f"checkpoints/{step + 4}.orbax-checkpoint-tmp" / COMMIT_FILE).write_text("not whole")


def test_store_has_a_whole_checkpoint_wherever_an_upload_stops(store, monkeypatch: pytest.MonkeyPatch):
    """Every single operation on the store is the last one once; then another machine continues."""
    url, versions = "memory://bucket/run", {}

    def check(least: int) -> None:
        there = stored(store, "run")
        steps = whole_steps(there)
        assert steps[-1:] >= [least]
        for step in steps:  # and all of it is of one version
            assert {n: v for n, v in there.items() if step_of(n) == step} in versions[step]

    def saved(run: StoredRun, step: int) -> None:
        write_step(run.directory, step)
        for old in (run.directory / "checkpoints").glob("[0-9]*"):
            if old.name.isdigit() and int(old.name) < step - 4:
                shutil.rmtree(old)
        files = contents(run.directory)
        versions.setdefault(step, []).append({n: v for n, v in files.items() if step_of(n) == step})

    def with_budget(operations: int):
        count = itertools.count(1)

        def limited(original):
            def call(*args, **kwargs):
                if next(count) > operations:
                    raise Killed
                return original(*args, **kwargs)

            return call

        for name in ("put_file", "rm_file"):
            patch.setattr(type(store), name, limited(getattr(type(store), name)))

    monkeypatch.setattr(remote, "_TRANSFERS", 1)
    first = StoredRun(url)
    for step in (4, 8):
        saved(first, step)
        assert first.upload()
    check(8)
    assert whole_steps(stored(store, "run")) == [4, 8]
    for operations in range(20):
        shutil.rmtree(os.environ["LLAMA_JAX_CACHE"])  # another machine
        run = StoredRun(url)
        before = whole_steps(stored(store, "run"))
        assert whole_steps(run_files(contents(run.directory))) == before
        latest = {n: v for n, v in contents(run.directory).items() if step_of(n) == before[-1]}
        assert latest in versions[before[-1]]
        saved(run, before[-1] + 4)
        with monkeypatch.context() as patch:
            with_budget(operations)
            try:
                assert run.upload()
            except Killed:
                check(before[-1])
            else:
                assert whole_steps(stored(store, "run")) == [before[-1], before[-1] + 4]
                assert stored(store, "run")["metrics.jsonl"].count(b"\n") == before[-1] + 4
                break
    else:
        raise AssertionError("an upload takes fewer operations")
    assert operations > 8
    check(before[-1] + 4)
    assert {step_of(name) for name in stored(store, "run")} == {None, before[-1], before[-1] + 4}
    assert not any("tmp" in name for name in stored(store, "run"))


def test_a_checkpoint_that_is_damaged_in_the_store_is_kept_and_the_one_before_is_continued(store):
    url = "memory://bucket/run"
    first = StoredRun(url)
    for step in (4, 8):
        write_step(first.directory, step)
    assert first.upload()
    good = contents(first.directory)
    store.pipe_file("/bucket/run/checkpoints/8/state/a", b"another")
    shutil.rmtree(os.environ["LLAMA_JAX_CACHE"])  # another machine
    run = StoredRun(url)
    step, (line,) = newest_good(run.directory)
    assert step == 4
    assert "'state/a' has" in line
    there = contents(run.directory)
    assert all(there[name] == good[name] for name in good if step_of(name) == 4)
    assert run.upload()
    assert whole_steps(stored(store, "run")) == [4]
    assert stored(store, "run")["damaged/8/state/a"] == b"another"


def test_checkpoints_are_uploaded_while_the_run_goes_on(store, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("llama_jax.run.stored._POLL_SECONDS", 0.01)
    url, put_file = "memory://bucket/run", type(store).put_file
    failures = iter([OSError("the network is down")])

    def flaky(self, lpath: str, rpath: str, **kwargs) -> None:
        if "checkpoints" in rpath and (error := next(failures, None)):
            raise error
        put_file(self, lpath, rpath, **kwargs)

    with local_run(url) as (directory, run):
        assert run is not None
        assert [file.name for file in directory.iterdir()] == [".lock"]
        (directory / "config.json").write_text("{}")
        run.start()
        assert stored(store, "run") == {"config.json": b"{}"}
        monkeypatch.setattr(type(store), "put_file", flaky)
        write_step(directory, 4)
        for _ in range(1000):
            if whole_steps(stored(store, "run")) == [4]:
                break
            run._closing.wait(0.01)
        assert whole_steps(stored(store, "run")) == [4]
        assert "wait to be uploaded" in capsys.readouterr().err
        (directory / "samples.txt").write_text("at the end")
    assert stored(store, "run")["samples.txt"] == b"at the end"


def test_the_newest_checkpoint_of_machine_and_store_is_continued_from(store, monkeypatch: pytest.MonkeyPatch):
    url = "memory://bucket/run"
    first = StoredRun(url)
    write_step(first.directory, 4)
    first.upload()
    write_step(first.directory, 8)  # and is killed before the next upload
    again = StoredRun(url)
    assert whole_steps(contents(again.directory)) == [4, 8]
    assert (again.directory / "metrics.jsonl").read_text().count("\n") == 8
    # A damaged one is not newer than anything.
    file = next((first.directory / "checkpoints" / "8").glob("*/*"))
    good = file.read_bytes()
    file.write_bytes(good[:-1] + b"x")
    copy = {name: content for name, content in contents(first.directory).items() if step_of(name) == 8}
    assert whole_steps(contents(StoredRun(url).directory)) == [4]
    # Another machine has started the run: what is here is of another past.
    for name, content in copy.items():
        (first.directory / name).parent.mkdir(parents=True, exist_ok=True)
        (first.directory / name).write_bytes(good if first.directory / name == file else content)
    assert whole_steps(contents(StoredRun(url).directory)) == [4, 8]
    monkeypatch.setattr(remote, "_stamp", lambda info: "another version")
    assert whole_steps(contents(StoredRun(url).directory)) == [4]


def test_a_checkpoint_that_is_removed_while_it_is_uploaded_is_uploaded_whole(store, monkeypatch: pytest.MonkeyPatch):
    """Where a run saves more often than the store takes."""
    run, put_file = StoredRun("memory://bucket/run"), type(store).put_file
    write_step(run.directory, 4)
    expected = {n: v for n, v in contents(run.directory).items() if step_of(n) == 4}

    def slow(self, lpath: str, rpath: str, **kwargs) -> None:
        if "checkpoints" in rpath and (run.directory / "checkpoints/4").exists():
            shutil.rmtree(run.directory / "checkpoints/4")
            write_step(run.directory, 8)
        put_file(self, lpath, rpath, **kwargs)

    monkeypatch.setattr(remote, "_TRANSFERS", 1)
    monkeypatch.setattr(type(store), "put_file", slow)
    run.upload()
    there = stored(store, "run")
    assert {n: v for n, v in there.items() if step_of(n) == 4} == expected
    assert run.upload()
    assert whole_steps(stored(store, "run")) == [8]
    assert not list(run.directory.glob(".upload*"))


def test_failed_run_that_never_started_writes_nothing(store):
    with pytest.raises(UserError, match="a mistake"), local_run("memory://bucket/run"):
        raise UserError("a mistake")
    assert store.find("/bucket") == []


def test_several_processes_are_refused(store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "several", lambda: True)
    monkeypatch.setattr(distributed, "all_agree", lambda function: function())
    with pytest.raises(UserError, match="is for one process"), local_run("memory://bucket/run"):
        raise AssertionError("nothing is made")
    assert store.find("/bucket") == []


def test_mirror_paths_in_sentences_are_urls(store):
    put(store, "model/a", "x")
    assert remote.with_urls(f"'{local_copy(URL) / 'a'}' is damaged") == "'memory://bucket/model/a' is damaged"


def test_run_without_a_checkpoint_says_so(store, finished_run: Run):
    for name in ("config.json", "data.json", "tokenizer/tokenizer.model"):
        put(store, f"model/{name}", (finished_run.directory / name).read_bytes())
    put(store, "model/checkpoints/4/state/d/half", "an upload that was broken off")
    with pytest.raises(UserError, match="has no finished checkpoint yet"):
        load(URL)
    assert open_run(URL).steps() == []


def test_sizes_of_meta_share_the_tokenizer_beside_them(store):
    put(store, "llama/7B/params.json", "{}")
    put(store, "llama/7B/consolidated.00.pth", "weights")
    put(store, "llama/tokenizer.model", "pieces")
    with pytest.raises(UserError) as refused:
        load("memory://bucket/llama/7B/")
    assert "memory://bucket/llama/7B" in remote.with_urls(str(refused.value))
    assert (local_copy("memory://bucket/llama/7B").parent / "tokenizer.model").read_text() == "pieces"


def test_two_urls_of_the_same_name_have_two_mirrors():
    urls = ["memory://bucket/model", "memory://bucket/a/model", "s3://bucket/model", "memory://bucket/model2"]
    urls += [f"memory://bucket/{letter}{'x' * 200}" for letter in "ab"]
    assert len({Mirror(url).path for url in urls}) == len(urls)
