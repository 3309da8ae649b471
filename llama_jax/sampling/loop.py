"""Prefill and the decode loop, on the device.

A batch in the middle of being continued is one immutable value, `SamplingState`; `step` is a pure function of it. The
same loop runs to the end for a batch and a few tokens at a time for streaming.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from llama_jax.models import Decoder, EncoderDecoder, Model
from llama_jax.parallel import replicate, shard
from llama_jax.sampling.controls import Controls, Text
from llama_jax.sampling.processors import Sampler

SMALLEST_BUCKET = 16
# More ids that end a text than these are rounded up to a power of two.
FEWEST_STOPS = 4
# What can be wrong with a row's logits.
NOT_NUMBERS, NOTHING_ALLOWED = 1, 2


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "lengths", "prompts", "done", "fault", "last", "keys", "cache"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """Rows of tokens and what it takes to continue them.

    Row b's text is `tokens[b, :lengths[b]]`, its prompt of `prompts[b]` tokens included; what stands behind is never
    read. The cache holds all of it but the last token, which is `last[b]`, and of an encoder-decoder the source. A row
    that is `done` gets no more tokens; `fault` is 0, or says why its logits chose none.
    """

    tokens: Int[Array, "b s"]
    lengths: Int[Array, " b"]
    prompts: Int[Array, " b"]
    done: Bool[Array, " b"]
    fault: Int[Array, " b"]
    last: Int[Array, " b"]
    keys: Key[Array, " b"]
    cache: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tokens", "lengths", "done", "fault"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Rows:
    """What a caller reads of a state, whole on every device; rows that fill the batch up stand at the end."""

    tokens: Int[Array | np.ndarray, "b s"]
    lengths: Int[Array | np.ndarray, " b"]
    done: Bool[Array | np.ndarray, " b"]
    fault: Int[Array | np.ndarray, " b"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["sampler", "controls", "stop_ids"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Choice:
    """How the next token is chosen, and which tokens end a row."""

    sampler: Sampler = dataclasses.field(default_factory=Sampler)
    controls: Controls = dataclasses.field(default_factory=Controls)
    stop_ids: Int[Array | np.ndarray, " e"] = dataclasses.field(default_factory=lambda: padded_stops(()))


def padded_stops(ids: Iterable[int]) -> Int[np.ndarray, " e"]:
    """Ids that end a row, filled up with -1 so that few sizes are compiled."""
    found = list(ids)
    size = max(FEWEST_STOPS, power_of_two(len(found)))
    return np.array(found + [-1] * (size - len(found)), np.int32)


def power_of_two(size: int) -> int:
    """The next power of two."""
    return 1 << max(size - 1, 0).bit_length()


def bucket(length: int, limit: int) -> int:
    """The size to compile for: the next power of two, at least 16 and at most `limit`."""
    return min(max(SMALLEST_BUCKET, power_of_two(length)), limit)


def start(
    model: Model,
    tokens: np.ndarray,
    lengths: np.ndarray,
    *,
    max_new_tokens: int,
    choice: Choice,
    seed: int,
    first_row: int = 0,
    source: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[SamplingState, Rows]:
    """Run the prompts and sample the first new token of each.

    `tokens` int32 [B, T], right-padded to `lengths` [B]; `source`, for an encoder-decoder, int32 [B, S] and bool
    [B, S], false at padding. A token is a function of the row's text, `seed` (0 to 2**64 - 1), the row's number
    (counted from `first_row`) and the position, whatever else is in the batch. What comes back has rows up to the next
    power of two, those behind B done before they begin.
    """
    limit, real = model.config.length_limit, len(tokens)
    width, capacity = (bucket(n, limit) for n in (tokens.shape[1], tokens.shape[1] + max_new_tokens))
    size = power_of_two(real)
    if source is not None:
        width = tokens.shape[1]  # always the start token
        ids, there = (_padded(x, size, bucket(x.shape[1], limit)) for x in source)
        there[real:, 0] = True
        source = ids, there
    rows = np.arange(first_row, first_row + size, dtype=np.int32)
    ends = np.pad(np.asarray(lengths, np.int32), (0, size - real), constant_values=1)
    halves = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    inputs = (_padded(tokens, size, capacity), ends, np.arange(size) >= real, rows, halves, source)
    with model.on_mesh():
        return _start(model.graphdef, width, model.state, inputs, choice)


def _padded(x: np.ndarray, rows: int, width: int) -> np.ndarray:
    """[B, T] with zeros up to [rows, width], without a change of type."""
    return np.pad(x, ((0, rows - len(x)), (0, width - x.shape[1])))


def advance(model: Model, state: SamplingState, num_tokens: int, *, choice: Choice) -> tuple[SamplingState, Rows]:
    """Up to `num_tokens` more tokens for every row that is not done; `state` is used up (its cache is donated)."""
    with model.on_mesh():
        return _advance(model.graphdef, model.state, state, choice, np.int32(num_tokens))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(graphdef: Any, width: int, weights: Any, inputs: Any, choice: Choice):
    module: Any = nnx.merge(graphdef, weights)
    tokens, lengths, done, rows, seed, source = inputs
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
    state = SamplingState(tokens, lengths, lengths, done, empty, empty, keys, cache)
    state = _append(state, _logits(module, hidden), choice)
    return state, _rows(state)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(graphdef: Any, weights: Any, state: SamplingState, choice: Choice, num_tokens: Array):
    module: Decoder | EncoderDecoder = nnx.merge(graphdef, weights)

    def unfinished(carry: tuple[Array, SamplingState]) -> Array:
        i, state = carry
        return (i < num_tokens) & ~replicate(state.done).all()

    def body(carry: tuple[Array, SamplingState]) -> tuple[Array, SamplingState]:
        i, state = carry
        return i + 1, step(module, state, choice)

    _, state = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))
    return state, _rows(state)


def step(module: Decoder | EncoderDecoder, state: SamplingState, choice: Choice) -> SamplingState:
    """One more token for every row that is not done. A pure function."""
    hidden, cache = module.extend(state.last[:, None], cache=state.cache, lengths=state.lengths - 1)
    state = dataclasses.replace(state, cache=cache)
    return _append(state, _logits(module, hidden), choice)


def _logits(module: Decoder | EncoderDecoder, hidden: Float[Array, "b 1 d"]) -> Float[Array, "b v"]:
    logits = shard(module.logits(hidden)[:, 0], "batch", None)
    if not (never := getattr(module.config, "never_written", ())):
        return logits
    return jnp.where(np.isin(np.arange(logits.shape[1]), never), -jnp.inf, logits)


def _append(state: SamplingState, logits: Float[Array, "b v"], choice: Choice) -> SamplingState:
    """The state with a token chosen from `logits` in each row that is not done."""
    sane = jnp.isfinite(logits.max(-1))  # a NaN anywhere is the maximum
    logits = choice.controls(logits, Text(state.tokens, state.lengths, state.prompts))
    fault = jnp.where(sane, jnp.where(logits.max(-1) == -jnp.inf, NOTHING_ALLOWED, 0), NOT_NUMBERS)
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.lengths)
    chosen = choice.sampler.choose(logits, keys)
    new = ~state.done & (fault == 0)
    here = (jnp.arange(state.tokens.shape[1]) == state.lengths[:, None]) & new[:, None]
    return dataclasses.replace(
        state,
        tokens=jnp.where(here, chosen[:, None], state.tokens),
        lengths=state.lengths + new,
        last=jnp.where(new, chosen, state.last),
        fault=jnp.where(state.done, state.fault, fault),
        done=state.done | ~new | (chosen[:, None] == choice.stop_ids).any(-1),
    )


def _rows(state: SamplingState) -> Rows:
    return Rows(*(replicate(x) for x in (state.tokens, state.lengths, state.done, state.fault)))
