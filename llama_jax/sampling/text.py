"""Continuing texts."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np

from llama_jax.checkpoint import LanguageModel, default_stops
from llama_jax.config import UserError
from llama_jax.models import ModelConfig
from llama_jax.sampling.sampler import Sampler
from llama_jax.sampling.token_ids import checked_prompts, continued
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


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The ids of a prompt, and those that end what is written after it."""

    ids: list[int]
    stop_ids: tuple[int, ...]


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

    Which tokens end a text, what stands before and behind a prompt, what is forced and forbidden: the model's files
    say it. To an encoder-decoder the prompts are sources, and the texts its answers. Special tokens written out in
    them, such as T5's <extra_id_0>, are these tokens, in answers too. Raises UserError as `generate` does, for
    `prompts` that are no list of texts and for a model without tokenizer.
    """
    if (
        isinstance(prompts, str)
        or not isinstance(prompts, Sequence)
        or not all(isinstance(prompt, str) for prompt in prompts)
    ):
        raise UserError("prompts must be a list of texts: put a single one into brackets, [text]")
    sampler = Sampler.of(temperature, top_k, top_p)
    found = complete(lm, prompts, max_new_tokens=max_new_tokens, sampler=sampler, seed=seed)
    return [completion.completion for completion in found]


def complete(
    lm: LanguageModel, prompts: Sequence[str], *, max_new_tokens: int, sampler: Sampler, seed: int
) -> list[Completion]:
    """`generate_text` with token ids and the reason of each end."""
    encoded = [encoded_prompt(lm, prompt) for prompt in prompts]
    return complete_encoded(lm, prompts, encoded, max_new_tokens=max_new_tokens, sampler=sampler, seed=seed)


def complete_encoded(
    lm: LanguageModel,
    prompts: Sequence[str],
    encoded: Sequence[Encoded],
    *,
    max_new_tokens: int,
    sampler: Sampler,
    seed: int,
) -> list[Completion]:
    """`complete` for prompts that are encoded already; the same ids have to end all of them."""
    if not prompts:
        return []
    lengths = np.array([len(prompt.ids) for prompt in encoded])
    tokens = np.zeros((len(encoded), lengths.max()), np.int64)
    for row, prompt in zip(tokens, encoded, strict=True):
        row[: len(prompt.ids)] = prompt.ids
    checked = checked_prompts(lm.model, tokens, lengths, start_id=lm.generation.decoder_start_id)
    *_, rows = continued(
        lm.model,
        checked,
        max_new_tokens,
        sampler,
        settings=lm.generation,
        seed=seed,
        stop_ids=encoded[0].stop_ids,
    )
    completions = []
    for i, (prompt, own) in enumerate(zip(prompts, encoded, strict=True)):
        new = np.asarray(rows.tokens[i, checked.lengths[i] : rows.lengths[i]]).tolist()
        stream = _text_stream(lm, own.ids)
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
    encoded = encoded_prompt(lm, prompt)
    yield from stream_encoded(lm, encoded, max_new_tokens=max_new_tokens, sampler=sampler, seed=seed, row=row)


def stream_encoded(
    lm: LanguageModel, encoded: Encoded, *, max_new_tokens: int, sampler: Sampler, seed: int, row: int = 0
) -> Iterator[str]:
    """`stream_text` for a prompt that is encoded already."""
    prompts = checked_prompts(lm.model, [encoded.ids], None, start_id=lm.generation.decoder_start_id)
    stream, seen = _text_stream(lm, encoded.ids), int(prompts.lengths[0])
    for rows in continued(
        lm.model,
        prompts,
        max_new_tokens,
        sampler,
        settings=lm.generation,
        seed=seed,
        stop_ids=encoded.stop_ids,
        first_row=row,
        chunk=STREAM_CHUNK,
    ):
        if text := stream.feed(rows.tokens[0, seen : rows.lengths[0]].tolist()):
            yield text
        seen = int(rows.lengths[0])
    if text := stream.flush():
        yield text


def tokenizer_of(lm: LanguageModel) -> Tokenizer:
    """The model's tokenizer. Raises UserError where it came without one."""
    if lm.tokenizer is None:
        raise UserError("the model came without a tokenizer: give one with --tokenizer, or load(..., tokenizer=...)")
    return lm.tokenizer


def encoded_prompt(lm: LanguageModel, prompt: str) -> Encoded:
    """A prompt's ids and stops. Raises UserError for a model without tokenizer and for an empty prompt."""
    return Encoded(encode_prompt(lm.config, tokenizer_of(lm), prompt), stop_ids(lm))


def encode_prompt(config: ModelConfig, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids that a model continues, or answers to, with what the tokenizer's files put around them.

    Raises UserError where there are none.
    """
    ids = tokenizer.encode_prompt(prompt, special=config.has_source)
    if not ids:
        raise UserError("an empty prompt needs a tokenizer with a BOS token to start from: give some text")
    return ids


def stop_ids(lm: LanguageModel) -> tuple[int, ...]:
    """The ids that end a text: those of the model's files, else the tokenizer's EOS and what begins a document."""
    return lm.generation.eos_ids or default_stops(lm.config, tokenizer_of(lm))


def _text_stream(lm: LanguageModel, prompt_ids: list[int]) -> "_Continuation":
    if lm.config.has_source:
        return _Answer(tokenizer_of(lm), ())
    return _Continuation(tokenizer_of(lm), prompt_ids)


class _Continuation:
    """Text of the ids that come after a prompt's."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[int]):
        self._tokenizer, self._stream, self._known = tokenizer, tokenizer.stream(), tokenizer.vocab_size
        prompt = [i for i in prompt_ids if i < self._known]
        self._held = 0
        seen = self.feed(prompt)
        # Characters of the prompt that the stream holds back, because more bytes may follow, come with what follows.
        self._held = len(tokenizer.decode(prompt)) - len(seen)

    def feed(self, ids: Iterable[int]) -> str:
        # A vocabulary padded beyond the tokenizer's has ids that stand for nothing.
        return self._new("".join([self._text(i) for i in ids if i < self._known]))

    def flush(self) -> str:
        return self._new(self._stream.flush())

    def _new(self, text: str) -> str:
        held, self._held = self._held, max(0, self._held - len(text))
        return text[held:]

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
