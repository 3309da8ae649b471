"""A sweep is its runs: the same numbers as one after another by hand, also where it was stopped and called again."""

import concurrent.futures
import dataclasses
import errno
import json
import re
from pathlib import Path
from typing import Any

import jax
import pytest

import llama_jax
from llama_jax.ablation import SweepRecord, read_sweep
from llama_jax.checkpoint import store
from llama_jax.config import UserError, override
from llama_jax.run import RunConfig, RunFailed, open_run, train

VARIANTS = {"base": {}, "MQA": {"model.attention.num_kv_heads": 1}, "slow": {"optimizer.learning_rate": 1e-3}}
SEEDS = (0, 3)
COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def sweep(sweep_base: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> SweepRecord:
    """A sweep of three variants, of which two have one program, and two seeds."""
    folder = tmp_path_factory.mktemp("sweep") / "sweep"
    llama_jax.ablate(sweep_base, VARIANTS, seeds=SEEDS, run_dir=folder, quiet=True)
    return read_sweep(folder)


def numbers(sweep: SweepRecord) -> dict[tuple[str, int], list[dict[str, float]]]:
    """All metrics of all runs but those of the clock."""
    clock = ("tokens_per_second", "mfu")
    return {
        (trial.variant, trial.seed): [{k: v for k, v in line.items() if k not in clock} for line in trial.metrics]
        for trial in sweep.trials
    }


@pytest.mark.slow
def test_the_runs_are_those_of_train(sweep: SweepRecord, sweep_base: RunConfig, tmp_path: Path):
    found = numbers(sweep)
    assert list(found) == [(name, seed) for name in VARIANTS for seed in SEEDS]
    for name, seed in (("MQA", 0),):
        run = train(override(sweep_base, {**VARIANTS[name], "seed": seed}), tmp_path / f"{name}{seed}", quiet=True)
        for line, expected in zip(found[name, seed], run.metrics(), strict=True):
            assert line == {key: pytest.approx(expected[key], rel=1e-5) for key in line}
            assert line.keys() >= expected.keys() - {"tokens_per_second", "mfu"}
        own = open_run(sweep.trials_of(name)[SEEDS.index(seed)].directory)
        assert own.committed_steps() == run.committed_steps()
        assert own.config == run.config
        assert json.loads((own.directory / "data.json").read_text()) == json.loads(
            (run.directory / "data.json").read_text()
        )
    assert llama_jax.generate_text(open_run(sweep.trials[0].directory).load(), ["the"], max_new_tokens=1)


@pytest.mark.slow
def test_four_variants_of_three_seeds_are_twelve_runs(sweep_base: RunConfig, tmp_path: Path):
    variants = VARIANTS | {"SGD": {"optimizer": "SGD", "optimizer.weight_decay": 0.01}}
    llama_jax.ablate(sweep_base, variants, seeds=3, run_dir=tmp_path / "s", quiet=True)
    found = numbers(read_sweep(tmp_path / "s"))
    assert len(found) == 12
    for (name, seed), lines in found.items():
        run = train(override(sweep_base, {**variants[name], "seed": seed}), tmp_path / f"{name}{seed}", quiet=True)
        for line, expected in zip(lines, run.metrics(), strict=True):
            assert line == {key: pytest.approx(expected[key], rel=1e-5) for key in line}


@pytest.mark.slow
def test_one_after_another_they_are_those_of_train_bit_by_bit(sweep_base: RunConfig, tmp_path: Path):
    """A mesh that was chosen is kept: each run is split over it."""
    config = override(sweep_base, {"mesh.fsdp": jax.device_count()})
    llama_jax.ablate(config, {"MQA": VARIANTS["MQA"]}, seeds=[0], run_dir=tmp_path / "s", quiet=True)
    found = read_sweep(tmp_path / "s")
    run = train(override(config, VARIANTS["MQA"]), tmp_path / "run", quiet=True)
    by_hand = dataclasses.replace(found.trials[0], metrics=run.metrics())
    assert numbers(dataclasses.replace(found, trials=(by_hand,))) == numbers(found)


@pytest.mark.slow
def test_variants_of_a_seed_have_one_order_of_data_and_shared_first_values(sweep: SweepRecord):
    base, mqa = (open_run(sweep.trials_of(name)[1].directory) for name in ("base", "MQA"))
    for step in range(3):
        for name, value in base.batch(step).items():
            assert (mqa.batch(step)[name] == value).all()
    first = [llama_jax.models.initialize(run.config.model, run.config.seed) for run in (base, mqa)]
    shared = [name for name in first[0] if first[0][name].shape == first[1][name].shape]
    assert set(first[0]) - set(shared) == {"layers.attention.k_proj.weight", "layers.attention.v_proj.weight"}
    assert all((first[0][name] == first[1][name]).all() for name in shared)


def test_costs_are_recorded(sweep: SweepRecord, sweep_base: RunConfig):
    base, mqa, _ = sweep.variants
    assert sweep.baseline == "base"
    assert sweep.seeds == SEEDS
    assert base.num_parameters == llama_jax.num_parameters(sweep_base.model)
    assert base.cache_bytes_per_token == 2 * (mqa.cache_bytes_per_token or 0) == 2 * 2 * 8 * 4
    for variant in sweep.variants:
        # Parameters, two moments and the steps of the run and of the optimizer.
        assert variant.state_bytes == 12 * (variant.num_parameters or 0) + 2 * 4
        assert (variant.peak_bytes or 0) > (variant.state_bytes or 0)


def test_a_sweep_that_is_done_does_nothing(sweep: SweepRecord, sweep_base: RunConfig, monkeypatch: pytest.MonkeyPatch):
    before = {file: file.stat().st_mtime for file in sweep.directory.rglob("*.jsonl")}
    monkeypatch.setattr("llama_jax.ablation.execution.Sweeper.prepare", None)
    again = llama_jax.ablate(sweep_base, VARIANTS, seeds=SEEDS, run_dir=sweep.directory, quiet=True)
    assert numbers(read_sweep(sweep.directory)) == numbers(sweep)
    assert again is not None
    assert before == {file: file.stat().st_mtime for file in sweep.directory.rglob("*.jsonl")}


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let the step after so many raise, as where the kernel is restarted."""
    from llama_jax.run import training

    left, real = [steps], training.Loop._log

    def log(*args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(training.Loop, "_log", log)


@pytest.mark.parametrize("steps", [3, pytest.param(14, marks=pytest.mark.slow)])
def test_a_sweep_that_was_stopped_goes_on(
    sweep: SweepRecord, sweep_base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
):
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(KeyboardInterrupt):
            llama_jax.ablate(sweep_base, VARIANTS, seeds=SEEDS, run_dir=tmp_path / "s", quiet=True)
    assert numbers(read_sweep(tmp_path / "s")) != numbers(sweep)
    llama_jax.ablate(sweep_base, VARIANTS, seeds=SEEDS, run_dir=tmp_path / "s", quiet=True)
    assert numbers(read_sweep(tmp_path / "s")) == numbers(sweep)


@pytest.fixture
def failing_saves(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Numbers of saves of a step that fail, by "RUN/STEP"; each save has ended when the next step begins."""
    left: dict[str, int] = {}
    save, background = store.ocp.save_checkpointables_async, store._in_background

    class Failing:
        def result(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    def failing(path: str, *args: Any, **kwargs: Any) -> Any:
        variant, seed, _, step = Path(path).parts[-4:]
        name = f"{variant}/{seed}/{step}"
        left[name] = left.get(name, 0) - 1
        return Failing() if left[name] >= 0 else save(path, *args, **kwargs)

    def awaited(*args: Any) -> Any:
        future = background(*args)
        concurrent.futures.wait([future])
        return future

    monkeypatch.setattr(store.ocp, "save_checkpointables_async", failing)
    monkeypatch.setattr(store, "_in_background", awaited)
    return left


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{}, {"mesh.fsdp": jax.device_count()}])
def test_a_save_that_fails_is_repeated_at_the_next_step_as_by_train(
    mesh: dict[str, int],
    sweep: SweepRecord,
    sweep_base: RunConfig,
    tmp_path: Path,
    failing_saves: dict[str, int],
    capsys: pytest.CaptureFixture[str],
):
    """Those of one run at step 2 and at the end, of another one twice in a row, which ends the sweep."""
    config = override(sweep_base, mesh)
    failing_saves.update({"base/seed-0/2": 1, "base/seed-0/4": 1, "MQA/seed-3/2": 1, "MQA/seed-3/3": 1})
    with pytest.raises(RunFailed, match=r"step 3 cannot be written to .*MQA.seed-3.* none before it: make room there"):
        llama_jax.ablate(config, VARIANTS, seeds=SEEDS, run_dir=tmp_path / "s", quiet=True)
    llama_jax.ablate(config, VARIANTS, seeds=SEEDS, run_dir=tmp_path / "s", quiet=True)
    warnings = re.findall(
        r"warning: the checkpoint of step (\d) .*/(.*)/checkpoints.*once more", capsys.readouterr().err
    )
    assert sorted(warnings) == [("2", "seed-0"), ("2", "seed-3"), ("4", "seed-0")]
    found = read_sweep(tmp_path / "s")
    assert mesh or numbers(found) == numbers(sweep)
    steps = {(trial.variant, trial.seed): open_run(trial.directory).committed_steps() for trial in found.trials}
    assert steps.pop(("base", 0)) == [3, 4]
    assert set(map(tuple, steps.values())) == {(2, 4)}


@pytest.mark.slow
def test_more_seeds_and_variants_are_added(sweep_base: RunConfig, tmp_path: Path):
    config = override(sweep_base, {"num_steps": 2})
    llama_jax.ablate(config, {"base": {}}, seeds=1, run_dir=tmp_path / "s", quiet=True)
    first = numbers(read_sweep(tmp_path / "s"))
    variants = {"slow": {"optimizer.learning_rate": 1e-3}, "base": {}}
    llama_jax.ablate(config, variants, seeds=[2], run_dir=tmp_path / "s", quiet=True)
    found = numbers(read_sweep(tmp_path / "s"))
    assert {key for key, lines in found.items() if lines} == {(n, s) for n in ("base", "slow") for s in (0, 2)}
    assert found["base", 0] == first["base", 0]
    assert read_sweep(tmp_path / "s").baseline == "base"


def test_other_arguments_in_the_directory_of_a_sweep(sweep: SweepRecord, sweep_base: RunConfig, tmp_path: Path):
    cases: list[tuple[dict[str, Any], str]] = [
        ({"steps": 7}, "num_steps=4, not 7"),
        ({"variants": {"MQA": {"model.attention.num_kv_heads": 4}}}, "variant 'MQA'=.*: 1}, not .*: 4}"),
        ({"match": "parameters"}, r"match=None, not \['parameters', None\]"),
        ({"baseline": "MQA"}, "baseline='base', not 'MQA'"),
    ]
    for changed, sentence in cases:
        arguments = {"base": sweep_base, "variants": VARIANTS, "seeds": SEEDS, "run_dir": sweep.directory} | changed
        with pytest.raises(UserError, match=f"holds a sweep with {sentence}: give another run_dir"):
            llama_jax.ablate(arguments.pop("base"), arguments.pop("variants"), **arguments)
    with pytest.raises(UserError, match="run_dir=s3://bucket/sweep must be a local"):
        llama_jax.ablate(sweep_base, VARIANTS, run_dir="s3://bucket/sweep")
    config = override(sweep_base, {"data.validation_fraction": 0.0})
    with pytest.raises(UserError, match="variant 'base': there is no held-out text to compare val_loss on"):
        llama_jax.ablate(config, VARIANTS, run_dir=tmp_path / "s", quiet=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=re.escape("is not empty and has no sweep.json")):
        llama_jax.ablate(sweep_base, VARIANTS, run_dir=tmp_path)


def test_a_run_that_fails_does_not_end_the_sweep(
    sweep_base: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    variants = {"wild": {"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 1e30}, "base": {}}
    llama_jax.ablate(sweep_base, variants, seeds=1, steps=4, run_dir=tmp_path / "s", quiet=True)
    found = read_sweep(tmp_path / "s")
    assert [trial.state for trial in found.trials] == ["failed", "done"]
    assert "lower optimizer.learning_rate" in (found.trials[0].failure or "")
    assert "wild, seed 0 failed: the norm of the gradient" in capsys.readouterr().out.replace("\n", " ")
    llama_jax.ablate(sweep_base, variants, seeds=1, steps=4, run_dir=tmp_path / "s", quiet=True)  # once is enough
    assert "failed" not in capsys.readouterr().out


def test_a_tokenizer_is_trained_once_for_the_same_texts(
    sweep_base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Objectives and packing make other rows of the same tokens; other files are other texts."""
    from llama_jax.run import preparing

    trained, real = list[Any](), preparing.train_tokenizer

    def train_tokenizer(texts: Any, **options: Any) -> Any:
        trained.append(options)
        return real(texts, **options)

    monkeypatch.setattr(preparing, "train_tokenizer", train_tokenizer)
    variants = {"base": {}, "packed": {"data.packing": "best_fit"}, "left out": {"data.exclude": "00.txt"}}
    base = override(sweep_base, {"data.cache_dir": str(tmp_path / "cache")})
    llama_jax.ablate(base, variants, seeds=1, steps=1, run_dir=tmp_path / "s", quiet=True)
    assert len(trained) == 2


def test_one_bar_over_all(sweep_base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from llama_jax.screen import Bar

    seen: list[str] = []
    real = Bar.advance

    def advance(self: Bar, step: int, total: int | None = None) -> None:
        real(self, step, total)
        if self.total:
            seen.append(re.sub("  +", "  ", repr(self)))

    monkeypatch.setattr(Bar, "advance", advance)
    llama_jax.ablate(sweep_base, VARIANTS, seeds=SEEDS, steps=2, run_dir=tmp_path / "s")
    names = [text.split("  ")[0] for text in seen]
    assert list(dict.fromkeys(names)) == ["sweep", "base, slow, 4 runs", "MQA, 2 runs"]
    steps = [int(found[1]) for text in seen if (found := re.search(r"(\d+)/12", text))]
    assert steps == sorted(steps)
    assert set(steps) == set(range(13))


def test_a_sweep_compiles_nothing_that_its_runs_have_compiled(
    sweep: SweepRecord, sweep_base: RunConfig, tmp_path: Path
):
    """Three variants of two programs were run by the fixture: other seeds, rates and steps compile nothing."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        variants = {**VARIANTS, "slow": {"optimizer.learning_rate": 1e-4, "optimizer.weight_decay": 0.0}}
        llama_jax.ablate(sweep_base, variants, seeds=[5, 6], steps=3, run_dir=tmp_path / "s", quiet=True)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert events.count(COMPILED) == 0


def test_the_same_call_without_a_directory_continues(
    sweep_base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for seeds in (1, 2):
        llama_jax.ablate(sweep_base, {"base": {}}, seeds=seeds, steps=1, quiet=True)
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch("ablation-[0-9a-f]{8}", folder.name)
    assert [trial.state for trial in read_sweep(folder).trials] == ["done", "done"]
