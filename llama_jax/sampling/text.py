"""`generate_text`, `stream_text`: prompts as texts, and the texts that a model writes."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Unpack

import numpy as np

from llama_jax.checkpoint import LanguageModel, default_stops
from llama_jax.config import UserError
from llama_jax.models import ModelConfig
from llama_jax.sampling.config import SamplingConfig, SamplingOptions
from llama_jax.sampling.stops import TextStream, tokenizer_of
from llama_jax.sampling.token_ids import checked_prompts, continued
from llama_jax.tokenizers import Tokenizer

# Tokens that the device makes between two pieces of a stream: few enough to flow, many enough to hide the transfer.
STREAM_CHUNK = 4


@dataclasses.dataclass(frozen=True)
class Completion:
    """Text that a model wrote after `prompt`, or as the answer to it; `token_ids` include the one that ended it."""

    prompt: str
    completion: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The ids of a prompt, and those that end the text after it."""

    ids: list[int]
    stop_ids: tuple[int, ...]


def stopped_by(config: SamplingConfig, encoded: Encoded) -> SamplingConfig:
    """Return the config with the ids that end the text of a prompt."""
    own = () if config.ignore_eos else encoded.stop_ids
    return dataclasses.replace(config, stop_ids=tuple(dict.fromkeys((*own, *config.stop_ids))))


def generate_text(
    lm: LanguageModel,
    prompts: str | Sequence[str],
    **options: Unpack[SamplingOptions],
) -> list[str]:
    """Return the texts that the model writes after `prompts` (without them), each up to an end-of-text token.

    A single text in place of the list is one prompt, and the result a list of one.

    The model's files decide which tokens end a text, surround a prompt, are forced or forbidden. To an encoder-decoder
    the prompts are sources, and the texts its answers. Special tokens written out in them, such as T5's <extra_id_0>,
    are these tokens, in answers too. `options` are the fields of `SamplingConfig`.

    Raises UserError as `generate` does, for `prompts` that are not texts and for a model without tokenizer.
    """
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, Sequence) or not all(isinstance(prompt, str) for prompt in texts):
        raise UserError(f"prompts={prompts!r} must be a text or a list of texts; token ids are for generate")
    return [found.completion for found in complete(lm, texts, SamplingConfig.of(**options))]


def complete(lm: LanguageModel, prompts: Sequence[str], config: SamplingConfig) -> list[Completion]:
    """Return the texts of `generate_text` with their token ids and the reason of each end."""
    encoded = [encoded_prompt(lm, prompt) for prompt in prompts]
    return complete_encoded(lm, prompts, encoded, config)


def complete_encoded(
    lm: LanguageModel, prompts: Sequence[str], encoded: Sequence[Encoded], config: SamplingConfig
) -> list[Completion]:
    """Complete prompts that are encoded already, as `complete` does; the same ids must end all of them."""
    if not prompts:
        return []
    start_id = lm.generation.decoder_start_id
    checked = checked_prompts(lm.model, [prompt.ids for prompt in encoded], None, start_id=start_id)
    config = stopped_by(config, encoded[0])
    *_, rows = continued(lm.model, checked, config, settings=lm.generation)
    completions = []
    for i, (prompt, own) in enumerate(zip(prompts, encoded, strict=True)):
        new = np.asarray(rows.tokens[i, checked.lengths[i] : rows.lengths[i]]).tolist()
        stream = TextStream(lm, own.ids)
        text = stream.feed(new) + stream.flush()
        completions.append(Completion(prompt, text, new, "stop" if rows.done[i] else "length"))
    return completions


def stream_text(
    lm: LanguageModel,
    prompt: str,
    *,
    row: int = 0,
    **options: Unpack[SamplingOptions],
) -> Iterator[str]:
    """Yield the text that `generate_text` writes for the prompt number `row`, piece by piece as it comes."""
    config = SamplingConfig.of(**options)
    yield from stream_encoded(lm, encoded_prompt(lm, prompt), config, row=row)


def stream_encoded(
    lm: LanguageModel,
    encoded: Encoded,
    config: SamplingConfig,
    *,
    row: int = 0,
    progress: Callable[[int], object] = lambda num_tokens: None,
) -> Iterator[str]:
    """Yield the text of `stream_text` for a prompt that is encoded already.

    `progress` is called with the number of new tokens so far, every few tokens.
    """
    prompts = checked_prompts(lm.model, [encoded.ids], None, start_id=lm.generation.decoder_start_id)
    stream, seen = TextStream(lm, encoded.ids), int(prompts.lengths[0])
    config = stopped_by(config, encoded)
    for rows in continued(lm.model, prompts, config, settings=lm.generation, first_row=row, chunk=STREAM_CHUNK):
        if text := stream.feed(rows.tokens[0, seen : rows.lengths[0]].tolist()):
            yield text
        seen = int(rows.lengths[0])
        progress(seen - int(prompts.lengths[0]))
    if text := stream.flush():
        yield text


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
