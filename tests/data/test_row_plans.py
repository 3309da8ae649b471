"""The plan of rows is the same bytes by any number of processes, after any kill, and after parts were lost."""

import functools
import io
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from llama_jax.config import override
from llama_jax.data import Corpus, DataConfig, Vocabulary, prepare_corpus
from llama_jax.data.objectives import Causal, SpanCorruption
from llama_jax.data.readers import records
from llama_jax.data.rows import packing
from llama_jax.data.rows.fitting import fit_rows
from llama_jax.data.rows.packing import PART, Packer
from llama_jax.run import Run, RunConfig, preparing
from llama_jax.screen import Bar
from llama_jax.tokenizers import train_tokenizer

OBJECTIVES = [Causal(), SpanCorruption(source_length=20, start_token="bos")]
PARTS = 8  # of both splits


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("plans")
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(20, size=rng.integers(1, 40))) for _ in range(400)]
    for number in range(4):
        (folder / f"{number}.jsonl").write_text("".join(f'{{"text": "{t}"}}\n' for t in texts[number::4]))
    names = {name for objective in OBJECTIVES for name in objective.special_tokens()}
    tokenizer = train_tokenizer(texts, vocab_size=271 + len(names), special_tokens=sorted(names))
    tokenizer.save(folder / "tokenizer")
    config = DataConfig(path=(f"{folder}/*.jsonl",), validation_fraction=0.2, cache_dir=str(folder / "cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "SHARD_BYTES", min(file.stat().st_size for file in folder.glob("*.jsonl")))
        made = prepare_corpus(config, tokenizer, num_workers=1)
    assert len(made.train.shards) + len(made.validation.shards) == PARTS
    packers[:] = [Packer(objective, "best_fit", Vocabulary.of(tokenizer), 24) for objective in OBJECTIVES]
    return made


packers: list[Packer] = []


@pytest.fixture(params=range(len(OBJECTIVES)), ids=lambda number: type(OBJECTIVES[number]).__name__)
def packer(corpus: Corpus, request: pytest.FixtureRequest) -> Packer:
    return packers[request.param]


def files_of(corpus: Corpus) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in corpus.directory.glob("rows/*/*")}


def written(corpus: Corpus, packer: Packer) -> dict[str, bytes]:
    """The index of rows, made at once in this process."""
    shutil.rmtree(corpus.directory / "rows", ignore_errors=True)
    packer.write(corpus, num_workers=1)
    files = files_of(corpus)
    assert sorted(files) == [
        f"{split}.{kind}" for split in ("train", "validation") for kind in ("json", "pieces", "rows")
    ]
    shutil.rmtree(corpus.directory / "rows")
    return files


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of documents of the shards that are fitted from now on."""
    fitted: list[int] = []

    def counting(shard, *args, **options):
        fitted.append(len(shard.documents))
        return fit_rows(shard, *args, **options)

    monkeypatch.setattr(packing, "fit_rows", counting)
    return fitted


@pytest.mark.parametrize("done", range(PARTS + 1))
def test_a_plan_that_was_stopped_goes_on(corpus, packer, monkeypatch: pytest.MonkeyPatch, done: int):
    expected, total = written(corpus, packer), corpus.num_documents["train"] + corpus.num_documents["validation"]
    fitted, steps = counted(monkeypatch), []

    def stopping(*step: int) -> None:
        steps.append(step)
        if len(steps) > done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packer.write(corpus, num_workers=1, progress=stopping)
    assert len(fitted) == done
    assert not [name for name in files_of(corpus) if name.endswith(".json")]
    again = []
    packer.write(corpus, num_workers=1, progress=lambda *step: again.append(step))
    assert files_of(corpus) == expected
    assert len(fitted) == PARTS  # each shard once
    assert again[0] == (sum(fitted[:done]), total)
    assert again[-1] == (total, total)


def test_a_part_that_is_not_what_was_written_is_made_again(corpus, packer, monkeypatch: pytest.MonkeyPatch):
    expected, rng = written(corpus, packer), np.random.default_rng(0)

    def stopping(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    for number in range(20):
        with pytest.raises(KeyboardInterrupt):
            packer.write(corpus, num_workers=1, progress=stopping)
        parts = sorted(corpus.directory.glob(f"rows/*/*{PART}"))
        assert len(parts) == PARTS
        file = parts[rng.integers(PARTS)]
        content = file.read_bytes()
        place = rng.integers(len(content))
        flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        others = (content[:place], flipped, parts[0].read_bytes().replace(corpus.content_hash.encode(), b"0" * 64))
        file.write_bytes(others[number % 3])
        fitted = counted(monkeypatch)
        packer.write(corpus, num_workers=1)
        assert len(fitted) == 1
        assert files_of(corpus) == expected
        shutil.rmtree(corpus.directory / "rows")


KILLED = """
import os, signal, sys
from pathlib import Path
from llama_jax.data import Corpus, DataConfig, Vocabulary
from llama_jax.data.objectives import Causal
from llama_jax.data.rows import packing
from llama_jax.data.rows.packing import Packer
from llama_jax.tokenizers import load_tokenizer
corpus = Corpus(Path(sys.argv[1]), DataConfig(path=()))
packer = Packer(Causal(), "best_fit", Vocabulary.of(load_tokenizer(sys.argv[2])), 24)
def progress(done, total):
    if done:
        os.kill(os.getpid(), signal.SIGKILL)
def slow_work(*args, work=packing._part_work):
    import time
    make = work(*args)
    return lambda *job: (time.sleep(0.5), make(*job))  # so that the parent is killed before all parts are written
packing._part_work = slow_work
packer.write(corpus, num_workers=int(sys.argv[3]), progress=progress)
"""


@pytest.mark.slow
def test_processes_write_the_same_plan(corpus, packer, monkeypatch: pytest.MonkeyPatch):
    expected, steps = written(corpus, packer), []
    fitted = counted(monkeypatch)  # in this process
    packer.write(corpus, num_workers=2, progress=lambda *step: steps.append(step))
    assert files_of(corpus) == expected
    assert not fitted
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1] == sum(corpus.num_documents.values())


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_plan_that_was_killed_goes_on(corpus, monkeypatch: pytest.MonkeyPatch, num_workers: int):
    expected = written(corpus, packers[0])
    words = [str(corpus.directory), str(corpus.directory.parents[2] / "tokenizer"), str(num_workers)]
    process = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, text=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr
    before: dict[str, bytes] = {}
    while before != (before := files_of(corpus)):  # a process that was left alone ends soon
        time.sleep(0.5)
    finished = [name for name in before if name.endswith(PART) and not name.startswith(".")]
    assert 1 <= len(finished) < PARTS
    (packers[0].directory(corpus) / f".train-00000{PART}.partial-0").write_text("left")
    fitted = counted(monkeypatch)
    packers[0].write(corpus, num_workers=1)
    assert len(fitted) == PARTS - len(finished)
    assert files_of(corpus) == expected


def test_a_terminal_shows_a_bar_for_each_work(run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = io.StringIO()
    console = Console(width=80, force_terminal=True, file=file, color_system=None)
    monkeypatch.setattr(preparing, "Bar", functools.partial(Bar, console=console))
    config = override(run_config, {"data.packing": "best_fit", "data.cache_dir": str(tmp_path / "cache")})
    preparing.prepare(Run(tmp_path, config), config.mesh, 8)
    (corpus,) = (Corpus(index.parent, config.data) for index in tmp_path.rglob("index.json"))
    total = sum(corpus.num_documents.values())
    shown = re.findall(r"(tokenizing|planning rows)  \S+ +(\d+)/(\d+)  in", file.getvalue())
    assert [work for work, *_ in shown] == ["tokenizing", "planning rows"]
    assert shown[-1][1:] == (str(total), str(total))
