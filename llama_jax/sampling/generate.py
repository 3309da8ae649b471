"""Continuing token ids and texts."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from llama_jax.checkpoint.language_model import LanguageModel
from llama_jax.config import UserError
from llama_jax.models import Model
from llama_jax.sampling.loop import Rows, advance, start
from llama_jax.sampling.processors import Sampler
from llama_jax.tokenizers import Tokenizer

# Tokens that streaming lets the device make before it looks: few enough to flow, many enough to hide the look.
STREAM_CHUNK = 4


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model wrote after `prompt`: its text and token ids (the one it stopped at included)."""

    prompt: str
    completion: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]


def generate(
    lm: LanguageModel | Model,
    tokens: Any,
    *,
    max_new_tokens: int = 16,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    prompt_lengths: Any = None,
    eos_id: int | None = None,
) -> np.ndarray:
    """Token ids continued: int32 [B, T] to int32 [B, T + max_new_tokens], prompts included.

    Rows shorter than T are right-padded, with `prompt_lengths` [B] saying where each ends (what stands behind is never
    read). A row's new tokens follow its own prompt directly: row b is `tokens[b, :prompt_lengths[b]]`, the new tokens,
    then `eos_id` (0 without one) to the end. A row stops early only at `eos_id`, which is kept. Temperature 0 is
    greedy; otherwise a token is a function of the row's text, `seed`, the row's number and the position, whatever else
    is in the batch. Raises UserError for what cannot be continued and for impossible settings.
    """
    model = lm if isinstance(lm, Model) else lm.model
    tokens, lengths = _checked_prompts(model, tokens, prompt_lengths)
    sampler = Sampler.of(temperature, top_k, top_p)
    longest = int(lengths.max())
    stop_ids = () if eos_id is None else (eos_id,)
    *_, rows = _continue(
        model, tokens[:, :longest], lengths, max_new_tokens, sampler=sampler, seed=seed, stop_ids=stop_ids
    )
    out = np.zeros((len(tokens), tokens.shape[1] + max_new_tokens), np.int32)
    width = longest + max_new_tokens
    out[:, :width] = rows.tokens[:, :width]
    out[np.arange(out.shape[1]) >= np.asarray(rows.lengths)[:, None]] = 0 if eos_id is None else eos_id
    return out


def generate_text(
    lm: LanguageModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[str]:
    """The texts that the model writes after `prompts` (without them), each up to an end-of-text token.

    Raises UserError as `generate` does, and for a model without tokenizer.
    """
    sampler = Sampler.of(temperature, top_k, top_p)
    found = complete(lm, prompts, max_new_tokens=max_new_tokens, sampler=sampler, seed=seed)
    return [completion.completion for completion in found]


def complete(
    lm: LanguageModel, prompts: Sequence[str], *, max_new_tokens: int, sampler: Sampler, seed: int
) -> list[Completion]:
    """`generate_text` with token ids and the reason of each end."""
    if not prompts:
        return []
    tokenizer = _tokenizer(lm)
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    lengths = np.array([len(ids) for ids in encoded])
    tokens = np.zeros((len(encoded), lengths.max()), np.int32)
    for row, ids in zip(tokens, encoded, strict=True):
        row[: len(ids)] = ids
    tokens, lengths = _checked_prompts(lm.model, tokens, lengths)
    stop_ids = _stop_ids(tokenizer)
    *_, rows = _continue(lm.model, tokens, lengths, max_new_tokens, sampler=sampler, seed=seed, stop_ids=stop_ids)
    completions = []
    for i, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        new = np.asarray(rows.tokens[i, len(ids) : rows.lengths[i]]).tolist()
        stream = _Continuation(tokenizer, ids)
        text = stream.feed(new) + stream.flush()
        completions.append(Completion(prompt, text, new, "stop" if rows.done[i] else "length"))
    return completions


def stream_text(
    lm: LanguageModel,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    row: int = 0,
) -> Iterator[str]:
    """What `generate_text` writes for the prompt number `row`, piece by piece as it comes."""
    sampler = Sampler.of(temperature, top_k, top_p)
    tokenizer = _tokenizer(lm)
    ids = _encode(tokenizer, prompt)
    tokens, lengths = _checked_prompts(lm.model, [ids], None)
    stream, stop_ids, seen = _Continuation(tokenizer, ids), _stop_ids(tokenizer), len(ids)
    for rows in _continue(
        lm.model,
        tokens,
        lengths,
        max_new_tokens,
        sampler=sampler,
        seed=seed,
        stop_ids=stop_ids,
        first_row=row,
        chunk=STREAM_CHUNK,
    ):
        if text := stream.feed(rows.tokens[0, seen : rows.lengths[0]].tolist()):
            yield text
        seen = int(rows.lengths[0])
    if text := stream.flush():
        yield text


def _continue(
    model: Model,
    tokens: np.ndarray,
    lengths: np.ndarray,
    max_new_tokens: int,
    *,
    sampler: Sampler,
    seed: int,
    stop_ids: tuple[int, ...],
    first_row: int = 0,
    chunk: int | None = None,
) -> Iterator[Rows]:
    """The rows as numpy after the first new token, then after every `chunk` (default: all) of them."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    longest, limit = tokens.shape[1], model.config.max_positions
    if longest + max_new_tokens > limit:
        advice = f"take at most {limit - longest}" if longest < limit else "shorten the prompt"
        raise UserError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} are more than the model's "
            f"{limit} positions: {advice}"
        )
    left = max_new_tokens - 1
    state, rows = start(
        model,
        tokens,
        lengths,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        seed=seed,
        stop_ids=stop_ids,
        first_row=first_row,
    )
    if chunk is None and left:  # nobody looks before the end
        state, rows = advance(model, state, left, sampler=sampler, stop_ids=stop_ids)
        left = 0
    yield (rows := jax.device_get(rows))
    while left and not rows.done.all():
        count = min(left, chunk or left)
        state, rows = advance(model, state, count, sampler=sampler, stop_ids=stop_ids)
        left -= count
        yield (rows := jax.device_get(rows))


def _checked_prompts(model: Model, tokens: Any, lengths: Any) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as int32 [B, T], zero behind their ends, and those ends [B]. Raises UserError for impossible ones."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"tokens of shape {tokens.shape} and type {tokens.dtype} must be integers [batch, length]")
    lengths = np.full(len(tokens), tokens.shape[1]) if lengths is None else np.asarray(lengths)
    if lengths.shape != (len(tokens),):
        raise UserError(f"prompt_lengths of shape {lengths.shape} must have one number for each of {len(tokens)} rows")
    wrong = (lengths < 1) | (lengths > tokens.shape[1])
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(f"prompt_lengths[{row}]={lengths[row]} must be from 1 to the tokens' length {tokens.shape[1]}")
    tokens = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, 0)
    outside = (tokens < 0) | (tokens >= model.config.vocab_size)
    if outside.any():
        raise UserError(
            f"token id {tokens[outside][0]} is outside the model's vocabulary of {model.config.vocab_size}: use the "
            "model's own tokenizer"
        )
    return tokens.astype(np.int32), lengths.astype(np.int32)


def _tokenizer(lm: LanguageModel) -> Tokenizer:
    if lm.tokenizer is None:
        raise UserError("the model came without a tokenizer: give one with --tokenizer, or load(..., tokenizer=...)")
    return lm.tokenizer


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    ids = tokenizer.encode(prompt, bos=True)
    if not ids:
        raise UserError("an empty prompt needs a tokenizer with a BOS token to start from: give some text")
    return ids


def _stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    # A BOS opens another text; llama2.c's models write nothing else at the end of one.
    return tuple(sorted({*tokenizer.eos_ids, *tokenizer.start_ids}))


class _Continuation:
    """Text of the ids that come after a prompt's."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[int]):
        self._stream, self._known = tokenizer.stream(), tokenizer.vocab_size
        self.feed(prompt_ids)

    def feed(self, ids: Iterable[int]) -> str:
        # A vocabulary padded beyond the tokenizer's has ids that stand for nothing.
        return "".join([self._stream.feed(i) for i in ids if i < self._known])

    def flush(self) -> str:
        return self._stream.flush()
