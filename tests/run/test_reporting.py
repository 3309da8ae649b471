"""Where numbers go: a run that is continued is one curve and one run there."""

import struct
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, ClassVar

import pytest

from llama_jax.config import override, to_json
from llama_jax.run import Logger, Run, RunConfig, train
from llama_jax.run.reporting import TensorBoard, WeightsAndBiases


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
