"""Perplexity and bits per byte of texts, by a sliding window."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from llama_jax.checkpoint import LanguageModel, load
from llama_jax.config import UserError
from llama_jax.data import DataConfig, Record, ScoredBytes, find_files, read_pieces
from llama_jax.evaluation.scoring import Row, Scorer
from llama_jax.sampling import tokenizer_of

LONGEST_WINDOW = 2048  # where none is given
WHOLE = 1 << 60  # characters: documents are not cut

type Documents = Iterable[tuple[str, str]]
"""Pairs (place, text), the place as in "line 3 of 'file'"."""


def read_documents(paths: Sequence[str], fields: Sequence[str], limit: int | None) -> dict[str, Documents]:
    """Return the documents of every file by its shortest name that is unique; at most `limit` of a file.

    `paths` are files, directories and globs of all kinds that `prepare` reads. Raises UserError where there are none.
    """
    files = [file.path for file in find_files(DataConfig(path=tuple(paths), fields=tuple(fields)))]
    names = [path.rpartition("/")[2] for path in files]
    names = names if len(set(names)) == len(names) else files
    return {name: itertools.islice(_documents(path, fields), limit) for name, path in zip(names, files, strict=True)}


def _documents(path: str, fields: Sequence[str]) -> Iterator[tuple[str, str]]:
    skipped: list[str] = []
    pieces = read_pieces([path], fields=fields, piece_chars=WHOLE, skipped=skipped)
    for key, parts in itertools.groupby(pieces, key=lambda piece: piece[0]):
        place = key[0] if isinstance(key, tuple) else key
        yield str(place), "".join(text for _, text in parts)
    if skipped:
        raise UserError(f"{skipped[0]}: leave it out")


def windows(ids: Sequence[int], window: int, stride: int) -> Iterator[tuple[Row, int]]:
    """Yield rows of at most `window` inputs, and how many of the last predictions of each count.

    Every id but the first is predicted once, with all ids before it or at least `window - stride` of them.
    """
    done = 0
    while done < len(ids) - 1:
        end = min(done + (stride if done else window), len(ids) - 1)
        yield (ids[max(0, end - window) : end], [ids[end]]), end - done
        done = end


def evaluate_texts(
    scorer: Scorer, texts: Mapping[str, Documents], *, window: int | None, stride: int | None, ends: bool = False
) -> tuple[dict[str, dict[str, float]], dict[str, int], list[str]]:
    """Return numbers by text and name, the window's settings, and remarks.

    Numbers are `bits_per_byte` (left out, with a remark, where the tokens are not all of the text), `perplexity` per
    token, `loss` in nats per token, `tokens`, `bytes` and `documents`; those of "total" are of all texts together.
    Documents begin with the tokenizer's start ids; without any, the first token and its bytes are not scored. With
    `ends` the EOS after a document is scored too, as a run's validation does. `window` None is the model's positions,
    at most 2048; `stride` None is half of the window.
    """
    limit = scorer.lm.config.length_limit
    window = min(limit, LONGEST_WINDOW) if window is None else window
    if not 1 <= window <= limit:
        raise UserError(f"window={window} must be from 1 to the model's {limit} positions")
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise UserError(f"stride={stride} must be from 1 to window={window}")
    tokenizer, found, remarks = tokenizer_of(scorer.lm), dict[str, dict[str, float]](), list[str]()
    for name, documents in texts.items():
        rows, counts = list[Row](), list[int]()
        size, num_documents = ScoredBytes(tokenizer), 0
        for place, text in documents:
            ids = tokenizer.encode_batch([text])[0]
            size.add(Record((text,), place), [ids])
            num_documents += 1
            whole = [*tokenizer.start_ids, *ids.tolist(), *(tokenizer.eos_ids[:1] if ends else ())]
            for row, count in windows(whole, window, stride):
                rows.append(row)
                counts.append(count)
        if not rows:
            raise UserError(f"'{name}' has nothing to score: give text of two tokens or more")
        nats = -sum(
            float(logprobs[-count:, 0].sum(dtype=np.float64))
            for (logprobs, _), count in zip(scorer.score(rows), counts, strict=True)
        )
        numbers = {"nats": nats, "tokens": sum(counts), "documents": num_documents, "bytes": size.num_bytes}
        if size.reason:
            del numbers["bytes"]
            remarks.append(f"{name}: no bits per byte, for {size.reason}")
        found[name] = numbers
    if len(found) > 1:
        keys = set.intersection(*(set(numbers) for numbers in found.values()))
        found["total"] = {key: sum(numbers[key] for numbers in found.values()) for key in keys}
    return {name: _rates(**numbers) for name, numbers in found.items()}, {"window": window, "stride": stride}, remarks


def _rates(nats: float, tokens: float, documents: float, bytes: float | None = None) -> dict[str, float]:
    per_byte = {} if not bytes else {"bits_per_byte": nats / math.log(2) / bytes}
    size = {} if bytes is None else {"bytes": bytes}
    loss = nats / tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return per_byte | {"perplexity": perplexity, "loss": loss, "tokens": tokens, **size, "documents": documents}


def quantization_cost(model: LanguageModel | str | Path, text: str, *, quantize: str = "int8") -> tuple[float, float]:
    """Return the perplexity of a text before and after its model is quantized.

    `model` is a language model in full precision, or a path, which is loaded; `quantize` is a format of `load`.
    """
    lm = model if isinstance(model, LanguageModel) else load(model)
    after = dataclasses.replace(lm, model=lm.model.quantized(quantize))

    def perplexity(lm: LanguageModel) -> float:
        numbers, _, _ = evaluate_texts(Scorer(lm), {"text": [("text", text)]}, window=None, stride=None)
        return numbers["text"]["perplexity"]

    return perplexity(lm), perplexity(after)
