"""Damaged checkpoints are found, whatever is damaged in them, and an earlier one is used; failed saves are repeated."""

import dataclasses
import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.__main__ import main
from llama_jax.checkpoint import (
    MANIFEST_FILE,
    CheckpointConfig,
    CheckpointStore,
    SaveFailed,
    check_manifest,
    load,
    newest_good,
    not_finite,
)
from llama_jax.config import UserError, override
from llama_jax.models import abstract_params
from llama_jax.run import Run, RunConfig, RunFailed, open_run, train, training
from llama_jax.training import TrainState, init_state

NEWEST = 12
RUN_PARTS = ("checkpoint 8", "checkpoint 12", "tokenizer", "config", "corpus")


@pytest.fixture
def copied(finished_run: Run, tmp_path: Path) -> Path:
    """A copy of the finished run, whose checkpoints are of the steps 8 and 12."""
    shutil.copytree(finished_run.directory, tmp_path / "run")
    return tmp_path / "run"


def files_of(directory: Path) -> list[str]:
    return sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())


def found(run: Path, name: str) -> bool:
    """Whether the newest checkpoint is set aside with the file named; it is moved back."""
    before = files_of(run / "checkpoints" / "8")
    step, lines = newest_good(run)
    held = step == 8 and len(lines) == 1 and f"{name!r}" in lines[0] and files_of(run / "checkpoints" / "8") == before
    if (run / "damaged" / str(NEWEST)).exists():
        shutil.move(run / "damaged" / str(NEWEST), run / "checkpoints" / str(NEWEST))
    return held


def flipped(content: bytes, offset: int, bit: int) -> bytes:
    return content[:offset] + bytes([content[offset] ^ 1 << bit]) + content[offset + 1 :]


def test_one_flipped_bit_of_any_file_is_found(copied: Path, tally: Any, num_trials: Callable[[int, int], int]):
    newest, rng, tried, held = copied / "checkpoints" / str(NEWEST), np.random.default_rng(0), 0, 0
    names = files_of(newest)
    assert MANIFEST_FILE in names
    for name in names:
        content = (newest / name).read_bytes()
        for offset in rng.integers(len(content), size=num_trials(2, 8)) if content else ():
            (newest / name).write_bytes(flipped(content, int(offset), int(rng.integers(8))))
            tried, held = tried + 1, held + found(copied, name)
        (newest / name).write_bytes(content)
    assert newest_good(copied) == (NEWEST, [])
    tally(
        "one flipped bit in a file of a checkpoint",
        "the file is named, the checkpoint set aside, the one before continued",
        tried=tried,
        held=held,
        figures=f"{len(names)} files",
    )


def test_cut_missing_and_surplus_files_are_found(copied: Path, tally: Any):
    checkpoints = copied / "checkpoints"
    newest, trials = checkpoints / str(NEWEST), []
    for name in files_of(newest):
        content = (newest / name).read_bytes()
        for size in {0, len(content) // 2, len(content) - 1} if content else ():
            (newest / name).write_bytes(content[:size])
            trials.append(found(copied, name))
        (newest / name).write_bytes(content + b"\0")
        trials.append(found(copied, name))
        (newest / name).unlink()
        # Without its manifest a checkpoint is one of an earlier version: not checked, and used.
        trials.append(newest_good(copied) == (NEWEST, []) if name == MANIFEST_FILE else found(copied, name))
        (newest / name).write_bytes(content)
    (newest / "state" / "d" / "surplus").write_bytes(b"x")
    trials.append(found(copied, "state/d/surplus"))
    (newest / "state" / "d" / "surplus").unlink()
    (newest / ".of_a_file_system").write_bytes(b"x")
    trials.append(newest_good(copied) == (NEWEST, []))
    tally(
        "a file of a checkpoint cut, emptied, longer, missing, surplus",
        "the file is named, the checkpoint set aside, the one before continued",
        tried=len(trials),
        held=sum(trials),
    )


def test_the_state_of_another_step_is_found(copied: Path, finished_run: Run, tally: Any):
    checkpoints = copied / "checkpoints"
    older, newest = checkpoints / "8", checkpoints / str(NEWEST)
    shutil.rmtree(newest)
    shutil.copytree(older, newest)
    trials = [found(copied, MANIFEST_FILE)]
    # The same without a manifest to compare: by the step among the arrays.
    (newest / MANIFEST_FILE).unlink()
    with pytest.raises(UserError, match=r"checkpoints/12' is damaged \(it has the state of step 8\)"):
        load(copied)
    trials.append(newest.exists())
    (newest / MANIFEST_FILE).write_bytes((finished_run.directory / "checkpoints/12" / MANIFEST_FILE).read_bytes())
    problems = check_manifest(newest, NEWEST)
    trials.append(bool(problems) and any("is missing" in p for p in problems) and "is surplus" in problems[-1])
    tally("the checkpoint of another step in a step's place", "it is found", tried=len(trials), held=sum(trials))


def state_of(run: Path, config: RunConfig, step: int) -> list[np.ndarray]:
    abstract = jax.eval_shape(init_state, abstract_params(config.model), config.optimizer.hyper(config.num_steps))
    return [np.asarray(x) for x in jax.tree.leaves(CheckpointStore(run / "checkpoints").load(step, abstract))]


def test_a_run_goes_on_from_the_one_before_a_damaged_one_to_the_same_bits(
    copied: Path, finished_run: Run, run_config: RunConfig, capsys: pytest.CaptureFixture[str]
):
    victim = max((copied / "checkpoints/12/state/d").iterdir(), key=lambda file: file.stat().st_size)
    content = victim.read_bytes()
    victim.write_bytes(flipped(content, len(content) // 2, 3))
    name = victim.relative_to(copied / "checkpoints/12").as_posix()
    # Who only reads moves nothing, and names what can be read.
    with pytest.raises(UserError, match=rf"'{name}' has other content\): good is step 8, to be chosen with --step"):
        load(copied)
    assert load(copied, step=8).config == run_config.model
    assert not (copied / "damaged").exists()
    train(run_config, copied)
    assert f"'{name}' has other content): moved to '{copied}/damaged/12'" in capsys.readouterr().out
    assert open_run(copied).steps() == finished_run.steps()
    for ours, theirs in zip(
        state_of(copied, run_config, 12), state_of(finished_run.directory, run_config, 12), strict=True
    ):
        assert np.array_equal(ours, theirs)
    speed = {"tokens_per_second", "mfu"}
    ours, theirs = (
        [{k: v for k, v in line.items() if k not in speed} for line in run.metrics()]
        for run in (open_run(copied), finished_run)
    )
    assert ours == theirs
    assert (copied / "damaged/12" / name).read_bytes() != content


def test_a_run_without_a_good_checkpoint_is_refused_and_kept(copied: Path):
    for step in (8, NEWEST):
        (copied / f"checkpoints/{step}/state/_METADATA").write_bytes(b"")
    before = files_of(copied)
    with pytest.raises(UserError, match=r"12' is damaged \('state/_METADATA' has 0 bytes, .* no other is good"):
        newest_good(copied)
    assert files_of(copied) == before


def test_a_damaged_tokenizer_is_refused(copied: Path):
    (file,) = (file for file in (copied / "tokenizer").iterdir() if file.suffix == ".model")
    file.write_bytes(flipped(file.read_bytes(), 300, 1))
    for use in (load, lambda path: open_run(path).tokenizer):
        with pytest.raises(UserError, match=rf"the tokenizer in '.*' is damaged \('{file.name}' has other content\)"):
            use(copied)


def test_what_the_system_refuses_to_read_is_not_damage(copied: Path, monkeypatch: pytest.MonkeyPatch):
    path_open = Path.open

    def refused(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == "_METADATA":
            raise PermissionError(13, "Permission denied", str(path))
        return path_open(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refused)
    for use in (newest_good, load):
        with pytest.raises(UserError, match=r"_METADATA' cannot be read \(Permission denied\): check its permissions"):
            use(copied)
    assert not (copied / "damaged").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_state_with_a_number_that_is_not_finite_is_never_saved(
    run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float
):
    """The loss of the step is fine: the numbers are those after its update."""
    made = training.programs

    def programs(config: RunConfig) -> Any:
        def train_step(*args: Any) -> Any:
            state, metrics = made(config).train_step(*args)
            if int(state.step) == 8:
                state.params["norm.weight"] = state.params["norm.weight"].at[3].set(bad)
            return state, metrics

        return dataclasses.replace(made(config), train_step=train_step)

    monkeypatch.setattr(training, "programs", programs)
    with pytest.raises(
        RunFailed, match=r"step 8 is not saved, because 'params.norm.weight' is not finite: .* the last good step, 4"
    ):
        train(override(run_config, {"logging.sample_prompts": ()}), tmp_path / "run")
    assert open_run(tmp_path / "run").steps() == [4]
    state = TrainState(jnp.int32(1), {"a": jnp.ones(3)}, {"mu": jnp.array([1, bad, 2])}, {"b": jnp.ones(2, jnp.int32)})
    assert not_finite(state) == "optimizer.mu"
    assert not_finite(dataclasses.replace(state, opt_state={})) is None


def big(step: int) -> TrainState:
    values = jax.random.normal(jax.random.key(step), (20_000,))
    return TrainState(step=jnp.int32(step), params={"a": values}, opt_state={})


@pytest.fixture
def small_files() -> Iterator[Callable[[bool], None]]:
    """Let the system refuse files above 10 kB, as a full disk refuses all, and allow them again."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def refuse(on: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000 if on else before[0], before[1]))

    yield refuse
    refuse(False)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_save_that_fails_is_repeated_once_and_harms_nothing(
    tmp_path: Path, small_files: Callable[[bool], None], capsys: pytest.CaptureFixture[str], tally: Any
):
    trials = []
    store = CheckpointStore(tmp_path, CheckpointConfig(keep_last=2))
    store.save(big(1))
    assert not store.check(wait=True)
    small_files(True)
    store.save(big(2))
    trials.append(store.check(wait=True) and store.steps() == [1])
    (line,) = capsys.readouterr().err.splitlines()
    assert "step 2 cannot be written to" in line
    assert line.endswith("the last good one is of step 1: trying once more")
    small_files(False)
    store.save(big(3))
    trials.append(not store.check(wait=True) and store.steps() == [1, 3])
    small_files(True)
    store.save(big(4))
    store.save(big(5))
    with pytest.raises(SaveFailed, match=r"step 5 cannot be written to .* the last good one is of step 3"):
        store.check(wait=True)
    store.close()
    small_files(False)
    trials.append(sorted(place.name for place in tmp_path.iterdir()) == ["1", "3"])
    trials += [check_manifest(tmp_path / str(step), step) == [] for step in (1, 3)]
    tally("the disk refuses a checkpoint", "repeated once, earlier ones whole", tried=len(trials), held=sum(trials))


def test_space_is_checked_before_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    store = CheckpointStore(tmp_path, CheckpointConfig())
    with monkeypatch.context() as patched:
        usage = shutil.disk_usage(tmp_path)
        patched.setattr(shutil, "disk_usage", lambda _: usage._replace(free=79_999))
        store.save(big(1))
        assert store.check()
        assert "it has 0.1 MB, and 0.1 MB are free" in capsys.readouterr().err
    store.save(big(2))
    store.close()
    assert store.steps() == [2]


def test_an_old_checkpoint_stays_until_the_new_one_has_its_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = CheckpointStore(tmp_path, CheckpointConfig(keep_last=1, keep_best=0))
    store.save(big(1))
    store.wait()
    with monkeypatch.context() as patched:

        def fails(*_: Any) -> None:
            raise OSError(5, "Input/output error")

        patched.setattr("llama_jax.checkpoint.store.write_manifest", fails)
        store.save(big(2))
        assert store.check(wait=True)
        assert 1 in store.steps()
    store.save(big(2))
    store.close()
    assert store.steps() == [2]
    assert check_manifest(tmp_path / "2", 2) == []


@pytest.fixture
def verified(capsys: pytest.CaptureFixture[str]) -> Callable[[Path], tuple[int, str]]:
    """The exit code and the lines of `verify`."""

    def verify(path: Path) -> tuple[int, str]:
        code = main(["verify", str(path)])
        return code, capsys.readouterr().out

    return verify


def test_verify_names_what_is_damaged_in_a_run_a_corpus_and_an_export(
    copied: Path,
    run_config: RunConfig,
    tmp_path: Path,
    verified: Callable[[Path], tuple[int, str]],
    num_trials: Callable[[int, int], int],
    tally: Any,
):
    # The run's corpus is in a copy of the cache.
    shutil.copytree(run_config.data.cache_dir or "", tmp_path / "cache")
    config = (copied / "config.json").read_text()
    (copied / "config.json").write_text(config.replace(str(run_config.data.cache_dir), str(tmp_path / "cache")))
    assert verified(copied) == (0, "".join(f"{part}: good\n" for part in RUN_PARTS))
    # Other tests have made others in the same cache.
    corpus = tmp_path / "cache/corpora" / json.loads((copied / "data.json").read_text())["content_hash"][:32]
    assert verified(corpus) == (0, "corpus: good\n")
    assert main(["convert", str(copied), str(tmp_path / "export"), "--to", "hf"]) == 0
    assert verified(tmp_path / "export")[1].endswith("files: good\n")

    places = {corpus: (corpus, "corpus"), tmp_path / "export": (tmp_path / "export", "files")}
    places |= {copied / "tokenizer": (copied, "tokenizer"), copied / "checkpoints/8": (copied, "checkpoint 8")}
    rng, tried, held = np.random.default_rng(0), dict.fromkeys(places, 0), dict.fromkeys(places, 0)
    for place, (path, part) in places.items():
        for name in files_of(place):
            content = (place / name).read_bytes()
            offsets = rng.integers(len(content), size=num_trials(1, 8)) if content else []
            for damaged in [*(flipped(content, int(offset), 5) for offset in offsets), content[:-1]]:
                if damaged == content or (path == copied and tried[place] > num_trials(4, 99)):
                    continue
                (place / name).write_bytes(damaged)
                code, lines = verified(path)
                told = [line for line in lines.splitlines() if line.startswith(f"{part}: damaged (")]
                tried[place] += 1
                held[place] += code == 1 and len(told) == 1 and Path(name).name in told[0]
            (place / name).write_bytes(content)
    for place, (_, part) in places.items():
        what = {"files": "an export", "checkpoint 8": "a checkpoint"}.get(part, f"a {part}")
        tally(f"`verify`: a bit or an end of a file of {what}", "named", tried=tried[place], held=held[place])


def test_a_flipped_bit_of_exported_weights_is_not_loaded(copied: Path, tmp_path: Path):
    assert main(["convert", str(copied), str(tmp_path / "export"), "--to", "hf"]) == 0
    (file,) = (tmp_path / "export").glob("*.safetensors")
    content = file.read_bytes()
    for offset in np.linspace(0, len(content) - 1, 5, dtype=int):
        file.write_bytes(flipped(content, int(offset), 3))
        with pytest.raises(UserError, match=f"is damaged \\('{file.name}' has other content\\): export it again"):
            load(tmp_path / "export")
    file.write_bytes(content)
    # The rest is its owner's, and another project's file of this name says nothing.
    (tmp_path / "export" / "generation_config.json").write_text("{}")
    expected = load(tmp_path / "export").model.params()
    (tmp_path / "export" / MANIFEST_FILE).write_text('{"name": "a web page"}')
    for name, value in load(tmp_path / "export").model.params().items():
        assert np.array_equal(value, expected[name])


def test_verify_tells_what_is_not_checked(copied: Path, verified: Callable[[Path], tuple[int, str]], capsys):
    shutil.rmtree(copied / "checkpoints/8")
    (copied / "checkpoints/12" / MANIFEST_FILE).unlink()
    (copied / "tokenizer" / MANIFEST_FILE).unlink()
    told = [f"{part}: not checked, it has no checksums" for part in ("checkpoint 12", "tokenizer")]
    code, lines = verified(copied)
    assert code == 0
    assert lines.splitlines()[:2] == told
    (copied / "config.json").write_text("{")
    code, lines = verified(copied)
    assert code == 1
    assert f"config: damaged ('{copied}/config.json' is not valid JSON" in lines
    assert "corpus: not checked ('" in lines
    assert main(["verify", str(copied.parent)]) == 2
    assert "has nothing to verify" in capsys.readouterr().err
