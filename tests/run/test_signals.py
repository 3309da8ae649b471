"""A termination signal in any phase of a run ends it in order: 75, a sentence, and the next start goes on."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from llama_jax.__main__ import main
from llama_jax.checkpoint import CheckpointStore
from llama_jax.config import override
from llama_jax.run import RunConfig, open_run, preparing, training
from llama_jax.run.signals import Preempted, termination

NOTHING = "stopped before a step was done: nothing was trained yet, start again to continue\n"


@pytest.fixture(scope="module")
def quick(quick: RunConfig) -> RunConfig:
    return override(quick, {"logging.sample_prompts": ("the cat",)})


@pytest.mark.quick("llama_jax.run.preparing-prepare_dataset-None", "Loop-_on_devices-None", "CheckpointStore-save-6")
@pytest.mark.parametrize(
    ("owner", "name", "step"),
    [
        (training, "check_directory", None),
        (preparing, "prepare_dataset", None),  # download and tokenization
        (CheckpointStore, "load", None),  # restoring
        (training.Loop, "_on_devices", None),  # before the first step is compiled
        (training.Loop, "_report", 6),
        (training.Loop, "_validate", 6),
        (CheckpointStore, "save", 6),
        (CheckpointStore, "close", 6),  # while the last save is written
        (training, "write_samples", 6),
    ],
)
def test_a_signal_in_any_phase_ends_in_order(
    begun: Path,
    owner: Any,
    name: str,
    step: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    original, sent = getattr(owner, name), list[int]()

    def signalled(*args: Any, **kwargs: Any) -> Any:
        if not sent:
            sent.append(0)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(owner, name, signalled)
    capsys.readouterr()
    assert main(["train", str(begun)]) == 75
    said = capsys.readouterr().err
    assert said.endswith(
        f"stopped at step {step} with a checkpoint saved: start again to continue\n" if step else NOTHING
    )
    assert "Traceback" not in said
    assert open_run(begun).steps()[-1] == (step or 4)
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (begun / ".lock").exists()
    assert main(["train", str(begun)]) == 0
    assert [line["step"] for line in open_run(begun).metrics()] == [1, 2, 3, 4, 5, 6]
    assert (begun / "samples.txt").exists()
    assert not [thread for thread in threading.enumerate() if "orbax" in thread.name and not thread.daemon]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_at_once(number: int, monkeypatch: pytest.MonkeyPatch):
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)

    def signalled_twice() -> None:
        with termination() as stopping:
            assert not stopping(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopping(2)
            os.kill(os.getpid(), number)

    with pytest.raises((KeyboardInterrupt, Preempted)):
        signalled_twice()
    assert left == ([143] if number == signal.SIGTERM else [])


def test_one_after_the_last_step_is_not_lost():
    saved: list[int] = []

    def signalled() -> None:
        with termination() as stopping:
            assert not stopping(3)
            os.kill(os.getpid(), signal.SIGINT)
            saved.append(3)

    with pytest.raises(Preempted, match="stopped at step 3"):
        signalled()
    assert saved == [3]
