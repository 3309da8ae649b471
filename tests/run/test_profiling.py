"""The profile of a window of steps: its marks, and the line that says how to open it."""

import contextlib
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from llama_jax.config import override
from llama_jax.run import RunConfig, train


def test_the_window_is_recorded_and_its_steps_are_marked(
    quick: RunConfig,
    loss_of: dict[int, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    events: list[Any] = []

    @contextlib.contextmanager
    def trace(directory: str, *, create_perfetto_trace: bool) -> Iterator[None]:
        assert create_perfetto_trace
        events.append("begins")
        yield
        events.append("ends")
        file = Path(directory) / "plugins" / "profile" / "now" / "perfetto_trace.json.gz"
        file.parent.mkdir(parents=True)
        file.touch()

    @contextlib.contextmanager
    def mark(name: str, *, step_num: int) -> Iterator[None]:
        events.append(step_num)
        yield

    monkeypatch.setattr(jax.profiler, "trace", trace)
    monkeypatch.setattr(jax.profiler, "StepTraceAnnotation", mark)
    directory = tmp_path / "run" / "profile"
    train(override(quick, {"profile.start_step": 2, "profile.num_steps": 2}), tmp_path / "run")
    assert events == [0, 1, "begins", 2, 3, "ends", 4, 5]
    assert (
        f"profile of 2 steps from 2: show it by `xprof --logdir='{directory}'` (pip install 'llama_jax[profile]'), or "
        f"open '{directory}/plugins/profile/now/perfetto_trace.json.gz' at https://ui.perfetto.dev\n"
    ) in capsys.readouterr().out


@pytest.mark.slow
def test_what_jax_writes(run_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A window that goes to the end of the run, without waiting for a browser."""
    change = {"profile.start_step": 2, "profile.num_steps": 9, "num_steps": 4, "logging.sample_prompts": ()}
    run = train(override(run_config, change), tmp_path / "run")
    (file,) = (run.directory / "profile").rglob("perfetto_trace.json.gz")
    assert str(file) in capsys.readouterr().out
    text = gzip.decompress(file.read_bytes()).decode()
    assert '"step_num": "3"' in text
    assert '"step_num": "1"' not in text
    assert list((run.directory / "profile").rglob("*.xplane.pb"))
