"""Shards by several processes, one by one, after a kill: always the same bytes, each made once."""

import contextlib
import dataclasses
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard

from llama_jax.__main__ import main
from llama_jax.config import UserError
from llama_jax.data import DataConfig, add_reader, prepare_corpus, prepare_shards, readers
from llama_jax.data.chat import ChatTemplate, Piece
from llama_jax.data.corpus.files import find_files
from llama_jax.data.corpus.shards import ShardMaker
from llama_jax.data.corpus.workers import make_shards
from llama_jax.data.readers import records, units_by_shard
from llama_jax.data.readers.opening import open_file
from llama_jax.data.readers.records import Unit
from llama_jax.tokenizers import Tokenizer, train_tokenizer

SHARD_BYTES = 20_000
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "ran", "to", "see", "what", "made", "such", "noise"]


@pytest.fixture(scope="module")
def lines() -> list[str]:
    rng = np.random.default_rng(0)
    return [json.dumps({"text": " ".join(rng.choice(WORDS, rng.integers(1, 60)))}) for _ in range(800)]


@pytest.fixture(scope="module")
def tokenizer(lines: list[str]) -> Tokenizer:
    return train_tokenizer((json.loads(line)["text"] for line in lines), vocab_size=280)


@pytest.fixture
def config(tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """A corpus of six shards: pieces of a large file and small files together."""
    monkeypatch.setattr(records, "SHARD_BYTES", SHARD_BYTES)
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:600]))
    for i in range(20):
        (tmp_path / f"b{i:02}.jsonl").write_text("\n".join(lines[600 + 10 * i : 610 + 10 * i]))
    path = (str(tmp_path / "a.jsonl"), str(tmp_path / "b*.jsonl"))
    return DataConfig(path=path, validation_fraction=0.1, cache_dir=str(tmp_path / "cache"))


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def times_of(directory: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in directory.iterdir()}


def num_shards(config: DataConfig) -> int:
    return len(units_by_shard(find_files(config), config))


@pytest.fixture
def serial(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> dict[str, bytes]:
    assert num_shards(config) == 6
    files = files_of(prepare_corpus(config, tokenizer, directory=tmp_path / "serial", num_workers=1).directory)
    assert set(files) >= {"index.json", "shard-00005.json", "train-00000.tokens", "train-00000.documents"}
    return files


def test_processes_make_the_same_bytes(config, tokenizer, serial, tmp_path: Path):
    steps = []
    made = prepare_corpus(
        config, tokenizer, directory=tmp_path / "parallel", num_workers=2,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert files_of(made.directory) == serial
    total = sum(file.size for file in find_files(config))
    assert steps[-1] == (total, total)
    assert steps == sorted(steps)


def test_shards_one_by_one_in_any_order(config, tokenizer, serial, tmp_path: Path):
    directory = tmp_path / "single"
    for number in (3, 0, 5, 1, 4, 2):
        assert prepare_shards(config, tokenizer, [number], directory=directory) == directory
    assert not (directory / "index.json").exists()
    times = times_of(directory)
    assert files_of(prepare_corpus(config, tokenizer, directory=directory).directory) == serial
    assert {name: times_of(directory)[name] for name in times} == times  # only the index is new
    with pytest.raises(UserError, match="there is no shard 6: this corpus has 6, numbered from 0"):
        prepare_shards(config, tokenizer, [6], directory=directory)


def test_index_in_the_cache_is_as_stable(config, tokenizer, serial, tmp_path: Path):
    made = prepare_corpus(config, tokenizer, num_workers=1)
    assert made.directory.parent == tmp_path / "cache" / "corpora"
    ours = files_of(made.directory)
    # Apart from hashes: a shard of the cache has another key than one of a directory.
    indices = [json.loads(files["index.json"]) for files in (ours, serial)]
    ours_index, serial_index = ({n: v for n, v in i.items() if n not in ("summaries", "sha256")} for i in indices)
    assert ours_index == serial_index
    shutil.rmtree(made.directory)
    prepare_shards(config, tokenizer, [2], num_workers=1)
    assert files_of(prepare_corpus(config, tokenizer, num_workers=1).directory) == ours


KILLED = """
import json, os, signal, sys, time
from llama_jax.config import from_json
from llama_jax.data.config import DataConfig
from llama_jax.data.corpus import shards, workers
from llama_jax.data.corpus.prepare import prepare_corpus
from llama_jax.data.readers import records
from llama_jax.tokenizers import load_tokenizer
records.SHARD_BYTES, shards.BATCH_CHARS = int(sys.argv[4]), 1000
def progress(done, total):
    if done > 0.6 * total:
        os.kill(os.getpid(), signal.SIGKILL)
def slowly(number, units):
    from llama_jax.data.corpus import workers
    time.sleep(1)  # so that the parent is killed before all shards are made
    return workers._make(number, units)
workers._make = slowly
config = from_json(DataConfig, json.loads(sys.argv[1]))
tokenizer = load_tokenizer(sys.argv[2])
prepare_corpus(config, tokenizer, directory=sys.argv[3], num_workers=int(sys.argv[5]), progress=progress)
"""


@pytest.mark.parametrize("num_workers", [1, 2])
def test_killed_and_started_again(config, tokenizer, serial, tmp_path: Path, num_workers: int):
    from llama_jax.config import to_json

    directory = tmp_path / "killed"
    path = tokenizer.save(tmp_path / "tokenizer")
    words = [json.dumps(to_json(config)), str(path), str(directory), str(SHARD_BYTES), str(num_workers)]
    process = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, text=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr
    before: dict[str, int] = {}
    while before != (before := times_of(directory)):  # a process that was left alone ends soon
        time.sleep(0.5)
    finished = {name for name in before if name.startswith("shard")}
    assert 1 <= len(finished) < 6
    assert "index.json" not in before
    assert num_workers > 1 or any(".partial-" in name for name in before)
    assert files_of(prepare_corpus(config, tokenizer, directory=directory, num_workers=1).directory) == serial
    after = times_of(directory)
    assert {name: after[name] for name in finished} == {name: before[name] for name in finished}


def test_a_lost_or_cut_file_is_made_again_alone(config, tokenizer, serial, tmp_path: Path):
    directory = tmp_path / "serial"
    before = times_of(directory)
    (directory / "train-00002.tokens").unlink()
    cut = directory / "train-00004.documents"
    cut.write_bytes(cut.read_bytes()[:-8])
    assert files_of(prepare_corpus(config, tokenizer, directory=directory, num_workers=1).directory) == serial
    changed = {name for name, made in times_of(directory).items() if made != before[name]}
    assert {name.split("-")[1].split(".")[0] for name in changed if "-" in name} == {"00002", "00004"}


def workers_of(process: int) -> set[int]:
    """Ids of the processes that make shards for `process`."""
    children: set[str] = set()
    for task in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            children |= {*(task / "children").read_text().split()}
    found: set[int] = set()
    for pid in children:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a process that has just ended
            if b"popen_loky_posix" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(int(pid))
    return found


def test_a_worker_that_dies(config, tokenizer, tmp_path: Path):
    directory = tmp_path / "dies"

    def progress(done: int, total: int) -> None:
        if len(list(directory.glob("shard-*.json"))) >= 2 and (alive := workers_of(os.getpid())):
            os.kill(alive.pop(), signal.SIGKILL)

    with pytest.raises(UserError, match=r"a process that made shards ended \(.*\): start again") as error:
        prepare_corpus(config, tokenizer, directory=directory, num_workers=2, progress=progress)
    assert "\n" not in str(error.value)
    assert not workers_of(os.getpid())
    assert len(list(directory.glob("shard-*.json"))) >= 2


def test_an_interrupt_leaves_no_process(config, tokenizer, tmp_path: Path):
    def progress(done: int, total: int) -> None:
        assert len(workers_of(os.getpid())) == 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(config, tokenizer, directory=tmp_path / "stopped", num_workers=2, progress=progress)
    assert not workers_of(os.getpid())


def test_workers_get_the_classes_of_a_notebook(config, tokenizer, tmp_path: Path):
    """A chat template that no other process can import."""
    space = {"ChatTemplate": ChatTemplate, "Piece": Piece, "dataclass": dataclasses.dataclass, "__name__": "__main__"}
    exec(NOTEBOOK, space)
    chat = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "the cat sat"}]
    for name in "ab":
        (tmp_path / f"chat_{name}.jsonl").write_text((json.dumps({"text": chat}) + "\n") * 400)
    template = space["Questions"]()
    chats = dataclasses.replace(
        config, path=(str(tmp_path / "chat_*.jsonl"),), chat_template=template, validation_fraction=0.0
    )
    assert num_shards(chats) > 1
    one, two = (
        files_of(prepare_corpus(chats, tokenizer, directory=tmp_path / f"{n}", num_workers=n).directory) for n in (1, 2)
    )
    assert one == two


NOTEBOOK = """
@dataclass(frozen=True)
class Questions(ChatTemplate):
    def pieces(self, messages):
        return [Piece(message["content"], trained=message["role"] == "assistant") for message in messages]
"""


def test_a_mistake_found_by_a_worker(config, tokenizer, tmp_path: Path):
    file = tmp_path / "b07.jsonl"
    file.write_text(file.read_text() + "\n{")
    with pytest.raises(UserError, match=r"line 11 of '.*b07.jsonl' is not JSON"):
        prepare_corpus(config, tokenizer, directory=tmp_path / "bad", num_workers=2)


def test_other_tokenizers_and_other_texts_are_refused(config, tokenizer, serial, tmp_path: Path, lines):
    directory = tmp_path / "serial"
    other = train_tokenizer((json.loads(line)["text"] for line in lines), vocab_size=285)
    for make in (prepare_corpus, lambda *a, **k: prepare_shards(*a, [1], **k)):
        with pytest.raises(UserError, match="has shards of another tokenizer"):
            make(config, other, directory=directory, num_workers=1)
        changed = DataConfig(**{**vars(config), "validation_fraction": 0.2})
        with pytest.raises(UserError, match="has shards of other files or options"):
            make(changed, tokenizer, directory=directory, num_workers=1)
    assert files_of(directory) == serial


def test_command(config, tokenizer, serial, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "b07.jsonl").write_text((tmp_path / "b07.jsonl").read_text() + '\n{"txt": 1}\n{\n')
    words = ["prepare", *config.path, "--tokenizer", str(path), "--validation-fraction", "0.1"]
    words += ["--cache-dir", str(config.cache_dir), "--exclude", "*00*", "--num-workers", "1"]
    assert main([*words, "--count"]) == 0
    assert capsys.readouterr().out == "6\n"
    assert main(words) == 2
    assert "is not JSON" not in (error := capsys.readouterr().err)
    assert "line 11 of" in error
    words += ["--max-bad-records", "none", "--output", str(tmp_path / "out")]
    assert main([*words, "--shard", "2"]) == main([*words, "--shards", "0:2"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "out")] * 2
    assert {f.name for f in (tmp_path / "out").glob("*.json")} == {f"shard-0000{i}.json" for i in range(3)}
    assert main(words) == 0
    directory, *said = capsys.readouterr().out.splitlines()
    made = prepare_corpus(
        DataConfig(**{**vars(config), "exclude": ("*00*",), "max_bad_records": None}), tokenizer, num_workers=1
    )  # fmt: skip
    assert directory == str(tmp_path / "out")
    assert sum(made.num_documents.values()) == 790
    counts = f"{made.num_tokens['train']} tokens, {made.num_bytes['train']} bytes"
    assert said[0] == f"train: {made.num_documents['train']} documents, {counts}"
    assert said[2].endswith(" s")
    assert said[3] == (
        f"bad records (is not JSON): 1, first line 12 of '{tmp_path / 'b07.jsonl'}' is not JSON "
        "(Expecting property name enclosed in double quotes: line 2 column 1 (char 2))"
    )
    assert said[4].startswith("bad records (lacks a field): 1, first line 11 of")
    assert main(words) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(said)  # without the speed: nothing was tokenized
    for wrong, sentence in (
        (["--shards", "x"], "must be a number"), (["--shards", "3:3"], "names no shard"),
        (["--shard", "6"], "there is no shard 6"), (["--num-workers", "0"], "must be at least 1"),
        (["--fields", "a,a"], "fields=a,a must name"), (["--fields", "en,text"], "another directory"),
    ):  # fmt: skip
        assert main([*words, *wrong]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1


def test_a_shard_without_documents(config, tokenizer, tmp_path: Path):
    """It has no arrays, and the corpus is what it is without it."""
    (tmp_path / "a0.jsonl").write_text("\n" * (2 * SHARD_BYTES))
    lonely = DataConfig(**{**vars(config), "path": (str(tmp_path / "a0.jsonl"),)})
    with pytest.raises(UserError, match="has no text"):
        prepare_corpus(lonely, tokenizer, num_workers=1)
    both = DataConfig(**{**vars(config), "path": (str(tmp_path / "a0.jsonl"), *config.path)})
    made, alone = prepare_corpus(both, tokenizer, num_workers=1), prepare_corpus(config, tokenizer, num_workers=1)
    assert not list(made.directory.glob("*-00000.tokens"))
    assert made.num_documents == alone.num_documents
    np.testing.assert_array_equal(made.train.read(0, 1 << 30), alone.train.read(0, 1 << 30))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "ids"])
def test_memory_does_not_grow_with_the_corpus(config, tokenizer, tmp_path: Path, lines, kind: str):
    texts = [json.loads(line)["text"] for line in lines]
    block = "".join(json.dumps({"text": t if kind == "text" else tokenizer.encode(t)}) + "\n" for t in texts)
    peaks = []
    for number, megabytes in enumerate((30, 120)):
        file = tmp_path / f"{megabytes}.jsonl"
        file.write_text(block * (megabytes * 10**6 // len(block)))
        (found,) = find_files(DataConfig(path=(str(file),)))
        seen = []
        maker = ShardMaker(tmp_path, "key", config, tokenizer)
        units_of = {number: [Unit(found, 0, 1)]}
        make_shards(maker, units_of, 1, lambda _, seen=seen: seen.append(peak_of_child()))
        peaks.append(max(seen))
    assert peaks[1] < 1.15 * peaks[0], f"{peaks} KiB for 30 and 120 MB"


def peak_of_child() -> int:
    """The most memory that this process' only worker has held so far, in KiB."""
    (child,) = workers_of(os.getpid())
    (line,) = (line for line in Path(f"/proc/{child}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-9], "is a damaged gzip file"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "a"}\n' * 999)[:-3], "is a damaged zstd file"),
        ("a.parquet", b"PAR1 and no more", "is a damaged file"),
        ("a.array_record", b"no record" * 99, "is a damaged ArrayRecord file"),
        ("a.arrow", b"no batches", "is a damaged file"),
        ("a.bin", b"odd", "odd number of bytes"),
        ("a.jsonl", b'{"text": [1, 280]}', "line 1 of"),
        ("b.jsonl", b'{"text": [1, 280]}', "outside this tokenizer's vocabulary of 280"),
        ("c.jsonl", b'{"body": "a", "n": 1}', "lacks a field ('text'; it has body, n: set fields)"),
        ("d.jsonl", b'{"text": 3}', "has a field of another type"),
        ("empty.txt", b"", "has no text"),
    ],
)
def test_mistakes_through_the_command(
    tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, sentence: str
):
    path = tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / name).write_bytes(content)
    words = ["prepare", str(tmp_path / name), "--tokenizer", str(path), "--cache-dir", str(tmp_path / "cache")]
    assert main([*words, "--validation-fraction", "0"]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_missing_package_is_named(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for module, path, extra in (
        ("pyarrow", str(tmp_path / "a.parquet"), "parquet"),
        ("datasets", "hf://a:b", "datasets"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf"needs the package {module}: pip install 'llama_jax\[{extra}\]'"):
            prepare_corpus(DataConfig(path=(path,), cache_dir=str(tmp_path / "cache")), tokenizer)


OWN_READER = """
def read_lines_of_x(unit, config):
    with open_file(unit.file.place) as content:
        for number, line in enumerate(content.read().decode().splitlines(), 1):
            yield Record((line.removeprefix("x ")[:99],), f"line {number} of '{unit.file.path}'")
"""


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_reader_of_ones_own(config, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int):
    """A kind of file that is added in a notebook's cell, which processes know too."""
    monkeypatch.setattr(readers, "KINDS", readers.KINDS.copy())
    space = {"open_file": open_file, "Record": records.Record, "__name__": "__main__"}
    exec(OWN_READER, space)
    with pytest.raises(ValueError, match="there is a kind of file with the name 'csv'"):
        add_reader("csv", r"\.x$", space["read_lines_of_x"])
    add_reader("x_lines", r"\.x$", space["read_lines_of_x"])
    for name in "ab":
        (tmp_path / f"{name}.x").write_text("x the cat sat\n" * (SHARD_BYTES // 13))
    own = dataclasses.replace(config, path=(str(tmp_path / "*.x"),), validation_fraction=0.0)
    assert num_shards(own) == 2
    made = prepare_corpus(own, tokenizer, num_workers=num_workers)
    assert next(made.texts("train")) == "the cat sat"
    assert made.num_documents["train"] == 2 * (SHARD_BYTES // 13)
    assert made.train.read(0, 4).tolist() == tokenizer.encode("the cat sat", bos=True, eos=True)[:4]
