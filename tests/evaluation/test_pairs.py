"""Classes against scikit-learn, BLEU against sacrebleu."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import sklearn.metrics
from hypothesis import given, settings, strategies as st

import llama_jax
from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError
from llama_jax.data import Classification
from llama_jax.evaluation import evaluate
from llama_jax.evaluation.pairs import class_metrics, evaluate_classes
from llama_jax.models import Compute, build
from llama_jax.tokenizers import train_tokenizer

GOLDENS = Path(__file__).parent.parent / "directories" / "goldens"
TEXTS = ["the cat sat", "a red barn", "what noise", "the old river ran by", "see", "the cat sat on a mat"]


@settings(max_examples=40)
@pytest.mark.filterwarnings("ignore:A single label was found")
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=30))
def test_metrics_of_classes_are_scikit_learns(pairs: list[tuple[int, int]]):
    true, predicted = np.array(pairs).T
    found = class_metrics(true, predicted)
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(true, predicted))
    assert found["f1_macro"] == pytest.approx(sklearn.metrics.f1_score(true, predicted, average="macro"))
    assert found["mcc"] == pytest.approx(sklearn.metrics.matthews_corrcoef(true, predicted), abs=1e-9)
    assert found["accuracy_stderr"] == pytest.approx((true == predicted).std(ddof=1) / len(true) ** 0.5)


@pytest.fixture(scope="module")
def classifier() -> LanguageModel:
    """A BERT with three classes and its tokenizer."""
    tokenizer = train_tokenizer(TEXTS, kind="wordpiece", vocab_size=50)
    sizes = {"num_classes": 3, "hidden_size": 32, "num_layers": 1, "max_positions": 32, "positions.num_positions": 32}
    sizes |= {"attention.num_heads": 2, "attention.num_kv_heads": 2, "attention.head_dim": 16}
    sizes |= {"vocab_size": tokenizer.vocab_size, "feed_forward.intermediate_size": 48}
    config = llama_jax.override(llama_jax.presets()["bert_base"], sizes)
    return LanguageModel(config, build(config, seed=3, compute=Compute(dtype="float32")), tokenizer)


@pytest.mark.slow
def test_texts_are_read_alone_and_without_padding(classifier: LanguageModel):
    """Each is classified as by a call on its ids between [CLS] and [SEP], whatever else is in the batch."""
    tokenizer, labels = classifier.tokenizer, ("x", "y", "z")
    assert tokenizer is not None
    cls, sep = (tokenizer.special_tokens[name] for name in ("[CLS]", "[SEP]"))
    texts = [*TEXTS[1::2], "see"]  # of three lengths
    rows = [np.array([[cls, *tokenizer.encode(text), sep]]) for text in texts]
    predicted = [int(np.asarray(classifier.model(row)).argmax()) for row in rows]
    assert len(set(predicted)) > 1
    pairs = [(text, labels[i]) for text, i in zip(texts, predicted, strict=True)]
    options: dict[str, Any] = {"batch_size": 3, "progress": lambda done, total: None}
    found, remarks = evaluate_classes(classifier, pairs, Classification(labels), **options)
    assert found["accuracy"] == 1
    assert remarks == []
    wrong = [(text, labels[(i + 1) % 3]) for text, i in zip(texts, predicted, strict=True)]
    assert evaluate_classes(classifier, wrong, Classification(labels), **options)[0]["accuracy"] == 0
    _, remarks = evaluate_classes(classifier, [("cat " * 100, "x")], Classification(labels), **options)
    assert remarks == ["1 texts were cut to the model's 32 positions"]


def test_numbers_are_labels_without_a_run(classifier: LanguageModel, tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"text": text, "label": i % 3}) + "\n" for i, text in enumerate(TEXTS)))
    found = evaluate(classifier, pairs=str(file), fields=("text", "label"), quiet=True).results
    assert found["pairs.jsonl"]["n"] == len(TEXTS)
    assert found["pairs.jsonl"].keys() == {"accuracy", "accuracy_stderr", "f1_macro", "mcc", "n"}
    pairs, objective = [("cat", "2")], Classification(("x", "y"))
    with pytest.raises(UserError, match="the label '2' is none of the model's, x, y"):
        evaluate_classes(classifier, pairs, objective, batch_size=1, progress=lambda done, total: None)


@pytest.mark.slow
def test_bleu_is_sacrebleus(tmp_path: Path):
    lm = llama_jax.load(GOLDENS / "marian", dtype="float32")
    sources = ["the river sees a house", "Anna's letter", "slept."]
    texts = llama_jax.generate_text(lm, sources, temperature=0.0, max_new_tokens=min(256, lm.config.length_limit - 1))
    references = [texts[0], "another one altogether", texts[2] + " and more"]
    for name, lines in (("a.en", sources), ("a.de", references)):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    scores = evaluate(lm, source=str(tmp_path / "a.en"), reference=str(tmp_path / "a.de"), batch_size=4, quiet=True)
    assert scores.results["a.de"]["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, [references]).score)
    assert scores.results["a.de"]["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, [references]).score)
    assert [entry["text"] for entry in scores.details["translations"]] == texts
    assert any("tok:13a" in remark for remark in scores.details["remarks"])
    (tmp_path / "a.de").write_text("河边的房子\n安娜的信\n睡了\n")
    scores = evaluate(lm, source=str(tmp_path / "a.en"), reference=str(tmp_path / "a.de"), batch_size=4, quiet=True)
    assert any("tok:zh" in remark for remark in scores.details["remarks"])
    (tmp_path / "a.de").write_text("one line\n")
    with pytest.raises(UserError, match="has 3 lines and"):
        evaluate(lm, source=str(tmp_path / "a.en"), reference=str(tmp_path / "a.de"), quiet=True)
