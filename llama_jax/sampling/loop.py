"""Prefill and the decode loop, on the device.

A batch that is being continued is one immutable value, `SamplingState`; `step` is a pure function of it. The same loop
runs to the end for a batch and a few tokens at a time for streaming.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from llama_jax.models import Decoder, EncoderDecoder, Model
from llama_jax.nn import PyTree
from llama_jax.parallel import replicate, shard
from llama_jax.sampling.sampler import Logits, Sampler, Written

SMALLEST_BUCKET = 16
# More ids that end a text than these are rounded up to a power of two.
FEWEST_STOPS = 4
# Faults of a row's logits.
NOT_NUMBERS, NOTHING_ALLOWED = 1, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """Rows of tokens, with all that is needed to continue them.

    Row b's text is `tokens[b, :lengths[b]]`, its prompt of `prompts[b]` tokens included; the rest of the row is never
    read. The cache holds all of the text but the last token, which is `last[b]`, and of an encoder-decoder the source.
    A row that is `done` gets no more tokens; `fault` is 0, or the reason why its logits chose none. Any of `stop_ids`
    (-1 is padding) ends a row.
    """

    tokens: Int[Array, "b s"]
    lengths: Int[Array, " b"]
    prompts: Int[Array, " b"]
    done: Bool[Array, " b"]
    fault: Int[Array, " b"]
    last: Int[Array, " b"]
    keys: Key[Array, " b"]
    stop_ids: Int[Array, " e"]
    cache: PyTree  # any pytree with a leading batch dimension


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The part of a state that a caller reads, whole on every device. Rows that fill up the batch come last."""

    tokens: Int[Array | np.ndarray, "b s"]
    lengths: Int[Array | np.ndarray, " b"]
    done: Bool[Array | np.ndarray, " b"]
    fault: Int[Array | np.ndarray, " b"]


def power_of_two(size: int) -> int:
    """Return the next power of two."""
    return 1 << max(size - 1, 0).bit_length()


def bucket(length: int, limit: int) -> int:
    """Return the size to compile for: the next power of two, at least 16 and at most `limit`."""
    return min(max(SMALLEST_BUCKET, power_of_two(length)), limit)


def start(
    model: Model,
    tokens: np.ndarray,
    lengths: np.ndarray,
    sampler: Sampler,
    *,
    max_new_tokens: int,
    seed: int,
    stop_ids: Sequence[int] = (),
    first_row: int = 0,
    source: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[SamplingState, Rows]:
    """Run the prompts and sample the first new token of each.

    `tokens` int32 [B, T], right-padded to `lengths` [B]; `source`, for an encoder-decoder, int32 [B, S] and bool
    [B, S], false at padding. A token is a function of the row's text, `seed` (0 to 2**64 - 1), the row's number
    (counted from `first_row`) and the position, not of the other rows. The result has rows up to the next
    power of two; those from B on are done before they begin.
    """
    limit, real = model.config.length_limit, len(tokens)
    width, capacity = (bucket(n, limit) for n in (tokens.shape[1], tokens.shape[1] + max_new_tokens))
    size = power_of_two(real)
    if source is not None:
        width = tokens.shape[1]  # always 1, the start token
        ids, there = (_padded(x, size, bucket(x.shape[1], limit)) for x in source)
        there[real:, 0] = True  # a row without any source would attend to nothing, which gives NaN
        source = ids, there
    rows = np.arange(first_row, first_row + size, dtype=np.int32)
    ends = np.pad(np.asarray(lengths, np.int32), (0, size - real), constant_values=1)
    halves = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    # Filled up with -1, so that few sizes are compiled.
    stops = np.full(max(FEWEST_STOPS, power_of_two(len(stop_ids))), -1, np.int32)
    stops[: len(stop_ids)] = stop_ids
    inputs = (_padded(tokens, size, capacity), ends, np.arange(size) >= real, rows, halves, stops, source)
    model = model.for_decoding
    with model.on_mesh():
        return _start(model.graphdef, width, model.state, inputs, sampler)


def _padded(x: np.ndarray, rows: int, width: int) -> np.ndarray:
    """Return [B, T] with zeros up to [rows, width], of the same type."""
    return np.pad(x, ((0, rows - len(x)), (0, width - x.shape[1])))


def advance(model: Model, state: SamplingState, sampler: Sampler, num_tokens: int) -> tuple[SamplingState, Rows]:
    """Add up to `num_tokens` tokens to every row that is not done; `state` is used up (its cache is donated)."""
    model = model.for_decoding
    with model.on_mesh():
        return _advance(model.graphdef, model.state, state, sampler, np.int32(num_tokens))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(
    graphdef: PyTree, width: int, weights: PyTree, inputs: PyTree, sampler: Sampler
) -> tuple[SamplingState, Rows]:
    module: Any = nnx.merge(graphdef, weights)
    tokens, lengths, done, rows, seed, stop_ids, source = inputs
    num_rows, capacity = tokens.shape
    tokens, (lengths, done, rows) = shard(tokens, "batch", None), (shard(x, "batch") for x in (lengths, done, rows))
    # The key of jax.random.key(seed), whose seed may have 64 bits only where JAX's integers do.
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    empty = jnp.zeros_like(lengths)
    if source is not None:
        ids, real = (shard(x, "batch", None) for x in source)
        cache = module.init_cache(num_rows, capacity, source=ids, source_mask=real)
    else:
        cache = module.init_cache(num_rows, capacity)
    valid = (jnp.arange(width) < lengths[:, None]) & ~done[:, None]
    hidden, cache = module.extend(tokens[:, :width], cache=cache, lengths=empty, is_token=valid)
    at_end = jnp.arange(width) == lengths[:, None] - 1
    hidden = jnp.where(at_end[..., None], hidden, 0).sum(1, keepdims=True)
    state = SamplingState(tokens, lengths, lengths, done, empty, empty, keys, stop_ids, cache)
    state = _append(state, _logits(module, hidden), sampler)
    return state, _rows(state)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(
    graphdef: PyTree, weights: PyTree, state: SamplingState, sampler: Sampler, num_tokens: Array
) -> tuple[SamplingState, Rows]:
    module: Decoder | EncoderDecoder = nnx.merge(graphdef, weights)

    def unfinished(carry: tuple[Array, SamplingState]) -> Array:
        i, state = carry
        return (i < num_tokens) & ~replicate(state.done).all()

    def body(carry: tuple[Array, SamplingState]) -> tuple[Array, SamplingState]:
        i, state = carry
        return i + 1, step(module, state, sampler)

    _, state = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))
    return state, _rows(state)


def step(module: Decoder | EncoderDecoder, state: SamplingState, sampler: Sampler) -> SamplingState:
    """Return the state with one more token in every row that is not done. A pure function."""
    hidden, cache = module.extend(state.last[:, None], cache=state.cache, lengths=state.lengths - 1)
    state = dataclasses.replace(state, cache=cache)
    return _append(state, _logits(module, hidden), sampler)


def _logits(module: Decoder | EncoderDecoder, hidden: Float[Array, "b 1 d"]) -> Logits:
    logits = shard(module.logits(hidden)[:, 0], "batch", None)
    if not (never := getattr(module.config, "never_written", ())):
        return logits
    return jnp.where(np.isin(np.arange(logits.shape[1]), never), -jnp.inf, logits)


def _append(state: SamplingState, logits: Logits, sampler: Sampler) -> SamplingState:
    """Return the state with a token chosen from `logits` in each row that is not done."""
    sane = jnp.isfinite(logits.max(-1))  # a NaN anywhere is the maximum
    logits = sampler.controlled(logits, Written(state.tokens, state.lengths, state.prompts))
    best = logits.max(-1)
    fault = jnp.where(sane & (best < jnp.inf), jnp.where(best == -jnp.inf, NOTHING_ALLOWED, 0), NOT_NUMBERS)
    # The key depends on the row and the position alone, so that other rows and chunks of streaming change no draw.
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.lengths)
    chosen = sampler.choose(logits, keys)
    new = ~state.done & (fault == 0)
    here = (jnp.arange(state.tokens.shape[1]) == state.lengths[:, None]) & new[:, None]
    return dataclasses.replace(
        state,
        tokens=jnp.where(here, chosen[:, None], state.tokens),
        lengths=state.lengths + new,
        last=jnp.where(new, chosen, state.last),
        fault=jnp.where(state.done, state.fault, fault),
        done=state.done | ~new | (chosen[:, None] == state.stop_ids).any(-1),
    )


def _rows(state: SamplingState) -> Rows:
    return Rows(*(replicate(x) for x in (state.tokens, state.lengths, state.done, state.fault)))
