"""Perplexity and bits per byte by windows, and what comes with them: files, JSON, mistakes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import llama_jax
from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError
from llama_jax.evaluation import evaluate
from llama_jax.evaluation.perplexity import windows
from llama_jax.run import Run


@pytest.fixture(scope="module")
def lm(finished_run: Run) -> LanguageModel:
    return finished_run.load()


def nats_of(lm: LanguageModel, text: str) -> float:
    """Cross-entropy of a text by one forward pass of all of it."""
    assert lm.tokenizer is not None
    ids = lm.tokenizer.encode(text, bos=True)
    logits = np.asarray(lm.model(np.array([ids[:-1]]))[0], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -float(logprobs[np.arange(len(ids) - 1), ids[1:]].sum())


@settings(max_examples=40)
@given(st.integers(0, 60), st.integers(1, 20), st.data())
def test_every_token_is_scored_once_with_its_context(length: int, window: int, data: st.DataObject):
    stride = data.draw(st.integers(1, window))
    ids, scored = list(range(length)), []
    for (inputs, [last]), count in windows(ids, window, stride):
        assert 1 <= count <= len(inputs) <= window
        assert [*inputs, last] == ids[inputs[0] : last + 1]
        first = last - count + 1
        scored += range(first, last + 1)
        assert inputs[0] == 0 or first - inputs[0] >= window - stride
    assert scored == ids[1:]


def test_a_text_that_fits_is_the_full_forward_pass(lm: LanguageModel, tmp_path: Path):
    texts = {"a.txt": "the cat sat on a mat.", "b.txt": "old red barn"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts.values()))
    results = evaluate(lm, texts=str(tmp_path), quiet=True).results
    sizes = {name: len(text) for name, text in texts.items()}
    nats = {name: nats_of(lm, text) for name, text in texts.items()}
    sizes |= {"c.jsonl": sum(sizes.values()), "total": 2 * sum(sizes.values())}
    nats |= {"c.jsonl": sum(nats.values()), "total": 2 * sum(nats.values())}
    assert results.keys() == nats.keys()
    for name, found in results.items():
        assert found["loss"] * found["tokens"] == pytest.approx(nats[name], rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(nats[name] / math.log(2) / sizes[name], rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
        assert found["bytes"] == sizes[name]


def test_longer_windows_than_the_text_change_nothing(lm: LanguageModel, tmp_path: Path):
    (tmp_path / "a.txt").write_text("the cat sat on a mat and then ran to see " * 2)
    by_window = [
        evaluate(lm, texts=str(tmp_path), window=window, stride=stride, quiet=True).results["a.txt"]
        for window, stride in ((64, 64), (64, 1), (8, 1), (8, 8))
    ]
    whole, also_whole, one, eight = (found["loss"] for found in by_window)
    assert whole == pytest.approx(also_whole, rel=1e-6)
    assert len({whole, one, eight}) == 3
    assert len({found["tokens"] for found in by_window}) == 1


def test_held_out_text_of_a_run(finished_run: Run):
    """Bytes are those that the run scores, and a file in the run has all that the numbers depend on."""
    scores = evaluate(finished_run, quiet=True)
    assert scores.results["held-out"]["bytes"] == finished_run.dataset.scored_bytes()
    assert scores.path is not None
    assert scores.path.parent == finished_run.directory / "evaluations"
    saved = json.loads(scores.path.read_text())
    assert saved["results"] == scores.results
    assert saved["step"] == 12
    assert saved["settings"]["window"] == finished_run.config.sequence_length
    assert saved["versions"].keys() == {"llama_jax", "jax"}
    scores.path.unlink()


@pytest.mark.slow
def test_rows_of_single_documents_give_the_runs_own_number(finished_run: Run, tmp_path: Path):
    """A document in each row, and no window cuts one: `val_bits_per_byte` is that of the evaluation."""
    texts = tmp_path / "texts"
    texts.mkdir()
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "ran", "to", "see", "what", "made", "such", "noise"]
    for i in range(12):
        (texts / f"{i}.txt").write_text(" ".join(words[i % 5 : i % 5 + 5 + i % 3]))
    keys = {"data.path": (str(texts),), "data.packing": "best_fit", "data.cache_dir": str(tmp_path / "cache")}
    keys |= {"num_steps": 1, "logging.sample_prompts": (), "data.validation_fraction": 0.4, "compute.preflight": False}
    run = llama_jax.train(llama_jax.override(finished_run.config, keys), tmp_path / "run", quiet=True)
    found = evaluate(run, window=32, quiet=True).results["held-out"]
    last = run.metrics()[-1]
    assert found["bits_per_byte"] == pytest.approx(last["val_bits_per_byte"], rel=1e-5)
    assert found["loss"] == pytest.approx(last["val_loss"], rel=1e-5)


def test_a_tokenizer_that_loses_text_has_no_bits_per_byte(lm: LanguageModel, tmp_path: Path):
    (tmp_path / "a.txt").write_text("the cat\r\nsat 漢字")
    scores = evaluate(lm, texts=str(tmp_path / "a.txt"), quiet=True)
    lossless = lm.tokenizer is not None and lm.tokenizer.decode(lm.tokenizer.encode("漢字\r\n")) == "漢字\r\n"
    assert ("bits_per_byte" in scores.results["a.txt"]) == lossless
    assert bool(scores.details["remarks"]) != lossless


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"texts": "absent.txt"}, "absent.txt"),
        ({"texts": __file__, "window": 65}, "window=65 must be from 1 to the model's 64 positions"),
        ({"texts": __file__, "window": 8, "stride": 9}, "stride=9 must be from 1 to window=8"),
        ({"texts": __file__, "batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"texts": __file__, "limit": 0}, "limit=0 must be at least 1"),
        ({}, "nothing to evaluate on"),
        ({"source": __file__}, "--source and --reference belong together"),
        ({"source": __file__, "reference": __file__}, "BLEU needs an encoder-decoder"),
        ({"tasks": "x", "task_files": "absent"}, "task_files=absent is not a directory"),
    ],
)
def test_mistakes(lm: LanguageModel, options: dict[str, str], sentence: str):
    with pytest.raises(UserError, match=sentence):
        evaluate(lm, quiet=True, **options)
