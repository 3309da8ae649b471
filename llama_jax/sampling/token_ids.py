"""`generate`: prompts of token ids, checked and continued."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import jax
import numpy as np

from llama_jax.checkpoint import GenerationSettings, LanguageModel
from llama_jax.config import UserError
from llama_jax.models import Model, ModelConfig, check_ids
from llama_jax.sampling.config import SamplingConfig, SamplingOptions, token_ids
from llama_jax.sampling.loop import NOT_NUMBERS, Rows, advance, start
from llama_jax.sampling.sampler import Sampler


def generate(
    lm: LanguageModel | Model,
    tokens: Any,
    *,
    prompt_lengths: Any = None,
    source_mask: Any = None,
    eos_id: Any = None,
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
    *_, rows = continued(model, prompts, config, settings=settings)
    out = np.zeros((len(prompts.tokens), prompts.width + config.max_new_tokens), np.int32)
    width = int(prompts.lengths.max()) + config.max_new_tokens
    out[:, :width] = rows.tokens[:, :width]
    out[np.arange(out.shape[1]) >= np.asarray(rows.lengths)[:, None]] = config.stop_ids[0] if config.stop_ids else 0
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


def continued(
    model: Model,
    prompts: Prompts,
    config: SamplingConfig,
    *,
    settings: GenerationSettings,
    first_row: int = 0,
    chunk: int | None = None,
) -> Iterator[Rows]:
    """Yield the rows as numpy after the first new token, then after every `chunk` (default: all) of them.

    Raises UserError for more tokens than the model has positions, and as soon as a row's logits are not numbers or
    allow no token.
    """
    max_new_tokens = config.max_new_tokens
    check_room(prompts, max_new_tokens, model.config.length_limit)
    sampler = Sampler.of(config, settings, model.config.vocab_size)
    state, rows = start(
        model,
        prompts.tokens,
        prompts.lengths,
        sampler,
        max_new_tokens=max_new_tokens,
        seed=config.seed,
        stop_ids=config.stop_ids,
        first_row=first_row,
        source=prompts.source,
    )
    left = max_new_tokens - 1
    if chunk is None and left:  # nobody reads rows before the end
        state, rows = advance(model, state, sampler, left)
        left = 0
    yield (seen := _seen(rows, prompts, first_row))
    while left and not seen.done.all():
        count = min(left, chunk or left)
        state, rows = advance(model, state, sampler, count)
        left -= count
        yield (seen := _seen(rows, prompts, first_row))


def check_room(prompts: Prompts, max_new_tokens: int, limit: int) -> None:
    """Raise UserError where prompts and new tokens are more than `limit` positions."""
    if prompts.source is not None and (size := prompts.source[0].shape[1]) > limit:
        raise UserError(f"a source of {size} tokens is more than the model's {limit} positions: shorten the prompt")
    longest = prompts.tokens.shape[1]
    if longest + max_new_tokens > limit:
        what = "the start token" if prompts.source is not None else f"a prompt of {longest} tokens"
        advice = f"take at most {limit - longest}" if longest < limit else "shorten the prompt"
        raise UserError(
            f"{what} and max_new_tokens={max_new_tokens} are more than the model's {limit} positions: {advice}"
        )


def _seen(rows: Rows, prompts: Prompts, first_row: int) -> Rows:
    """Return the rows of the prompts on the host. Raises UserError where one could not be continued."""
    rows = jax.tree.map(lambda x: x[: len(prompts.tokens)], jax.device_get(rows))
    if rows.fault.any():
        row = int((rows.fault != 0).argmax())
        if rows.fault[row] == NOT_NUMBERS:
            problem = "the logits are not numbers (NaN or infinite)"
            advice = "the weights are damaged, or need dtype='float32'"
        else:
            problem, advice = "every token is forbidden", "load the model with --ignore-config-keys for these settings"
        new = rows.lengths[row] - prompts.lengths[row] + 1
        raise UserError(f"{problem} at new token {new} of prompt {first_row + row}: {advice}")
    return rows


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
