"""`generate`: prompts of token ids, checked and continued."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Unpack

import jax
import numpy as np

from llama_jax.checkpoint import GenerationSettings, LanguageModel
from llama_jax.config import UserError
from llama_jax.models import Model, ModelConfig, cache_bytes, check_ids
from llama_jax.sampling.batch import Request
from llama_jax.sampling.config import GenerationOptions, SamplingConfig, token_ids
from llama_jax.sampling.engine import WHOLE, Engine, TokenLogprobs
from llama_jax.sampling.loop import bucket
from llama_jax.sampling.speculative import Speculation

# Tokens between two looks at texts that may have met a stop string.
READ_CHUNK = 16
# Rows that are continued together, at most.
MOST_ROWS, MOST_ROWS_ON_CPU = 256, 32


def generate(
    lm: LanguageModel | Model,
    tokens: Any,
    *,
    prompt_lengths: Any = None,
    source_mask: Any = None,
    eos_id: Any = None,
    rows: int | None = None,
    **options: Unpack[GenerationOptions],
) -> np.ndarray:
    """Continue token ids: int32 [B, T] to int32 [B, T + max_new_tokens], prompts included.

    `options` are the fields of `SamplingConfig`; by default 16 new tokens, greedy.

    Rows shorter than T are right-padded, and `prompt_lengths` [B] are the lengths of the prompts (padding is never
    read); lists of different lengths are padded here, T being the longest. A row's new tokens follow its own prompt
    directly: row b is `tokens[b, :prompt_lengths[b]]`, the new tokens, then `eos_id` (0 without one) to the end. A row
    stops early only at `eos_id` (an id, a list of them or None), which is kept; of several each stops it, and the first
    fills it. Temperature 0 is greedy; otherwise a token is a function of the row's text, `seed` (0 to 2**64 - 1), the
    row's number and the position, not of the other rows.

    The generation settings of a LanguageModel's files (forced and forbidden tokens) hold here as in transformers; a
    bare Model has none. `controls` are further functions `(logits [B, V], written) -> logits`, applied in their order
    before temperature, top-k and top-p (`sampler.py`).

    `draft` guesses `draft_tokens` tokens ahead, and changes no text: a smaller model with the same vocabulary, "prompt"
    (what followed the last tokens before), "mtp" (the model's further blocks), or a `Speculation`, which counts.

    An encoder-decoder reads `tokens` as the source, [B, S], and writes a target: int32 [B, 1 + max_new_tokens] that
    begins with its start token. `source_mask` [B, S] is then another way to mark padding, at any place of the source:
    false (0) where it is.

    Raises UserError for tokens that cannot be continued, for impossible settings, and where logits are not numbers.
    """
    if not isinstance(lm, LanguageModel | Model):
        raise UserError(f"lm is a {type(lm).__name__}, and must be what load or build returns")
    model, settings = (lm, GenerationSettings()) if isinstance(lm, Model) else (lm.model, lm.generation)
    stops = token_ids("eos_id", eos_id)
    config, speculation = settled(lm, {"max_new_tokens": 16, "temperature": 0.0, **options})
    config = dataclasses.replace(config, stop_ids=(*stops, *config.stop_ids))
    requests, width = requests_of(model, tokens, prompt_lengths, source_mask, config)
    begun = [request.prompt for request in requests]
    if model.config.has_source:
        start = settings.decoder_start_id
        begun, width = [(model.config.decoder_start_id if start is None else start,)] * len(requests), 1
    groups = answers(lm, requests, rows=rows, longest_first=True, speculation=speculation)
    texts = [[*prompt, *answer.token_ids] for prompt, group in zip(begun, groups, strict=True) for answer in group]
    out = np.full((len(texts), width + config.max_new_tokens), [*config.stop_ids, 0][0], np.int32)
    for row, text in zip(out, texts, strict=True):
        row[: len(text)] = text
    return out


def settled(lm: LanguageModel | Model, options: Mapping[str, Any]) -> tuple[SamplingConfig, Speculation | None]:
    """Return a user's options as a config, and the way to guess tokens. Raises UserError."""
    given: dict[str, Any] = {"draft": None, "draft_tokens": None, **options}
    draft, draft_tokens = given.pop("draft"), given.pop("draft_tokens")
    return SamplingConfig.of(**given), Speculation.of(lm, draft, draft_tokens)


@dataclasses.dataclass
class Answer:
    """What was written for one sample of a request."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    score: float | None = None


def answers(
    lm: LanguageModel | Model,
    requests: Sequence[Request],
    *,
    rows: int | None = None,
    longest_first: bool = False,
    enough: Callable[[int, int, list[int]], bool] | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
    speculation: Speculation | None = None,
) -> Iterator[list[Answer]]:
    """Yield the samples of every request, in the order of the requests, as soon as they are complete.

    `rows` is the number of them that are continued together (default: by the platform and the memory that is free).
    With `longest_first` requests of like length are together, and few rows run idle at the end. `enough(request,
    sample, token_ids)` sees new tokens now and then, and ends the text by true. `progress` is called with the number of
    texts that are complete, and of all. Raises UserError as soon as a request cannot be continued.
    """
    if not requests:
        return
    sizes = [len(request.prompt) + request.config.max_new_tokens for request in requests]
    needed = sum(max(request.config.num_samples, request.config.num_beams) for request in requests)
    rows = min(needed, rows or _rows_that_fit(lm if isinstance(lm, Model) else lm.model, max(sizes)))
    chunk = WHOLE if enough is None else READ_CHUNK
    engine = Engine(lm, rows=rows, decode_chunk=chunk, prefill_chunk=WHOLE, prefix_bytes=0, speculation=speculation)
    order = sorted(range(len(requests)), key=lambda i: -sizes[i] if longest_first else i)
    numbers, done = dict[int, int](), 0
    for i in order:
        try:
            numbers[engine.add(requests[i])] = i
        except UserError as error:
            raise UserError(f"prompt {i}: {error}" if len(requests) > 1 else str(error)) from None
    found = [[Answer() for _ in range(request.config.num_samples)] for request in requests]
    pieces = engine.run()
    for group in found:
        while not all(answer.finish_reason for answer in group):
            piece = next(pieces)
            i, answer = numbers[piece.ticket], found[numbers[piece.ticket]][piece.sample]
            answer.token_ids += piece.token_ids
            if piece.logprobs is not None:
                answer.logprobs = [*(answer.logprobs or ()), *piece.logprobs]
            answer.finish_reason, answer.score = piece.finish_reason, piece.score
            if not answer.finish_reason and enough is not None and enough(i, piece.sample, answer.token_ids):
                answer.finish_reason = "stop"
                engine.cancel(piece.ticket, piece.sample)
            if answer.finish_reason:
                progress(done := done + 1, sum(map(len, found)))
        yield group


def _rows_that_fit(model: Model, length: int) -> int:
    """Return how many rows of `length` positions are continued together."""
    devices = [*model.mesh.devices.flat] if model.mesh is not None else jax.local_devices()[:1]
    if devices[0].platform == "cpu":
        return MOST_ROWS_ON_CPU
    memory = devices[0].memory_stats() or {}
    free = memory.get("bytes_limit", 0) - memory.get("bytes_in_use", 0)
    row = cache_bytes(model.config, bucket(length, model.config.length_limit), dtype=model.module.compute.jax_dtype)
    # A prompt's cache is computed apart from the batch's, and activations need room as well.
    return max(1, min(MOST_ROWS, len(devices) * free // (4 * row)))


def requests_of(
    model: Model, tokens: Any, lengths: Any, source_mask: Any, config: SamplingConfig
) -> tuple[list[Request], int]:
    """Return rows of tokens as requests, sample i of row b with the number b * num_samples + i, and their width.

    Raises UserError for impossible ones.
    """
    if not model.config.generates:
        raise UserError(f"{type(model.config).__name__} continues no texts: load it and call it on tokens")
    tokens, own = _rectangle(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"tokens of shape {tokens.shape} and type {tokens.dtype} must be integers [batch, length]")
    if own is not None and not (lengths is None and source_mask is None):
        raise UserError("tokens has rows of different lengths: pad them, or leave prompt_lengths and source_mask out")
    if source_mask is not None and lengths is not None:
        raise UserError("prompt_lengths and source_mask both mark padding: give one of them")
    count, width = tokens.shape
    given = lengths if own is None else own
    lengths = np.full(count, width) if given is None else np.asarray(given)
    if lengths.shape != (count,):
        raise UserError(f"prompt_lengths of shape {lengths.shape} must have one number for each of {count} rows")
    wrong = (lengths < 1) | (lengths > width)
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(f"prompt_lengths[{row}]={lengths[row]} must be from 1 to the tokens' length {width}")
    real = np.arange(width) < lengths[:, None]
    if source_mask is not None:
        real = _checked_mask(model.config, source_mask, tokens.shape)
    tokens = np.where(real, tokens, 0)
    check_ids(model.config.vocab_size, tokens)
    requests = list[Request]()
    for ids, there in zip(tokens, real, strict=True):
        end = int(there.nonzero()[0][-1]) + 1
        source = tuple(there[:end].tolist()) if model.config.has_source else None
        row = len(requests) * config.num_samples
        requests.append(Request(tuple(ids[:end].tolist()), config, row=row, source=source))
    return requests, width


def _rectangle(tokens: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Return tokens as an array, and the lengths of their rows where these differ: zeros fill up the shorter."""
    with contextlib.suppress(ValueError):
        return np.asarray(tokens), None
    with contextlib.suppress(ValueError):
        rows = [np.asarray(row) for row in tokens]
        if all(row.ndim == 1 for row in rows):
            lengths = np.array([len(row) for row in rows])
            whole = np.zeros((len(rows), lengths.max()), np.result_type(*(row.dtype for row in rows if len(row))))
            for place, row in zip(whole, rows, strict=True):
                place[: len(row)] = row
            return whole, lengths
    return np.empty(len(tokens), object), None  # the caller refuses the type


def _checked_mask(config: ModelConfig, source_mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return a mask of the source as bool. Raises UserError for an impossible one."""
    if not config.has_source:
        raise UserError(f"source_mask is for encoder-decoders, and this is a {type(config).__name__}: leave it out")
    mask = np.asarray(source_mask)
    if mask.shape != shape or not np.isin(mask, (0, 1)).all():
        raise UserError(f"source_mask of shape {mask.shape} must have a 0 or 1 for each of the tokens {shape}")
    if not (seen := mask.any(1)).all():
        raise UserError(f"source_mask[{int(seen.argmin())}] leaves nothing of its source: give it a token")
    return mask.astype(bool)
