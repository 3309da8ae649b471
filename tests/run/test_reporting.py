"""Where numbers go: a run that is continued is one curve and one run there."""

import dataclasses
import re
import shlex
import struct
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, ClassVar

import jax
import pytest

from llama_jax.config import override, to_json
from llama_jax.models import DecoderConfig, num_parameters
from llama_jax.nn import Experts, SoftmaxTopK
from llama_jax.run import Logger, Run, RunConfig, open_run, train
from llama_jax.run.reporting import TensorBoard, WeightsAndBiases, commands, overview, peak_memory


@pytest.mark.parametrize(
    ("stats", "found"), [({"peak_bytes_in_use": 5}, {"peak_memory_bytes": 5}), ({"bytes_in_use": 5}, {}), (None, {})]
)
def test_peak_memory_is_the_allocator_s(
    stats: dict[str, int] | None, found: dict[str, int], monkeypatch: pytest.MonkeyPatch
):
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert peak_memory() == found


def curve(directory: Path) -> list[tuple[int, float]]:
    """What TensorBoard shows: a start of a session hides what files before it have from its step on."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown: list[tuple[int, float]] = []
    for file in sorted(directory.iterdir()):
        data = file.read_bytes()
        while data:  # a record: its size, a checksum, the event, a checksum
            (size,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.session_log.status == SessionLog.START:
                shown = [(step, value) for step, value in shown if step < event.step]
            shown += [(event.step, value.simple_value) for value in event.summary.value]
    return shown


def test_tensorboard_shows_one_curve(run_config: RunConfig, tmp_path: Path):
    for start, steps, value in ((0, range(1, 7), 1.0), (4, range(5, 9), 2.0)):
        writer = TensorBoard(Run(tmp_path, run_config), start)
        for step in steps:
            writer.write({"step": step, "loss": value + step, "bad": None})
        writer.close()
    assert curve(tmp_path / "tensorboard") == [(step, 1.0 + step) for step in range(1, 5)] + [
        (step, 2.0 + step) for step in range(5, 9)
    ]


def test_weights_and_biases_keeps_one_run_and_knows_its_config(
    run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = override(run_config, {"logging.wandb_project": "mine"})
    begun: list[dict[str, Any]] = []
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = ModuleSpec("wandb", None)
    wandb.init = lambda **kwargs: begun.append(kwargs) or types.SimpleNamespace(finish=lambda: None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for name in ("one", "one", "other"):
        (tmp_path / name).mkdir(exist_ok=True)
        WeightsAndBiases(Run(tmp_path / name, config), 0).close()
    first, again, other = begun
    assert first == again
    assert first["id"] != other["id"]
    assert first["resume"] == "allow"
    assert first["config"] == to_json(config)
    assert first["allow_val_change"]  # what may differ when a run is continued is in its config


class Table(Logger):
    """What a notebook cell would define."""

    rows: ClassVar[list[tuple[str, int, float]]] = []

    def write(self, metrics: dict[str, Any]) -> None:
        self.rows.append((self.run.directory.name, metrics["step"], metrics["loss"]))

    def close(self) -> None:
        self.rows.append(("closed", self.start_step, 0.0))


def test_a_logger_of_ones_own_has_every_step_of_every_start(run_config: RunConfig, tmp_path: Path):
    config = override(run_config, {"num_steps": 2, "logging.sample_prompts": ()})
    train(config, tmp_path / "run", loggers=(Table,))
    run = train(override(config, {"num_steps": 4}), tmp_path / "run", loggers=(Table,))
    losses = [("run", m["step"], m["loss"]) for m in run.metrics()]
    assert Table.rows == [*losses[:2], ("closed", 0, 0.0), *losses[2:], ("closed", 2, 0.0)]


def said(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, str], list[str]]:
    """What a run has printed: aligned names and values, and the lines."""
    lines = capsys.readouterr().out.splitlines()
    return dict(re.split("  +", line, maxsplit=1) for line in lines if re.match(r"[a-z]+  +\S", line)), lines


@pytest.fixture
def short(run_config: RunConfig) -> RunConfig:
    change = {"num_steps": 6, "logging.every_steps": 3, "logging.validate_every_steps": 6, "compute.preflight": False}
    return override(run_config, change | {"logging.sample_prompts": ()})


def test_a_run_says_what_it_does_and_what_to_do_next(
    short: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    every: list[float] = []

    class Losses(Logger):
        def write(self, metrics: dict[str, Any]) -> None:
            every.append(metrics["loss"])

    train(override(short, {"logging.every_steps": 1}), tmp_path / "each", loggers=(Losses,))
    capsys.readouterr()
    train(short, tmp_path / "a run")
    found, lines = said(capsys)
    assert found["run"] == str(tmp_path / "a run")
    assert found["model"] == f"{num_parameters(short.model):,} parameters"
    assert found["devices"].startswith("8 x cpu, mesh ")
    assert re.fullmatch(r"[\d.]+ MiB a device, estimated", found["memory"])
    assert found["batch"] == "8 x 32 = 256 tokens a step"
    assert found["steps"] == "6, 1,536 tokens in all"
    assert lines.index("compiling the train step...") + 2 == next(
        i for i, line in enumerate(lines) if line[:7] == "step 1/"
    )
    # A line has the mean over the steps since the line before.
    means = [every[0], sum(every[1:3]) / 2, sum(every[3:6]) / 3]
    shown = [float(re.findall(r"  loss (\S+)", line)[0]) for line in lines if "  loss " in line]
    assert shown == pytest.approx(means, abs=1e-4)
    assert all("ms/step" in line for line in lines if re.match(r"step [36]/6  loss", line))
    assert found["best"] == f"val_loss {open_run(tmp_path / 'a run').metrics()[-1]['val_loss']:.4f} at step 6"
    assert found["checkpoint"] == str(tmp_path / "a run" / "checkpoints" / "6")
    assert shlex.split(found["sample"])[-3:] == [str(tmp_path / "a run"), "--prompt", "..."]
    assert shlex.split(found["continue"])[-3:] == [str(tmp_path / "a run"), "--num-steps", "12"]
    assert found["done"].startswith("in ")


def test_quiet_leaves_warnings_and_the_end(short: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(override(short, {"optimizer.warmup_steps": 20}), tmp_path / "run", quiet=True)
    found, lines = said(capsys)
    assert list(found) == ["done", "best", "checkpoint", "sample", "continue"]
    assert [line for line in lines if "warmup" in line] != []
    assert len(lines) <= len(found) + 2
    assert len(open_run(tmp_path / "run").metrics()) == 3


def test_a_notebook_is_given_python(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    sample, go_on = commands("/a b", "it's", 12)
    assert sample == """llama_jax.generate_text(run.load(), ["it's"])"""
    assert go_on == "llama_jax.resume('/a b', {'num_steps': 12})"


def test_active_parameters_are_those_that_a_token_meets(run_config: RunConfig, tmp_path: Path):
    experts = Experts(8, 16, SoftmaxTopK(2, normalize=True), "silu", gated=True)
    assert isinstance(run_config.model, DecoderConfig)
    model = dataclasses.replace(run_config.model, feed_forward=experts)
    config = dataclasses.replace(run_config, model=model)
    (line,) = [line for line in overview(Run(tmp_path, config), config, 0) if line.startswith("model")]
    idle = 6 * 3 * 16 * model.hidden_size * model.num_layers
    assert line.endswith(
        f"{num_parameters(model):,} parameters, {num_parameters(model) - idle:,} of them active for a token"
    )
