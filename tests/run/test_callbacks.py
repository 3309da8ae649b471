"""Callbacks of `train`: what they get, what they may do, and that the run is the same with them."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError, override
from llama_jax.run import Event, Run, RunConfig, train
from llama_jax.run.callbacks import check_callbacks
from llama_jax.sampling import generate_text

TIMED = ("tokens_per_second", "mfu")


def untimed(run: Run) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in TIMED} for line in run.metrics()]


def test_callbacks_get_what_is_logged_and_add_to_it(quick: RunConfig, loss_of: dict[int, float], tmp_path: Path):
    loss_of.update({4: 0.5, -6: 0.25})
    seen: list[dict[str, Any]] = []

    def first(event: Event) -> dict[str, Any] | None:
        assert event.run.config is config
        seen.append({"at": event.step, **event})
        return {"accuracy": np.float32(0.5), "by_class": np.arange(2)} if event.step == 4 else None

    class Second:
        def __call__(self, event: Event) -> dict[str, Any]:
            return {"twice": 2 * event["accuracy"]} if "accuracy" in event else {}

    config = override(quick, {"logging.every_steps": 4})
    run = train(config, tmp_path / "run", callbacks=(first, Second()))
    added = {"accuracy": 0.5, "by_class": [0.0, 1.0], "twice": 1.0}
    lines = [{"at": line["step"], **line} for line in run.metrics()]
    assert [line["at"] for line in lines] == [1, 4, 6]
    assert lines[1] == seen[1] | added
    assert [seen[0], seen[2]] == [lines[0], lines[2]]
    assert seen[1]["loss"] == 0.5
    assert seen[2]["val_loss"] == 0.25


def test_a_callback_saves_and_stops_and_the_run_goes_on(
    quick: RunConfig, loss_of: dict[int, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def saves(event: Event) -> None:
        if event.step in (1, 2):
            event.save()

    def stops(event: Event) -> None:
        if event.step == 3:
            event.stop("the loss is low enough")

    config = override(quick, {"checkpoint.keep_last": 9})
    run = train(config, tmp_path / "run", callbacks=(saves, stops))
    assert run.steps() == [1, 2, 3]
    assert len(run.metrics()) == 3
    assert "stopped at step 3/6 by a callback: the loss is low enough\n" in capsys.readouterr().out
    assert train(config, tmp_path / "run").steps() == [1, 2, 3, 4, 6]
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4, 5, 6]
    assert "stopped" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_is_the_same_with_callbacks(run_config: RunConfig, tmp_path: Path, finished_run: Run):
    """Also where they evaluate the model, and stop in between; what they load is what is saved."""
    loaded: list[LanguageModel] = []

    def evaluate(event: Event) -> dict[str, float] | None:
        if event.step != 8:
            return None
        loaded.append(event.load())
        event.stop()
        return {"letters": len(generate_text(event.load(), ["the cat"], max_new_tokens=4, temperature=0.0)[0])}

    run = train(run_config, tmp_path / "run", callbacks=(evaluate,))
    assert run.metrics()[-1].keys() >= {"letters", "loss"}
    saved = run.load(8).model.params()
    assert all(np.array_equal(value, saved[name]) for name, value in loaded[0].model.params().items())
    run = train(run_config, tmp_path / "run", callbacks=(evaluate,))
    assert [{n: v for n, v in line.items() if n != "letters"} for line in untimed(run)] == untimed(finished_run)
    ours, theirs = (jax.tree.map(np.asarray, r.load().model.params()) for r in (run, finished_run))
    assert all(np.array_equal(value, theirs[name]) for name, value in ours.items())


def raises(event: Event) -> None:
    raise KeyError("no such class")


def late(event: Event) -> None:
    KEPT.append(event)
    KEPT[0].load()


KEPT: list[Event] = []


@pytest.mark.parametrize(
    ("callback", "sentence"),
    [
        (raises, "callback 'raises' at step 1 failed: KeyError: 'no such class'"),
        (lambda event: 1.0, "callback '<lambda>' at step 1 returned float: return None or numbers by name"),
        (lambda event: {"loss": 1.0}, "at step 1 returned 'loss', which the step has: take another name"),
        (lambda event: {"text": "a"}, "at step 1 returned text='a': return numbers"),
        (late, "callback 'late' at step 2 failed: UserError: event.load.. works within the callback only"),
    ],
)
def test_a_mistake_names_the_callback(
    quick: RunConfig, loss_of: dict[int, float], tmp_path: Path, callback: Any, sentence: str
):
    with pytest.raises(UserError, match=sentence):
        train(quick, tmp_path / "run", callbacks=(callback,))


@pytest.mark.parametrize(("callbacks", "sentence"), [(raises, r"callbacks=\(raises,\)"), ((1,), "callbacks=1 cannot")])
def test_what_cannot_be_called_is_refused(callbacks: Any, sentence: str):
    with pytest.raises(UserError, match=sentence):
        check_callbacks(callbacks)
