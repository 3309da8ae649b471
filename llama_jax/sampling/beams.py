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
from llama_jax.parallel import mesh_axis_sizes, replicate, shard
from llama_jax.sampling.config import SamplingConfig
from llama_jax.sampling.controls import Written
from llama_jax.sampling.loop import NOT_NUMBERS, NOTHING_ALLOWED, Orders, Rows, by_rows
from llama_jax.sampling.sampler import Sampler

# Added to the score of a beam that must not be chosen. Finite: -inf is the score of a forbidden token.
OUT = -1e9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Beams:
    """N sequences of each prompt, whole on every device, and the model's cache of them, [B * N, ...].

    The running ones are `tokens` up to `lengths`, with sums of log-probabilities as `scores`. `found` are the best that
    ended, up to `ends`; their scores are divided by a power of the number of new tokens. `ended` is false where there
    are not so many yet. A prompt that is not `open` gets no better ones.
    """

    step: Int[Array, ""]
    tokens: Int[Array, "b n s"]
    lengths: Int[Array, " b"]
    scores: Float[Array, "b n"]
    found: Int[Array, "b n s"]
    ends: Int[Array, "b n"]
    found_scores: Float[Array, "b n"]
    ended: Bool[Array, "b n"]
    open: Bool[Array, " b"]
    fault: Int[Array, " b"]
    cache: PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Search:
    """Settings of a search: `prompts` [B * N] are the rows' lengths at first; `keep` candidates are looked at."""

    sampler: Sampler
    prompts: Any  # arrays of the host or the device
    stop_ids: Any
    max_new_tokens: Any
    length_penalty: Any
    num_beams: int = dataclasses.field(metadata={"static": True})
    early_stopping: bool | str = dataclasses.field(metadata={"static": True})
    keep: int = dataclasses.field(metadata={"static": True})


def beam_search(
    model: Model, cache: PyTree, rows: Rows, orders: Orders, sampler: Sampler, config: SamplingConfig, num_stops: int
) -> tuple[Rows, Float[np.ndarray, "b n"]]:
    """Return the best sequences of each prompt, best first, in the place of its N equal rows, and their scores.

    The rows, sampler and `cache` are as for `loop.advance`; `num_stops` ids end a text. A score is
    the sum of the log-probabilities of the new tokens, as the controls leave them, divided by their number to the power
    of `config.length_penalty`. Prompts that are done are left as they are.
    """
    num_beams, numbers = config.num_beams, (np.int32(config.max_new_tokens), np.float32(config.length_penalty))
    # So many that N of them do not end, whatever ids end the others.
    keep = max(2, 1 + num_stops) * num_beams
    search = _Search(sampler, orders.prompts, orders.stop_ids[0], *numbers, num_beams, config.early_stopping, keep)
    with model.on_mesh():
        return jax.device_get(_search(model.graphdef, model.state, cache, rows, search))


@functools.partial(jax.jit, static_argnums=0)
def _search(
    graphdef: PyTree, weights: PyTree, cache: PyTree, rows: Any, search: _Search
) -> tuple[Rows, Float[Array, "b n"]]:
    module: Any = nnx.merge(graphdef, weights)
    rows, num_beams = jax.tree.map(replicate, rows), search.num_beams
    never = getattr(module.config, "never_written", ())
    tokens = rows.tokens.reshape(-1, num_beams, rows.tokens.shape[1])
    lengths, zeros = rows.lengths[::num_beams], jnp.zeros(tokens.shape[:2])
    # Only the first beam counts at the beginning, or all of them would be the same.
    none = tokens, rows.lengths.reshape(zeros.shape), zeros + OUT, zeros > 0
    going = ~rows.done[::num_beams]
    beams = _Beams(jnp.int32(0), tokens, lengths, zeros.at[:, 1:].set(OUT), *none, going, lengths * 0, cache)

    def unfinished(beams: _Beams) -> Array:
        return _goes_on(beams, search).any() & (beams.step < search.max_new_tokens)

    def body(beams: _Beams) -> _Beams:
        flat = beams.tokens.reshape(-1, beams.tokens.shape[2])
        written = by_rows(Written(flat, jnp.repeat(beams.lengths, num_beams), search.prompts))
        hidden, cache = module.extend(written.last(1), cache=beams.cache, lengths=written.lengths - 1)
        logits = shard(module.logits(hidden)[:, 0], "batch", None)
        return _extended(dataclasses.replace(beams, cache=cache), logits, never, written, search)

    beams = jax.lax.while_loop(unfinished, body, beams)
    found, fault = beams.found.reshape(rows.tokens.shape), jnp.repeat(beams.fault, num_beams)
    return Rows(found, beams.ends.reshape(-1), jnp.ones_like(rows.done), fault), beams.found_scores


def _goes_on(beams: _Beams, search: _Search) -> Bool[Array, " b"]:
    """Return which prompts may get better sequences."""
    full = beams.ended.all(1) & (search.early_stopping is True)
    return beams.open & ~full & (beams.fault == 0)


def _extended(
    beams: _Beams, logits: Float[Array, "r v"], never: tuple[int, ...], written: Written, search: _Search
) -> _Beams:
    """Return the beams with one more token: the running ones go on with the most probable that end none."""
    size, num_beams = beams.scores.shape
    logprobs = jax.nn.log_softmax(logits)
    if never:
        logprobs = jnp.where(np.isin(np.arange(logits.shape[1]), never), -jnp.inf, logprobs)
    # Controls change log-probabilities here, not logits: that is what transformers does.
    logprobs = search.sampler.controlled(logprobs, written)
    each = min(search.keep, logits.shape[1])
    # The candidates are few: all that follows is computed on every device.
    values, ids, sane = (replicate(x) for x in (*jax.lax.top_k(logprobs, each), jnp.isfinite(logits.max(-1))))
    values = values.reshape(size, num_beams, each)
    sane = sane.reshape(size, num_beams).all(1)  # a NaN anywhere is the maximum
    fault = jnp.where(sane, jnp.where((values == -jnp.inf).all((1, 2)), NOTHING_ALLOWED, 0), NOT_NUMBERS)
    values = (values + beams.scores[..., None]).reshape(size, -1)
    values, at = jax.lax.top_k(values, min(search.keep, values.shape[1]))
    beam, chosen = at // each, jnp.take_along_axis(ids.reshape(size, -1), at, 1)
    here = jnp.arange(beams.tokens.shape[2]) == beams.lengths[:, None, None]
    tokens = jnp.where(here, chosen[..., None], jnp.take_along_axis(beams.tokens, beam[..., None], 1))
    step = beams.step + 1
    ends = (chosen[..., None] == search.stop_ids).any(-1) | (step == search.max_new_tokens)
    scores, going = jax.lax.top_k(values + ends * OUT, num_beams)
    changed = dataclasses.replace(
        _with_ended(beams, tokens, values, ends, search),
        step=step,
        tokens=jnp.take_along_axis(tokens, going[..., None], 1),
        lengths=beams.lengths + 1,
        scores=scores,
        fault=jnp.where(_goes_on(beams, search), fault, beams.fault),
        cache=_reordered(beams.cache, jnp.take_along_axis(beam, going, 1)),
    )
    return dataclasses.replace(changed, open=beams.open & _improvable(changed, search))


def _with_ended(beams: _Beams, tokens: Array, values: Array, ends: Array, search: _Search) -> _Beams:
    """Return the beams with those of the N most probable sequences that end now, where they are among the N best."""
    num_beams = beams.scores.shape[1]
    new = ends & (jnp.arange(ends.shape[1]) < num_beams)
    power = (beams.step + 1).astype(jnp.float32) ** search.length_penalty
    scores = values / power + OUT * ~new + OUT * ~_goes_on(beams, search)[:, None]
    best, at = jax.lax.top_k(jnp.concatenate([beams.found_scores, scores], 1), num_beams)

    def merged(old: Array, new: Array) -> Array:
        return jnp.take_along_axis(jnp.concatenate([old, new], 1), at.reshape(*at.shape, *(1,) * (old.ndim - 2)), 1)

    lengths = jnp.broadcast_to(beams.lengths[:, None] + 1, ends.shape)
    found, ends, ended = merged(beams.found, tokens), merged(beams.ends, lengths), merged(beams.ended, new)
    return dataclasses.replace(beams, found=found, ends=ends, found_scores=best, ended=ended)


def _improvable(beams: _Beams, search: _Search) -> Bool[Array, " b"]:
    """Return which prompts' best running sequence may still become better than the worst one that ended."""
    to_the_end = (search.length_penalty > 0) & (search.early_stopping == "never")
    length = jnp.where(to_the_end, search.max_new_tokens, beams.step).astype(jnp.float32)
    possible = beams.scores[:, :1] / length**search.length_penalty
    worst = jnp.where(beams.ended, beams.found_scores.min(1, keepdims=True), OUT)
    return (possible > worst).any(1)


def _reordered(cache: PyTree, origin: Int[Array, "b n"]) -> PyTree:
    """Return the cache with the rows of the beams that go on; a source is the same for all beams of a prompt."""
    if isinstance(cache, dict) and "source" in cache:
        return cache | {"layers": _reordered(cache["layers"], origin)}

    def rows(x: Array, origin: Array) -> Array:
        grouped = x.reshape(*origin.shape, *x.shape[1:])
        return jax.vmap(lambda beams, at: beams[at])(grouped, origin).reshape(x.shape)

    def moved(x: Array) -> Array:
        if not mesh_axis_sizes():
            return rows(x, origin)
        # A row comes from the same prompt, mostly on the same device: the compiler finds the communication.
        anywhere: Any = jax.sharding.auto_axes(rows, out_sharding=jax.typeof(x).sharding.spec)
        return anywhere(x, origin)

    return jax.tree.map(moved, cache)
