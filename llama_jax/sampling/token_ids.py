"""`generate`: prompts of token ids, checked and continued."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax
import numpy as np

from llama_jax.checkpoint import GenerationSettings, LanguageModel
from llama_jax.config import UserError
from llama_jax.models import Model, ModelConfig, cache_bytes, check_ids
from llama_jax.sampling.batch import Request
from llama_jax.sampling.config import SamplingConfig, SamplingOptions, token_ids
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
    draft: Any = None,
    draft_tokens: int | None = None,
    **options: Unpack[SamplingOptions],
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

    `draft` guesses `draft_tokens` tokens ahead, which costs time or saves it and does not change a token: a smaller
    model with the same vocabulary, "prompt" (what followed the last tokens earlier in the text), "mtp" (the model's own
    further blocks), or a `Speculation`, which counts the guesses that were right.

    An encoder-decoder reads `tokens` as the source, [B, S], and writes a target: int32 [B, 1 + max_new_tokens] that
    begins with its start token. `source_mask` [B, S] is then another way to mark padding, at any place of the source:
    false (0) where it is.

    Raises UserError for tokens that cannot be continued, for impossible settings, and where logits are not numbers.
    """
    if not isinstance(lm, LanguageModel | Model):
        raise UserError(f"lm is a {type(lm).__name__}, and must be what load or build returns")
    model, settings = (lm, GenerationSettings()) if isinstance(lm, Model) else (lm.model, lm.generation)
    stops = token_ids("eos_id", eos_id)
    config = SamplingConfig.of(**{"max_new_tokens": 16, "temperature": 0.0, **options})
    config = dataclasses.replace(config, stop_ids=(*stops, *config.stop_ids))
    prompts = checked_prompts(model, tokens, prompt_lengths, source_mask, start_id=settings.decoder_start_id)
    speculation = Speculation.of(lm, draft, draft_tokens)
    found = [
        answer
        for samples in answers(lm, prompts.requests(config), rows=rows, speculation=speculation)
        for answer in samples
    ]
    out = np.zeros((len(found), prompts.width + config.max_new_tokens), np.int32)
    for number, (row, answer) in enumerate(zip(out, found, strict=True)):
        source = number // config.num_samples
        end = prompts.lengths[source] + len(answer.token_ids)
        row[: prompts.lengths[source]] = prompts.tokens[source, : prompts.lengths[source]]
        row[prompts.lengths[source] : end] = answer.token_ids
        row[end:] = config.stop_ids[0] if config.stop_ids else 0
    return out


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Rows to continue.

    tokens: int32 [B, T] up to `lengths` [B]; of an encoder-decoder its start token.
    width: columns of the tokens as they were given, which may be more than T.
    source: of an encoder-decoder, int32 [B, S], and bool [B, S] that is false at padding.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    width: int
    source: tuple[np.ndarray, np.ndarray] | None = None

    def requests(self, config: SamplingConfig) -> list[Request]:
        """Return the rows as requests, sample i of row b with the number b * num_samples + i."""
        found = []
        for row in range(len(self.tokens)):
            real = None if self.source is None else tuple(self.source[1][row].tolist())
            ids = self.tokens[row, : self.lengths[row]] if self.source is None else self.source[0][row]
            found.append(Request(tuple(ids.tolist()), config, row=row * config.num_samples, source=real))
        return found


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was written for one sample of a request."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: str


def answers(
    lm: LanguageModel | Model,
    requests: Sequence[Request],
    *,
    rows: int | None = None,
    enough: Callable[[int, int, list[int]], bool] | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
    speculation: Speculation | None = None,
) -> list[list[Answer]]:
    """Return the samples of every request, in the order of the requests.

    `rows` is the number of them that are continued together (default: by the platform and the memory that is free).
    `enough(request, sample, token_ids)` sees new tokens now and then, and ends the text by true. `progress` is called
    with the number of texts that are complete, and of all. Raises UserError as soon as a request cannot be continued.
    """
    if not requests:
        return []
    engine = engine_for(lm, requests, rows=rows, watched=enough is not None, speculation=speculation)
    needed = sum(request.config.num_samples for request in requests)
    order = [*range(len(requests))]
    if (
        needed > engine.num_rows
    ):  # requests of like length together, the longest first, so that few rows run idle at the end
        order.sort(key=lambda i: -(len(requests[i].prompt) + requests[i].config.max_new_tokens))
    number = {engine.add(requests[i]): i for i in order}
    found = [[Answer([], None, "") for _ in range(request.config.num_samples)] for request in requests]
    done = 0
    while not engine.idle:
        for piece in engine.step():
            if piece.error is not None:
                raise UserError(piece.error)
            i, sample = number[piece.ticket], piece.sample
            before = found[i][sample]
            logprobs = None if piece.logprobs is None else [*(before.logprobs or ()), *piece.logprobs]
            after = Answer(before.token_ids + piece.token_ids, logprobs, piece.finish_reason or "")
            if not after.finish_reason and enough is not None and enough(i, sample, after.token_ids):
                after = dataclasses.replace(after, finish_reason="stop")
                engine.cancel(piece.ticket, sample)
            found[i][sample] = after
            if after.finish_reason:
                progress(done := done + 1, needed)
    return found


def engine_for(
    lm: LanguageModel | Model,
    requests: Sequence[Request],
    *,
    rows: int | None = None,
    watched: bool = False,
    speculation: Speculation | None = None,
) -> Engine:
    """Return an engine that runs all the requests to their ends.

    `rows` is the number of them that are continued together (default: by the platform and the memory that is free).
    Texts are read at their ends alone, or every few tokens where they are `watched`.
    """
    model = lm if isinstance(lm, Model) else lm.model
    longest = max(len(request.prompt) + request.config.max_new_tokens for request in requests)
    needed = sum(max(request.config.num_samples, request.config.num_beams) for request in requests)
    rows = min(needed, rows or _rows_that_fit(model, longest))
    chunk = READ_CHUNK if watched else WHOLE
    return Engine(lm, rows=rows, decode_chunk=chunk, prefill_chunk=WHOLE, prefix_bytes=0, speculation=speculation)


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


def checked_prompts(
    model: Model, tokens: Any, lengths: Any, source_mask: Any = None, *, start_id: int | None = None
) -> Prompts:
    """Return the prompts, zero after their ends; `start_id` begins an encoder-decoder's answer (default: its config's).

    Raises UserError for impossible ones.
    """
    config = model.config
    if not config.generates:
        raise UserError(f"{type(config).__name__} continues no texts: load it and call it on tokens")
    tokens, own = _rectangle(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"tokens of shape {tokens.shape} and type {tokens.dtype} must be integers [batch, length]")
    if own is not None and not (lengths is None and source_mask is None):
        raise UserError("tokens has rows of different lengths: pad them, or leave prompt_lengths and source_mask out")
    if source_mask is not None and lengths is not None:
        raise UserError("prompt_lengths and source_mask both mark padding: give one of them")
    lengths = own if lengths is None else lengths
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
    check_ids(config.vocab_size, tokens)
    tokens, width = tokens.astype(np.int32), tokens.shape[1]
    if config.has_source:
        used = int(real.any(0).nonzero()[0].max()) + 1
        first = np.full((len(tokens), 1), config.decoder_start_id if start_id is None else start_id)
        check_ids(config.vocab_size, first, "decoder_start_id")
        return Prompts(first.astype(np.int32), np.ones(len(tokens), np.int32), 1, (tokens[:, :used], real[:, :used]))
    return Prompts(tokens[:, : lengths.max()], lengths.astype(np.int32), width)


def _rectangle(tokens: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Return tokens as an array, and the lengths of their rows where these differ: zeros fill up the shorter."""
    if not isinstance(tokens, Sequence) or isinstance(tokens, str):
        return np.asarray(tokens), None
    try:
        rows = [np.asarray(row) for row in tokens]
        lengths = np.array([len(row) for row in rows])
    except (TypeError, ValueError):  # not a list of rows: the caller refuses the shape or type of the whole
        return np.asarray(tokens, object), None
    if not len(rows) or (lengths == lengths[0]).all() or any(row.ndim != 1 for row in rows):
        return (np.stack(rows) if len({row.shape for row in rows}) == 1 else np.array(lengths, object)), None
    whole = np.zeros((len(rows), lengths.max()), np.result_type(*(row.dtype for row in rows if len(row))))
    for place, row in zip(whole, rows, strict=True):
        place[: len(row)] = row
    return whole, lengths


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
