"""Beam search on the device, with the scores and the ends of transformers' `_beam_search` (5.23)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llama_jax.models import Model
from llama_jax.nn import PyTree
from llama_jax.parallel import replicate, shard
from llama_jax.sampling.config import SamplingConfig
from llama_jax.sampling.loop import NOT_NUMBERS, NOTHING_ALLOWED, Rows, bucket, power_of_two
from llama_jax.sampling.sampler import Sampler, Written

# Added to the score of a beam that must not be chosen. Finite: -inf is the score of a forbidden token.
OUT = -1e9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Beams:
    """N sequences of each prompt, whole on every device, and the model's cache of them, [B * N, ...].

    `tokens`, `scores` (sums of log-probabilities) and `lengths` are of the running ones, which are equally long and go
    on. `found` are the best that ended, with scores divided by a power of their number of new tokens; `ended` is false
    where there are not so many yet. A prompt that is not `open` gets no better ones.
    """

    step: Int[Array, ""]
    tokens: Int[Array, "b n s"]
    scores: Float[Array, "b n"]
    lengths: Int[Array, " b"]
    found: Int[Array, "b n s"]
    found_lengths: Int[Array, "b n"]
    found_scores: Float[Array, "b n"]
    ended: Bool[Array, "b n"]
    open: Bool[Array, " b"]
    fault: Int[Array, " b"]
    cache: PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Search:
    """Settings of a search. `stop_ids` (-1 is padding, and never written) end a sequence, as `max_new_tokens` do."""

    sampler: Sampler
    stop_ids: Int[Array | np.ndarray, " e"]
    max_new_tokens: Int[Array | np.ndarray, ""]
    length_penalty: Float[Array | np.ndarray, ""]
    prompts: Int[Array | np.ndarray, " b"]
    early_stopping: bool | str = dataclasses.field(metadata={"static": True})
    never: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def beam_search(
    model: Model,
    tokens: np.ndarray,
    lengths: np.ndarray,
    sampler: Sampler,
    config: SamplingConfig,
    *,
    source: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[Rows, Float[np.ndarray, "b m"]]:
    """Return the best `num_samples` of `num_beams` sequences of each prompt, best first, and their scores.

    `tokens` int32 [B, T], right-padded to `lengths` [B]; `source`, for an encoder-decoder, int32 [B, S] and bool
    [B, S], false at padding. The rows are [B * num_samples]. A score is the sum of the log-probabilities of the new
    tokens, as the sampler's controls leave them, divided by their number to the power of `length_penalty`.
    """
    limit, real = model.config.length_limit, len(tokens)
    size, width = power_of_two(real), tokens.shape[1] if source is not None else bucket(tokens.shape[1], limit)
    capacity = bucket(tokens.shape[1] + config.max_new_tokens, limit)
    if source is not None:
        source = tuple(padded(x, size, bucket(x.shape[1], limit)) for x in source)  # type: ignore[assignment]
        source[1][real:, 0] = True  # a row without any source would attend to nothing, which gives NaN
    ends = np.pad(np.asarray(lengths, np.int32), (0, size - real), constant_values=1)
    search = _Search(
        sampler,
        np.array(config.stop_ids, np.int32),
        np.int32(config.max_new_tokens),
        np.float32(config.length_penalty),
        ends,
        config.early_stopping,
        getattr(model.config, "never_written", ()),
    )
    inputs = padded(tokens, size, capacity), np.arange(size) < real, source
    with model.on_mesh():
        found = _run(model.graphdef, (width, config.num_beams), model.state, search, inputs)
    rows, scores = jax.device_get(found)
    best = jax.tree.map(lambda x: x[:real, : config.num_samples], (rows, scores))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), best[0]), best[1]


def padded(x: np.ndarray, rows: int, width: int) -> np.ndarray:
    """Return [B, T] with zeros up to [rows, width], of the same type."""
    return np.pad(x, ((0, rows - len(x)), (0, width - x.shape[1])))


def prefill(module: Any, tokens: Int[Array, "b t"], lengths: Int[Array, " b"], real: Array, capacity: int, source: Any):
    """Return the hidden states [B, T, D] of prompts, those of their last tokens [B, D], and their cache."""
    options = {}
    if source is not None:
        options = dict(zip(("source", "source_mask"), (shard(x, "batch", None) for x in source), strict=True))
    cache = module.init_cache(len(tokens), capacity, **options)
    tokens, lengths, real = shard(tokens, "batch", None), shard(lengths, "batch"), shard(real, "batch")
    place = jnp.arange(tokens.shape[1])
    valid = (place < lengths[:, None]) & real[:, None]
    hidden, cache = module.extend(tokens, cache=cache, lengths=jnp.zeros_like(lengths), is_token=valid)
    at_end = (place == lengths[:, None] - 1)[..., None]
    return hidden, jnp.where(at_end, hidden, 0).sum(1), cache


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    graphdef: PyTree, sizes: tuple[int, int], weights: PyTree, search: _Search, inputs: PyTree
) -> tuple[Rows, Float[Array, "b n"]]:
    module: Any = nnx.merge(graphdef, weights)
    (width, num_beams), (tokens, real, source) = sizes, inputs
    size, capacity = tokens.shape
    _, hidden, cache = prefill(module, tokens[:, :width], search.prompts, real, capacity, source)
    wide = jax.eval_shape(functools.partial(_prefilled_rows, module, size * num_beams, capacity), source)
    cache = jax.tree.map(lambda x, like: _taken(x, like, lambda x: jnp.repeat(x, num_beams, 0)), cache, wide)
    logits = jnp.repeat(replicate(module.logits(hidden[:, None])[:, 0]), num_beams, 0)
    repeated = jnp.repeat(replicate(tokens)[:, None], num_beams, 1)
    lengths, zeros = replicate(search.prompts), jnp.zeros((size, num_beams))
    # Only the first beam counts at the beginning, or all of them would be the same.
    first = zeros.at[:, 1:].set(OUT)
    none = (repeated, jnp.broadcast_to(lengths[:, None], zeros.shape), zeros + OUT, zeros > 0)
    fault = jnp.zeros_like(lengths)
    beams = _Beams(jnp.int32(0), repeated, first, lengths, *none, replicate(real), fault, cache)
    beams = _extended(beams, logits, search)

    def unfinished(beams: _Beams) -> Array:
        return _goes_on(beams, search).any() & (beams.step < search.max_new_tokens)

    def body(beams: _Beams) -> _Beams:
        last = jnp.take_along_axis(beams.tokens, (beams.lengths - 1)[:, None, None], 2)
        rows = shard(last.reshape(-1, 1), "batch", None)
        before = shard(jnp.repeat(beams.lengths - 1, num_beams), "batch")
        hidden, cache = module.extend(rows, cache=beams.cache, lengths=before)
        logits = replicate(module.logits(hidden)[:, 0])
        return _extended(dataclasses.replace(beams, cache=cache), logits, search)

    beams = jax.lax.while_loop(unfinished, body, beams)
    last = jnp.take_along_axis(beams.found, (beams.found_lengths - 1)[..., None], 2)
    done = (last == search.stop_ids).any(-1) & beams.ended
    fault = jnp.broadcast_to(beams.fault[:, None], done.shape)
    return Rows(beams.found, beams.found_lengths, done, fault), beams.found_scores


def _prefilled_rows(module: Any, rows: int, capacity: int, source: Any) -> PyTree:
    """Return the cache of `rows` rows, whose shape and sharding is all that is looked at."""
    if source is None:
        return module.init_cache(rows, capacity)
    ids, real = (shard(jnp.zeros((rows, x.shape[1]), x.dtype), "batch", None) for x in source)
    return module.init_cache(rows, capacity, source=ids, source_mask=real)


def _taken(x: Array, like: Any, function: Any) -> Array:
    """Return `function(x)` of rows of a cache, split over devices as `like` is."""
    if jax.sharding.get_abstract_mesh().empty:
        return function(x)
    # The compiler finds by itself that a row comes from the same prompt.
    return jax.sharding.auto_axes(function, out_sharding=like.sharding)(x)  # type: ignore[call-arg]


def _goes_on(beams: _Beams, search: _Search) -> Bool[Array, " b"]:
    """Return which prompts may get better sequences."""
    full = beams.ended.all(1) & (search.early_stopping is True)
    return beams.open & ~full & (beams.fault == 0)


def _extended(beams: _Beams, logits: Float[Array, "r v"], search: _Search) -> _Beams:
    """Return the beams with one more token: the running ones go on with the most probable that end none."""
    size, num_beams, capacity = beams.tokens.shape
    sane = jnp.isfinite(logits.max(-1)).reshape(size, num_beams).all(1)  # a NaN anywhere is the maximum
    logits = jax.nn.log_softmax(logits)
    if search.never:
        logits = jnp.where(np.isin(np.arange(logits.shape[1]), search.never), -jnp.inf, logits)
    flat = shard(beams.tokens.reshape(-1, capacity), "batch", None)
    lengths, prompts = (shard(jnp.repeat(x, num_beams), "batch") for x in (beams.lengths, replicate(search.prompts)))
    # Controls change log-probabilities here, not logits: that is what transformers does.
    logits = replicate(search.sampler.controlled(shard(logits, "batch", None), Written(flat, lengths, prompts)))
    fault = jnp.where(sane, jnp.where(logits.reshape(size, -1).max(1) == -jnp.inf, NOTHING_ALLOWED, 0), NOT_NUMBERS)
    total = logits + beams.scores.reshape(-1, 1)
    # So many that N of them do not end, whatever ids end the others.
    keep = min(max(2, 1 + len(search.stop_ids)) * num_beams, num_beams * logits.shape[1])
    each = min(keep, logits.shape[1])
    values, ids = (x.reshape(size, -1) for x in jax.lax.top_k(total, each))
    values, at = jax.lax.top_k(values, keep)
    beam, chosen = at // each, jnp.take_along_axis(ids, at, 1)
    here = jnp.arange(capacity) == beams.lengths[:, None, None]
    tokens = jnp.where(here, chosen[..., None], jnp.take_along_axis(beams.tokens, beam[..., None], 1))
    step = beams.step + 1
    ends = (chosen[..., None] == search.stop_ids).any(-1) | (step == search.max_new_tokens)

    scores, going = jax.lax.top_k(values + ends * OUT, num_beams)
    origin = jnp.take_along_axis(beam, going, 1)
    changed = dataclasses.replace(
        _with_ended(beams, tokens, values, ends, search),
        step=step,
        tokens=jnp.take_along_axis(tokens, going[..., None], 1),
        scores=scores,
        lengths=beams.lengths + 1,
        fault=jnp.where(_goes_on(beams, search), fault, beams.fault),
        cache=_reordered(beams.cache, origin),
    )
    return dataclasses.replace(changed, open=beams.open & _improvable(changed, search))


def _with_ended(beams: _Beams, tokens: Array, values: Array, ends: Array, search: _Search) -> _Beams:
    """Return the beams with those of the N most probable sequences that end now, where they are among the N best."""
    num_beams = beams.scores.shape[1]
    new = ends & (jnp.arange(ends.shape[1]) < num_beams)
    power = (beams.step + 1).astype(jnp.float32) ** search.length_penalty
    scores = values / power + OUT * ~new + OUT * ~_goes_on(beams, search)[:, None]
    scores = jnp.concatenate([beams.found_scores, scores], 1)
    best, at = jax.lax.top_k(scores, num_beams)
    lengths = jnp.broadcast_to(beams.lengths[:, None] + 1, ends.shape)

    def merged(old: Array, new: Array) -> Array:
        return jnp.take_along_axis(jnp.concatenate([old, new], 1), at.reshape(*at.shape, *(1,) * (old.ndim - 2)), 1)

    found = merged(beams.found, tokens), merged(beams.found_lengths, lengths), best, merged(beams.ended, new)
    names = ("found", "found_lengths", "found_scores", "ended")
    return dataclasses.replace(beams, **dict(zip(names, found, strict=True)))


def _improvable(beams: _Beams, search: _Search) -> Bool[Array, " b"]:
    """Return which prompts' best running sequence may still become better than the worst one that ended."""
    to_the_end = search.early_stopping == "never"
    length = jnp.where(to_the_end & (search.length_penalty > 0), search.max_new_tokens, beams.step)
    possible = beams.scores[:, 0] / length.astype(jnp.float32) ** search.length_penalty
    worst = jnp.where(beams.ended, beams.found_scores.min(1, keepdims=True), OUT)
    return (possible[:, None] > worst).any(1)


def _reordered(cache: PyTree, origin: Int[Array, "b n"]) -> PyTree:
    """Return the cache with the rows of the beams that go on; a source is the same for all beams of a prompt."""
    if isinstance(cache, dict) and "source" in cache:
        return cache | {"layers": _reordered(cache["layers"], origin)}

    def rows(x: Array) -> Array:
        return jax.vmap(lambda beams, at: beams[at])(x.reshape(*origin.shape, *x.shape[1:]), origin).reshape(x.shape)

    return jax.tree.map(lambda x: _taken(x, jax.typeof(x), rows), cache)
