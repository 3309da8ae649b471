"""Evaluation on pairs: texts with their classes, sources with their translations."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError
from llama_jax.data import Classification, DataConfig, Vocabulary, read_texts
from llama_jax.evaluation.scoring import padded_length
from llama_jax.models import check_ids
from llama_jax.parallel import replicate
from llama_jax.remote import local_copy
from llama_jax.sampling import SamplingConfig, complete, tokenizer_of

MAX_NEW_TOKENS = 256  # of a translation

type Pairs = Sequence[tuple[str, str]]
type Progress = Callable[[int, int], object]


def read_pairs(config: DataConfig, split: Any, limit: int | None) -> list[tuple[str, str]]:
    """Return the documents of two parts of a split. Raises UserError for other documents, and where there are none."""
    pairs: list[tuple[str, str]] = []
    for _, own in config.corpora():
        if len(own.fields) != 2:
            raise UserError(f"pairs need two fields, and fields={','.join(own.fields)} are {len(own.fields)}")
        texts = read_texts(own, split)
        pairs += itertools.islice(zip(texts, texts, strict=True), limit)
    if not pairs:
        raise UserError("there are no pairs to evaluate on: give a file with some")
    return pairs[:limit]


def aligned(source: str, reference: str, limit: int | None) -> list[tuple[str, str]]:
    """Return the lines of two files as pairs. Raises UserError where their numbers differ."""
    lines = []
    for path in (source, reference):
        try:
            lines.append(local_copy(path).read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"'{path}' cannot be read as text ({error}): give a file of lines") from None
    if len(lines[0]) != len(lines[1]) or not lines[0]:
        raise UserError(
            f"'{source}' has {len(lines[0])} lines and '{reference}' {len(lines[1])}: line n of one belongs to line n "
            "of the other"
        )
    return list(zip(*lines, strict=True))[:limit]


def evaluate_classes(
    lm: LanguageModel, pairs: Pairs, objective: Classification | None, *, batch_size: int, progress: Progress
) -> tuple[dict[str, float], list[str]]:
    """Return accuracy, macro F1 and Matthews' correlation of a classifier on (text, label), and remarks.

    `objective` has the labels and special tokens of a run; without one labels are the numbers of the classes and the
    tokenizer's files surround a text. Raises UserError for an unknown label.
    """
    tokenizer, num_classes = tokenizer_of(lm), int(getattr(lm.config, "num_classes", 0))
    if not num_classes:
        raise UserError(f"{type(lm.config).__name__} has no classifier: give a model with num_classes, or texts")
    labels = tuple(map(str, range(num_classes))) if objective is None else objective.labels
    if unknown := {label for _, label in pairs} - set(labels):
        raise UserError(f"the label '{min(unknown)}' is none of the model's, {', '.join(labels)}: check the file")
    around: tuple[Sequence[int], Sequence[int]] = tokenizer.prefix_ids, tokenizer.suffix_ids
    if objective is not None:
        vocabulary = Vocabulary.of(tokenizer, ())
        around = [vocabulary.id(objective.cls_token)], [vocabulary.id(objective.sep_token)]
    limit = lm.config.length_limit
    room, texts = limit - len(around[0]) - len(around[1]), [text for text, _ in pairs]
    encoded = tokenizer.encode_batch(texts)
    rows = [[*around[0], *ids[:room].tolist(), *around[1]] for ids in encoded]
    cut = sum(len(ids) > room for ids in encoded)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    predicted = np.zeros(len(rows), np.int64)
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        tokens = np.zeros((batch_size, padded_length(max(len(rows[i]) for i in numbers), limit)), np.int32)
        mask = np.zeros_like(tokens)
        mask[:, 0] = 1
        for place, i in enumerate(numbers):
            tokens[place, : len(rows[i])], mask[place, : len(rows[i])] = rows[i], 1
        check_ids(lm.config.vocab_size, tokens)
        predicted[numbers] = np.asarray(lm.model.run(_classes, tokens, mask))[: len(numbers)]
        progress(first + len(numbers), len(order))
    true = np.array([labels.index(label) for _, label in pairs])
    remarks = [f"{cut} texts were cut to the model's {limit} positions"] if cut else []
    return class_metrics(true, predicted), remarks


def _classes(module: Any, tokens: Int[Array, "b t"], mask: Int[Array, "b t"]) -> Int[Array, " b"]:
    return replicate(jnp.argmax(module.class_logits(tokens, mask=mask), axis=-1))


def class_metrics(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Return accuracy with its standard error, the unweighted mean of the classes' F1, and Matthews' correlation.

    The latter for any number of classes (Gorodkin 2004); 0 where all are of one class.
    """
    classes = np.unique(np.concatenate([true, predicted]))
    table = (true[:, None] == classes)[:, :, None] & (predicted[:, None] == classes)[:, None, :]
    counts = table.sum(0, dtype=np.float64)  # [true, predicted]
    right, of_true, of_predicted, n = counts.diagonal(), counts.sum(1), counts.sum(0), counts.sum()
    accuracy = float(right.sum() / n)
    spread = (n**2 - (of_predicted**2).sum()) * (n**2 - (of_true**2).sum())
    covariance = right.sum() * n - of_true @ of_predicted
    return {
        "accuracy": accuracy,
        "accuracy_stderr": math.sqrt(accuracy * (1 - accuracy) / max(n - 1, 1)),
        "f1_macro": float((2 * right / (of_true + of_predicted)).mean()),
        "mcc": float(covariance / math.sqrt(spread)) if spread else 0.0,
        "n": int(n),
    }


def evaluate_translations(
    lm: LanguageModel, pairs: Pairs, *, batch_size: int, progress: Progress
) -> tuple[dict[str, float], list[str], list[dict[str, str]]]:
    """Return BLEU and chrF of greedy translations of (source, reference), remarks with signatures, and the texts.

    Texts that are mostly Chinese are cut into characters by sacrebleu's `zh`, others by `13a`. Raises UserError for a
    model that is not an encoder-decoder.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    if not lm.config.has_source:
        raise UserError(f"{type(lm.config).__name__} has no encoder for a source: BLEU needs an encoder-decoder")
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]), reverse=True)
    written, limit = [""] * len(pairs), min(MAX_NEW_TOKENS, lm.config.length_limit - 1)
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        found = complete(lm, [pairs[i][0] for i in numbers], SamplingConfig(limit, 0.0))
        for i, completion in zip(numbers, found, strict=True):
            written[i] = completion.completion
        progress(first + len(numbers), len(order))
    references = [reference for _, reference in pairs]
    letters = [c for text in references for c in text if not c.isspace()]
    chinese = sum("\u4e00" <= c <= "\u9fff" for c in letters) > len(letters) / 2
    metrics = {"bleu": BLEU(tokenize="zh" if chinese else "13a"), "chrf": CHRF()}
    scores = {name: float(metric.corpus_score(written, [references]).score) for name, metric in metrics.items()}
    remarks = [f"{name}: {metric.get_signature()}, greedy, at most {limit} tokens" for name, metric in metrics.items()]
    texts = [
        {"source": source, "reference": reference, "text": text}
        for (source, reference), text in zip(pairs, written, strict=True)
    ]
    return {**scores, "n": len(pairs)}, remarks, texts
