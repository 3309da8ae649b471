"""A run leaves behind what it says, and another start goes on where it ended."""

import contextlib
import dataclasses
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.checkpoint import CheckpointStore, save
from llama_jax.config import UserError, override
from llama_jax.data import read_texts
from llama_jax.models import Compute
from llama_jax.nn.attention import attend as kernels
from llama_jax.run import Run, RunConfig, RunFailed, open_run, train
from llama_jax.run.clock import Clock
from llama_jax.tokenizers import load_tokenizer
from llama_jax.training import learning_rate, make_eval_step


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.fixture
def copy(finished_run: Run, tmp_path: Path) -> Path:
    """The finished run's directory, to be changed."""
    return Path(shutil.copytree(finished_run.directory, tmp_path / "run"))


def test_directory_holds_everything(finished_run: Run):
    top = {path.name for path in finished_run.directory.iterdir()}
    files = {"config.json", "data.json", "metrics.jsonl", "starts.jsonl", "samples.txt"}
    assert top == files | {"tokenizer", "checkpoints"}
    assert finished_run.steps() == [8, 12]


def test_prompts_begin_as_documents_do(finished_run: Run):
    for tokenizer in (finished_run.tokenizer, load_tokenizer(finished_run.directory / "tokenizer")):
        assert tokenizer.prefix_ids == tokenizer.start_ids != ()
        assert tokenizer.encode_prompt("def") == tokenizer.encode("def", bos=True)
    # What the file alone would say is kept apart from it.
    assert (finished_run.directory / "tokenizer" / "prompt_rule.json").is_file()


def test_metrics_of_every_step(finished_run: Run, run_config: RunConfig):
    lines = [json.loads(line) for line in (finished_run.directory / "metrics.jsonl").read_text().splitlines()]
    assert lines == finished_run.metrics()
    assert [line["step"] for line in lines] == list(range(1, 13))
    always = {"step", "loss", "learning_rate", "grad_norm", "num_targets", "skipped"}
    for line in lines:
        speed = {"tokens_per_second", "mfu"} if line["step"] > 1 else set()
        measured = {"val_loss", "val_bits_per_byte"} if line["step"] in (6, 12) else set()
        assert set(line) == always | speed | measured
        assert all(math.isfinite(value) for value in line.values())
    hyper = run_config.optimizer.hyper(12)
    rates = [float(learning_rate(step, hyper)) for step in range(12)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates, rel=1e-6)
    assert lines[-1]["loss"] < lines[0]["loss"] - 1.5


def test_validation_is_the_mean_over_all_held_out_tokens(finished_run: Run, run_config: RunConfig):
    """By another way: documents one by one, cut where the windows are cut, each piece alone through the model."""
    lm, tokenizer, length = finished_run.load(), finished_run.tokenizer, run_config.sequence_length
    texts = list(read_texts(run_config.data, "validation"))
    pieces, place = [], 0
    for text in texts:
        ids = tokenizer.encode(text, bos=True, eos=True)
        cuts = [0, *range(length - place % length, len(ids) - 1, length), len(ids) - 1]
        pieces += [ids[a : b + 1] for a, b in itertools.pairwise(cuts) if b > a]
        place += len(ids)
    padded = np.zeros((len(pieces), length + 1), np.int32)
    for row, piece in zip(padded, pieces, strict=True):
        row[: len(piece)] = piece
    log_p = np.asarray(jax.nn.log_softmax(lm.model(jnp.asarray(padded[:, :-1]))))
    nats = [-log_p[row, i, piece[i + 1]] for row, piece in enumerate(pieces) for i in range(len(piece) - 1)]
    last = finished_run.metrics()[-1]
    assert len(nats) == sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert last["val_loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert last["val_bits_per_byte"] == pytest.approx(np.sum(nats) / math.log(2) / num_bytes, rel=1e-5)


def test_batch_is_the_one_of_that_step(finished_run: Run, run_config: RunConfig):
    params = finished_run.load(step=8).model.params()
    evaluate = make_eval_step(run_config.model, Compute())

    def loss(step: int) -> float:
        nats, targets = evaluate(params, jax.tree.map(jnp.asarray, finished_run.batch(step)))
        return float(nats / targets)

    stored = finished_run.metrics()[8]
    assert stored["step"] == 9
    assert loss(8) == pytest.approx(stored["loss"], rel=1e-5)
    assert min(range(12), key=lambda step: abs(loss(step) - stored["loss"])) == 8


def test_a_batch_is_of_a_step_of_the_run(finished_run: Run):
    for step in (-1, 12):
        with pytest.raises(UserError, match=f"step={step} must be one of the run's, from 0 to 11"):
            finished_run.batch(step)


def test_samples_continue_the_prompts(finished_run: Run):
    sample = (finished_run.directory / "samples.txt").read_text()
    assert sample.startswith("the cat")
    assert len(sample) > 20


def test_samples_while_it_trains_change_nothing_else(finished_run: Run, run_config: RunConfig, tmp_path: Path):
    run = train(override(run_config, {"logging.sample_every_steps": 4}), tmp_path / "run")
    texts = {file.name: file.read_text() for file in (run.directory / "samples").iterdir()}
    assert texts.keys() == {"4.txt", "8.txt", "12.txt"}
    assert all(text.startswith("the cat") for text in texts.values())
    end = (run.directory / "samples.txt").read_text()
    assert end == texts["12.txt"] != texts["4.txt"]
    assert end == (finished_run.directory / "samples.txt").read_text()
    losses = [[line["loss"] for line in one.metrics()] for one in (run, finished_run)]
    assert losses[0] == losses[1]
    [start] = [json.loads(line) for line in (run.directory / "starts.jsonl").read_text().splitlines()]
    assert (start["step"], start["devices"], start["device"]) == (0, jax.device_count(), jax.devices()[0].device_kind)


def test_opened_later_it_is_the_same(finished_run: Run, run_config: RunConfig):
    run = open_run(finished_run.directory)
    assert run.config == run_config
    assert run.steps() == finished_run.steps()
    assert all(np.array_equal(run.batch(3)[name], x) for name, x in finished_run.batch(3).items())
    with pytest.raises(UserError, match="no checkpoint of step 5: there are 8, 12"):
        run.load(step=5)


def test_starting_a_finished_run_changes_nothing(copy: Path, run_config: RunConfig):
    before = files_of(copy)
    train(run_config, copy)
    assert files_of(copy) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed=0, not 1"),
        ({"optimizer.learning_rate": 0.5}, "optimizer.learning_rate=0.01, not 0.5"),
        ({"model.attention.num_kv_heads": 4}, "model.attention.num_kv_heads=2, not 4"),
        ({"data.validation_fraction": 0.3}, "data.validation_fraction=0.2, not 0.3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_config_is_refused_by_the_key(copy: Path, run_config: RunConfig, change: dict[str, Any], named: str):
    before = files_of(copy)
    with pytest.raises(UserError, match=named):
        train(override(run_config, change), copy)
    assert files_of(copy) == before


def test_another_text_is_refused(copy: Path, run_config: RunConfig, tmp_path: Path):
    texts = Path(shutil.copytree(run_config.data.path[0], tmp_path / "texts"))
    config = json.loads((copy / "config.json").read_text())
    config["data"]["path"] = [str(texts)]
    (copy / "config.json").write_text(json.dumps(config))
    moved = override(run_config, {"data.path": (str(texts),)})
    train(moved, copy)  # the same text elsewhere is the same
    (texts / "00.txt").write_text("something else, and more of it " * 9)
    before = files_of(copy)
    with pytest.raises(UserError, match=r"are not what .* began with"):
        train(moved, copy)
    with pytest.raises(UserError, match=r"are not what .* began with"):
        open_run(copy).batch(0)
    assert files_of(copy) == before


def test_a_directory_of_something_else_is_refused(run_config: RunConfig, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and not a run"):
        train(run_config, tmp_path)
    with pytest.raises(UserError, match="is a file"):
        train(run_config, tmp_path / "thesis.txt")
    assert files_of(tmp_path) == {"thesis.txt": b"mine"}


MESHES = [None, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_loads_the_same_bits_on_any_mesh(finished_run: Run, mesh: dict[str, int] | None):
    plain = finished_run.load().model.params()
    loaded = finished_run.load(mesh=mesh).model.params()
    assert loaded.keys() == plain.keys()
    for name, value in loaded.items():
        assert len(value.sharding.device_set) == (8 if mesh else 1)
        assert np.array_equal(value, plain[name]), name


def test_loads_in_another_type(finished_run: Run):
    plain = finished_run.load().model.params()
    for name, value in finished_run.load(dtype="bfloat16").model.params().items():
        assert value.dtype == jnp.bfloat16
        assert np.array_equal(value, plain[name].astype(jnp.bfloat16)), name


def test_continues_on_another_mesh_with_unrolled_layers(copy: Path, finished_run: Run, run_config: RunConfig):
    shutil.rmtree(copy / "checkpoints" / "12")
    change = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "compute.scan_layers": False}
    run = train(override(run_config, change | {"logging.sample_prompts": ()}), copy)
    for line, before in zip(run.metrics(), finished_run.metrics(), strict=True):
        assert line["loss"] == pytest.approx(before["loss"], rel=1e-3)
    params = finished_run.load().model.params()
    for name, value in run.load().model.params().items():
        np.testing.assert_allclose(value, params[name], atol=2e-3, err_msg=name)


def test_a_line_cut_off_by_a_crash_is_dropped(copy: Path, finished_run: Run, run_config: RunConfig):
    shutil.rmtree(copy / "checkpoints" / "12")
    metrics = copy / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:9]) + lines[9][:20])
    assert [line["step"] for line in open_run(copy).metrics()] == list(range(1, 10))
    run = train(run_config, copy)
    assert [line["step"] for line in run.metrics()] == list(range(1, 13))
    speed = ("tokens_per_second", "mfu")
    told = [[{k: v for k, v in m.items() if k not in speed} for m in r.metrics()] for r in (run, finished_run)]
    assert told[0] == told[1]


def test_loss_that_is_no_number_ends_the_run_and_is_never_saved(run_config: RunConfig, tmp_path: Path):
    change = {"optimizer.learning_rate": 1e30, "checkpoint.every_steps": 1, "logging.every_steps": 100}
    change["checks.max_skipped_steps"] = 1
    with pytest.raises(RunFailed, match=r"at step 2 is (nan|inf), .*: lower optimizer.learning_rate"):
        train(override(run_config, change), tmp_path / "run")
    with contextlib.closing(CheckpointStore(tmp_path / "run" / "checkpoints")) as store:
        assert store.steps() == [1]


def test_prompts_too_long_for_the_model_are_found_before_anything_is_written(run_config: RunConfig, tmp_path: Path):
    config = override(run_config, {"logging.sample_prompts": ("cat " * 100,)})
    with pytest.raises(UserError, match=r"prompt of logging.sample_prompts has \d+ tokens.*max_positions=64"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_saved_model_is_the_one_that_was_loaded(finished_run: Run, tmp_path: Path):
    from llama_jax import load

    lm = finished_run.load(mesh={"fsdp": 8})
    save(lm, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.config == lm.config
    assert again.tokenizer is not None
    assert again.tokenizer.fingerprint == finished_run.tokenizer.fingerprint
    params = lm.model.params()
    assert all(np.array_equal(value, params[name]) for name, value in again.model.params().items())


class TestClock:
    @pytest.fixture
    def now(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
        now = [0.0]
        monkeypatch.setattr(time, "perf_counter", lambda: now[0])
        return now  # type: ignore[return-value]

    def test_leaves_out_the_first_step_and_pauses(self, now: list[float]):
        clock = Clock(10)
        now[0] += 60
        assert clock.speed(11) is None
        now[0] += 4
        assert clock.speed(13) == 0.5
        now[0] += 1
        with clock.paused():
            now[0] += 100
            assert clock.speed(15) == 2
            now[0] += 100
        now[0] += 4
        assert clock.speed(17) == 0.5


def test_configs_are_values(run_config: RunConfig):
    assert dataclasses.replace(run_config) == run_config
    assert hash(run_config.model) == hash(dataclasses.replace(run_config.model))


@pytest.mark.slow
def test_a_kernel_that_disagrees_does_not_start(run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def ignores_documents(q, k, v, mask, *, scale):
        return kernels.blockwise_attention(q, k, v, dataclasses.replace(mask, segment_ids=None), scale=scale)

    monkeypatch.setitem(kernels.KERNELS, "blockwise", kernels.Kernel(ignores_documents))
    config = override(run_config, {"compute.attention_kernel": "blockwise", "compute.preflight": True})
    with pytest.raises(RunFailed, match="attention kernel 'blockwise' disagrees with the reference"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text()
