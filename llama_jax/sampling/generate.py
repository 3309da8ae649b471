"""Continuing token ids and texts."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from llama_jax.checkpoint.language_model import LanguageModel
from llama_jax.config import UserError
from llama_jax.models import EncoderDecoderConfig, Model, ModelConfig
from llama_jax.sampling.loop import Rows, advance, start
from llama_jax.sampling.processors import Sampler
from llama_jax.tokenizers import Tokenizer

# Tokens that streaming lets the device make before it looks: few enough to flow, many enough to hide the look.
STREAM_CHUNK = 4


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model wrote after `prompt`, or as the answer to it: text and token ids (that it stopped at included)."""

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
    source_mask: Any = None,
    eos_id: int | None = None,
) -> np.ndarray:
    """Token ids continued: int32 [B, T] to int32 [B, T + max_new_tokens], prompts included.

    Rows shorter than T are right-padded, with `prompt_lengths` [B] saying where each ends (what stands behind is never
    read). A row's new tokens follow its own prompt directly: row b is `tokens[b, :prompt_lengths[b]]`, the new tokens,
    then `eos_id` (0 without one) to the end. A row stops early only at `eos_id`, which is kept. Temperature 0 is
    greedy; otherwise a token is a function of the row's text, `seed`, the row's number and the position, whatever else
    is in the batch.

    An encoder-decoder reads `tokens` as the source, [B, S], and writes a target: int32 [B, 1 + max_new_tokens] that
    begins with its start token. `source_mask` [B, S] is then another way to say what of the source is padding: false
    (0) where it is, at any place.

    Raises UserError for what cannot be continued and for impossible settings.
    """
    model = lm if isinstance(lm, Model) else lm.model
    prompts = _checked_prompts(model, tokens, prompt_lengths, source_mask)
    sampler = Sampler.of(temperature, top_k, top_p)
    longest = int(prompts.lengths.max())
    stop_ids = () if eos_id is None else (eos_id,)
    *_, rows = _continue(model, prompts, max_new_tokens, sampler=sampler, seed=seed, stop_ids=stop_ids)
    out = np.zeros((len(prompts.tokens), prompts.width + max_new_tokens), np.int32)
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

    To an encoder-decoder the prompts are sources, and the texts its answers. Special tokens written out in them, such
    as T5's <extra_id_0>, are these tokens, in answers too. Raises UserError as `generate` does, and for a model without
    tokenizer.
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
    encoded = [encode_prompt(lm.config, tokenizer, prompt) for prompt in prompts]
    lengths = np.array([len(ids) for ids in encoded])
    tokens = np.zeros((len(encoded), lengths.max()), np.int32)
    for row, ids in zip(tokens, encoded, strict=True):
        row[: len(ids)] = ids
    checked, stop_ids = _checked_prompts(lm.model, tokens, lengths), _stop_ids(lm.config, tokenizer)
    *_, rows = _continue(lm.model, checked, max_new_tokens, sampler=sampler, seed=seed, stop_ids=stop_ids)
    completions = []
    for i, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        new = np.asarray(rows.tokens[i, checked.lengths[i] : rows.lengths[i]]).tolist()
        stream = _text_stream(lm.config, tokenizer, ids)
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
    ids = encode_prompt(lm.config, tokenizer, prompt)
    prompts = _checked_prompts(lm.model, [ids], None)
    stream, seen = _text_stream(lm.config, tokenizer, ids), int(prompts.lengths[0])
    for rows in _continue(
        lm.model,
        prompts,
        max_new_tokens,
        sampler=sampler,
        seed=seed,
        stop_ids=_stop_ids(lm.config, tokenizer),
        first_row=row,
        chunk=STREAM_CHUNK,
    ):
        if text := stream.feed(rows.tokens[0, seen : rows.lengths[0]].tolist()):
            yield text
        seen = int(rows.lengths[0])
    if text := stream.flush():
        yield text


@dataclasses.dataclass(frozen=True)
class _Prompts:
    """What is continued, int32 [B, T] up to `lengths` [B]; what was given may be wider. An encoder-decoder continues
    its start token, and has a source: int32 [B, S], and bool [B, S] that is false at padding."""

    tokens: np.ndarray
    lengths: np.ndarray
    width: int
    source: tuple[np.ndarray, np.ndarray] | None = None


def _continue(
    model: Model,
    prompts: _Prompts,
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
    longest, limit = prompts.tokens.shape[1], model.config.length_limit
    if prompts.source is not None and (size := prompts.source[0].shape[1]) > limit:
        raise UserError(f"a source of {size} tokens is more than the model's {limit} positions: shorten the prompt")
    if longest + max_new_tokens > limit:
        what = "the start token" if prompts.source is not None else f"a prompt of {longest} tokens"
        advice = f"take at most {limit - longest}" if longest < limit else "shorten the prompt"
        raise UserError(
            f"{what} and max_new_tokens={max_new_tokens} are more than the model's {limit} positions: {advice}"
        )
    left = max_new_tokens - 1
    state, rows = start(
        model,
        prompts.tokens,
        prompts.lengths,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        seed=seed,
        stop_ids=stop_ids,
        first_row=first_row,
        source=prompts.source,
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


def _checked_prompts(model: Model, tokens: Any, lengths: Any, source_mask: Any = None) -> _Prompts:
    """The prompts, zero behind their ends. Raises UserError for impossible ones."""
    config = model.config
    if not config.generates:
        raise UserError(f"{type(config).__name__} continues no texts: load it and call it on tokens")
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"tokens of shape {tokens.shape} and type {tokens.dtype} must be integers [batch, length]")
    if source_mask is not None and lengths is not None:
        raise UserError("prompt_lengths and source_mask both say what is padding: give one of them")
    lengths = np.full(len(tokens), tokens.shape[1]) if lengths is None else np.asarray(lengths)
    if lengths.shape != (len(tokens),):
        raise UserError(f"prompt_lengths of shape {lengths.shape} must have one number for each of {len(tokens)} rows")
    wrong = (lengths < 1) | (lengths > tokens.shape[1])
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(f"prompt_lengths[{row}]={lengths[row]} must be from 1 to the tokens' length {tokens.shape[1]}")
    real = np.arange(tokens.shape[1]) < lengths[:, None]
    if source_mask is not None:
        real = _checked_mask(config, source_mask, tokens.shape)
    tokens = np.where(real, tokens, 0)
    outside = (tokens < 0) | (tokens >= config.vocab_size)
    if outside.any():
        raise UserError(
            f"token id {tokens[outside][0]} is outside the model's vocabulary of {config.vocab_size}: use the "
            "model's own tokenizer"
        )
    tokens, width = tokens.astype(np.int32), tokens.shape[1]
    if isinstance(config, EncoderDecoderConfig):
        used = int(real.any(0).nonzero()[0].max()) + 1
        start = np.full((len(tokens), 1), config.decoder_start_id, np.int32)
        return _Prompts(start, np.ones(len(tokens), np.int32), 1, (tokens[:, :used], real[:, :used]))
    return _Prompts(tokens[:, : lengths.max()], lengths.astype(np.int32), width)


def _checked_mask(config: ModelConfig, source_mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A mask of the source as bool. Raises UserError where it is none."""
    if not isinstance(config, EncoderDecoderConfig):
        raise UserError(f"source_mask is for encoder-decoders, and this is a {type(config).__name__}: leave it out")
    mask = np.asarray(source_mask)
    if mask.shape != shape or not np.isin(mask, (0, 1)).all():
        raise UserError(f"source_mask of shape {mask.shape} must have a 0 or 1 for each of the tokens {shape}")
    if not (seen := mask.any(1)).all():
        raise UserError(f"source_mask[{int(seen.argmin())}] leaves nothing of its source: give it a token")
    return mask.astype(bool)


def _tokenizer(lm: LanguageModel) -> Tokenizer:
    if lm.tokenizer is None:
        raise UserError("the model came without a tokenizer: give one with --tokenizer, or load(..., tokenizer=...)")
    return lm.tokenizer


def encode_prompt(config: ModelConfig, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids that a model continues, or answers to: a source ends with EOS, as those that it was trained on.

    Raises UserError where there are none.
    """
    if isinstance(config, EncoderDecoderConfig):
        names = {name: [i] for name, i in tokenizer.special_tokens.items()}
        parts = re.split("|".join(f"({re.escape(name)})" for name in names), prompt) if names else [prompt]
        ids = [i for part in parts if part for i in names.get(part) or tokenizer.encode(part)]
        ids += tokenizer.eos_ids[:1]
    else:
        ids = tokenizer.encode(prompt, bos=True)
    if not ids:
        raise UserError("an empty prompt needs a tokenizer with a BOS token to start from: give some text")
    return ids


def _stop_ids(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    stop = {*tokenizer.eos_ids}
    # What begins a text opens another one; llama2.c's models write nothing else at the end of one. BART's answers
    # begin with it.
    if not isinstance(config, EncoderDecoderConfig):
        stop |= {*tokenizer.start_ids}
    return tuple(sorted(stop))


def _text_stream(config: ModelConfig, tokenizer: Tokenizer, prompt_ids: list[int]) -> "_Continuation":
    if isinstance(config, EncoderDecoderConfig):
        return _Answer(tokenizer, ())
    return _Continuation(tokenizer, prompt_ids)


class _Continuation:
    """Text of the ids that come after a prompt's."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[int]):
        self._tokenizer, self._stream, self._known = tokenizer, tokenizer.stream(), tokenizer.vocab_size
        self.feed(prompt_ids)

    def feed(self, ids: Iterable[int]) -> str:
        # A vocabulary padded beyond the tokenizer's has ids that stand for nothing.
        return "".join([self._text(i) for i in ids if i < self._known])

    def flush(self) -> str:
        return self._stream.flush()

    def _text(self, token_id: int) -> str:
        return self._stream.feed(token_id)


class _Answer(_Continuation):
    """Text of a target's ids, sentinels and the like by name."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[int]):
        silent = {tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id, *tokenizer.eos_ids}
        self._names = {i: name for name, i in tokenizer.special_tokens.items() if i not in silent}
        super().__init__(tokenizer, prompt_ids)

    def _text(self, token_id: int) -> str:
        if token_id not in self._names:
            return super()._text(token_id)
        before, self._stream = self._stream.flush(), self._tokenizer.stream()
        return before + self._names[token_id]
