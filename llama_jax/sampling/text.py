"""`generate_text`, `stream_text`: prompts as texts, and the texts that a model writes."""

import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Literal, Unpack, overload

from llama_jax.checkpoint import LanguageModel, default_stops
from llama_jax.config import UserError
from llama_jax.models import ModelConfig
from llama_jax.sampling.batch import Request
from llama_jax.sampling.config import GenerationOptions, SamplingConfig, SamplingOptions
from llama_jax.sampling.engine import Engine, TokenLogprobs
from llama_jax.sampling.speculative import Speculation
from llama_jax.sampling.stops import TextStream, tokenizer_of
from llama_jax.sampling.token_ids import Answer, answers, settled
from llama_jax.tokenizers import Tokenizer

# Tokens that the device makes between two pieces of a stream: few enough to flow, many enough to hide the transfer.
STREAM_CHUNK = 4


@dataclasses.dataclass(frozen=True)
class Completion:
    """Text that a model wrote after `prompt`, or as the answer to it.

    `token_ids` include the one that ended it; `logprobs`, where they were asked for, has an entry for each. `score` is
    that of a beam search: the sum of the log-probabilities over a power of their number, as transformers'
    `sequences_scores`.
    """

    prompt: str
    completion: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    logprobs: list[TokenLogprobs] | None = None
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The ids of a prompt, and those that end the text after it."""

    ids: list[int]
    stop_ids: tuple[int, ...]

    def request(self, config: SamplingConfig, row: int = 0) -> Request:
        """Return the request to continue it as prompt number `row`."""
        return Request(tuple(self.ids), config, () if config.ignore_eos else self.stop_ids, row)


@overload
def generate_text(
    lm: LanguageModel, prompts: str, *, stream: Literal[True], **options: Unpack[GenerationOptions]
) -> Iterator[str]: ...
@overload
def generate_text(
    lm: LanguageModel,
    prompts: str | Sequence[str],
    *,
    stream: Literal[False] = False,
    **options: Unpack[GenerationOptions],
) -> list[Any]: ...
def generate_text(
    lm: LanguageModel, prompts: str | Sequence[str], *, stream: bool = False, **options: Unpack[GenerationOptions]
) -> list[Any] | Iterator[str]:
    """Return the texts that the model writes after `prompts` (without them), each up to an end-of-text token.

    A single text in place of the list is one prompt, and the result a list of one; with `stream` the result is an
    iterator over the pieces of its text, as they come. With `num_samples` above 1 there is a list of texts for each
    prompt.

    The model's files decide which tokens end a text, surround a prompt, are forced or forbidden. To an encoder-decoder
    the prompts are sources, and the texts its answers. Special tokens written out in them, such as T5's <extra_id_0>,
    are these tokens, in answers too. `options` are the fields of `SamplingConfig`; `draft` and `draft_tokens` are those
    of `generate`.

    Raises UserError as `generate` does, for `prompts` that are not texts and for a model without tokenizer.
    """
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, Sequence) or not all(isinstance(prompt, str) for prompt in texts):
        raise UserError(f"prompts={prompts!r} must be a text or a list of texts; token ids are for generate")
    config, speculation = settled(lm, options)
    if stream:
        if len(texts) != 1:
            raise UserError(f"stream=True writes one text, and there are {len(texts)} prompts: give one")
        return stream_encoded(lm, encoded_prompt(lm, texts[0]), config, speculation=speculation)
    encoded = [encoded_prompt(lm, prompt) for prompt in texts]
    groups = completed(lm, texts, encoded, [config] * len(texts), speculation=speculation)
    samples = [[found.completion for found in group] for group in groups]
    return samples if config.num_samples > 1 else [text for group in samples for text in group]


def complete(lm: LanguageModel, prompts: Sequence[str], config: SamplingConfig) -> list[Completion]:
    """Return the texts of `generate_text` with their token ids and the reason of each end; all samples in one list."""
    encoded = [encoded_prompt(lm, prompt) for prompt in prompts]
    return [found for group in completed(lm, prompts, encoded, [config] * len(prompts)) for found in group]


def completed(
    lm: LanguageModel,
    prompts: Sequence[str],
    encoded: Sequence[Encoded],
    configs: Sequence[SamplingConfig],
    *,
    speculation: Speculation | None = None,
) -> Iterator[list[Completion]]:
    """Yield the samples of each prompt, in the order of the prompts, as soon as they are complete.

    Sample j of prompt i draws as prompt number `i * num_samples + j`. Raises UserError where a prompt cannot be
    continued.
    """
    streams, requests = list[list[TextStream]](), list[Request]()
    for row, (own, config) in enumerate(zip(encoded, configs, strict=True)):
        streams.append([TextStream(lm, own.ids, config.stop) for _ in range(config.num_samples)])
        requests.append(own.request(config, row * config.num_samples))

    def stopped(i: int, sample: int, token_ids: list[int]) -> bool:
        stream = streams[i][sample]
        stream.feed(token_ids[stream.num_tokens :])
        return stream.stopped

    enough = stopped if any(config.stop for config in configs) else None
    found = answers(lm, requests, enough=enough, speculation=speculation)
    for prompt, texts, samples in zip(prompts, streams, found, strict=True):
        yield [_completion(prompt, stream, answer) for stream, answer in zip(texts, samples, strict=True)]


def _completion(prompt: str, stream: TextStream, answer: Answer) -> Completion:
    """Return the text, and its tokens up to the one that ended it."""
    stream.feed(answer.token_ids[stream.num_tokens :])
    stream.flush()
    count, reason = stream.num_tokens, "length" if answer.finish_reason == "length" and not stream.stopped else "stop"
    logprobs = None if answer.logprobs is None else answer.logprobs[:count]
    return Completion(prompt, stream.text, answer.token_ids[:count], reason, logprobs, answer.score)


def stream_text(
    lm: LanguageModel,
    prompt: str,
    *,
    row: int = 0,
    **options: Unpack[SamplingOptions],
) -> Iterator[str]:
    """Yield the text that `generate_text` writes for the prompt number `row`, piece by piece as it comes."""
    yield from stream_encoded(lm, encoded_prompt(lm, prompt), SamplingConfig.of(**options), row=row)


def stream_encoded(
    lm: LanguageModel,
    encoded: Encoded,
    config: SamplingConfig,
    *,
    row: int = 0,
    progress: Callable[[int], object] = lambda num_tokens: None,
    engine: Engine | None = None,
    speculation: Speculation | None = None,
) -> Generator[str]:
    """Return the pieces of the text of `stream_text` for a prompt that is encoded already.

    `progress` is called with the number of new tokens so far, every few tokens. An idle `engine` of the model may be
    given, which knows the beginning of a conversation. Raises UserError for several samples, and as `completed` does.
    """
    for name in ("num_samples", "num_beams"):
        if getattr(config, name) > 1:
            raise UserError(f"{name}={getattr(config, name)} writes several texts, which cannot stream: give 1")
    engine = engine or Engine(lm, rows=1, decode_chunk=STREAM_CHUNK, speculation=speculation)
    stream, ticket = TextStream(lm, encoded.ids, config.stop), engine.add(encoded.request(config, row))

    def pieces() -> Generator[str]:
        try:
            for piece in engine.run():
                text = stream.feed(piece.token_ids)
                progress(stream.num_tokens)
                if text:
                    yield text
                if stream.stopped:
                    break
            if text := stream.flush():
                yield text
        finally:  # also where the reader has left
            engine.cancel(ticket)

    return pieces()


def with_room(lm: LanguageModel, encoded: Encoded, config: SamplingConfig, wanted: int) -> SamplingConfig:
    """Return the config with `wanted` new tokens, or as many as there is room for after a prompt; at least one."""
    room = lm.config.length_limit - (1 if lm.config.has_source else len(encoded.ids))
    return dataclasses.replace(config, max_new_tokens=max(1, min(wanted, room)))


def encoded_prompt(lm: LanguageModel, prompt: str) -> Encoded:
    """Return a prompt's ids and stops. Raises UserError for a model without tokenizer and for an empty prompt."""
    tokenizer = tokenizer_of(lm)
    return Encoded(encode_prompt(lm.config, tokenizer, prompt), stop_ids(lm))


def encode_prompt(config: ModelConfig, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids that a model continues or answers to, with those that the tokenizer's files put around them.

    Raises UserError for an empty prompt without any of these.
    """
    ids = tokenizer.encode_prompt(prompt, special=config.has_source)
    if not ids:
        raise UserError("an empty prompt needs a tokenizer with a BOS token to start from: give some text")
    return ids


def stop_ids(lm: LanguageModel) -> tuple[int, ...]:
    """Return the ids that end a text: those of the model's files, else EOS and the start of another document."""
    return lm.generation.eos_ids or default_stops(lm.config, tokenizer_of(lm))
