"""Where numbers go: a run that is continued is one curve and one run there."""

import struct
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from llama_jax.config import to_json
from llama_jax.run import Run, RunConfig
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


def test_tensorboard_shows_one_curve(tmp_path: Path):
    for start, steps, value in ((0, range(1, 7), 1.0), (4, range(5, 9), 2.0)):
        writer = TensorBoard(tmp_path, start)
        for step in steps:
            writer.write({"step": step, "loss": value + step, "bad": None})
        writer.close()
    assert curve(tmp_path) == [(step, 1.0 + step) for step in range(1, 5)] + [
        (step, 2.0 + step) for step in range(5, 9)
    ]


def test_weights_and_biases_keeps_one_run_and_knows_its_config(
    run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begun: list[dict[str, Any]] = []
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = ModuleSpec("wandb", None)
    wandb.init = lambda **kwargs: begun.append(kwargs) or types.SimpleNamespace(finish=lambda: None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for name in ("one", "one", "other"):
        (tmp_path / name).mkdir(exist_ok=True)
        WeightsAndBiases("mine", Run(tmp_path / name, run_config)).close()
    first, again, other = begun
    assert first == again
    assert first["id"] != other["id"]
    assert first["resume"] == "allow"
    assert first["config"] == to_json(run_config)
    assert first["allow_val_change"]  # what may differ when a run is continued is in its config
