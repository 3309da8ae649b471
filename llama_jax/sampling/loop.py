"""Prefill and the decode loop, on the device.

A batch in the middle of being continued is one immutable value, `SamplingState`; `step` is a pure function of it. The
same loop runs to the end for a batch and a few tokens at a time for streaming.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from llama_jax.models import Decoder, EncoderDecoder, Model
from llama_jax.parallel import replicate, shard
from llama_jax.sampling.processors import Sampler

SMALLEST_BUCKET = 16


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "lengths", "done", "last", "keys", "cache"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """Rows of tokens and what it takes to continue them.

    Row b's text is `tokens[b, :lengths[b]]`, its prompt included; what stands behind is never read. The cache holds
    all of it but the last token, which is `last[b]`, and of an encoder-decoder the source. A row that is `done` gets no
    more tokens.
    """

    tokens: Int[Array, "b s"]
    lengths: Int[Array, " b"]
    done: Bool[Array, " b"]
    last: Int[Array, " b"]
    keys: Key[Array, " b"]
    cache: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tokens", "lengths", "done"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Rows:
    """What a caller reads of a state, whole on every device."""

    tokens: Int[Array | np.ndarray, "b s"]
    lengths: Int[Array | np.ndarray, " b"]
    done: Bool[Array | np.ndarray, " b"]


def bucket(length: int, limit: int) -> int:
    """The size to compile for: the next power of two, at least 16 and at most `limit`."""
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), limit)


def start(
    model: Model,
    tokens: np.ndarray,
    lengths: np.ndarray,
    *,
    max_new_tokens: int,
    sampler: Sampler,
    seed: int,
    stop_ids: tuple[int, ...] = (),
    first_row: int = 0,
    source: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[SamplingState, Rows]:
    """Run the prompts and sample the first new token of each.

    `tokens` int32 [B, T], right-padded to `lengths` [B]; `source`, for an encoder-decoder, int32 [B, S] and bool
    [B, S], false at padding. A token is a function of the row's text, `seed`, the row's number (counted from
    `first_row`) and the position, whatever else is in the batch.
    """
    limit = model.config.length_limit
    width, capacity = (bucket(n, limit) for n in (tokens.shape[1], tokens.shape[1] + max_new_tokens))
    if source is not None:
        width = tokens.shape[1]  # always the start token
        ids, real = (_padded(x, bucket(x.shape[1], limit)) for x in source)
        source = ids, real
    rows = np.arange(first_row, first_row + len(tokens), dtype=np.int32)
    inputs = (_padded(tokens, capacity), np.asarray(lengths, np.int32), rows, np.uint32(seed % 2**32), source)
    with model.on_mesh():
        return _start(model.graphdef, width, model.state, inputs, sampler, np.array(stop_ids, np.int32))


def _padded(x: np.ndarray, width: int) -> np.ndarray:
    """[B, T] with zeros up to [B, width], without a change of type."""
    return np.pad(x, ((0, 0), (0, width - x.shape[1])))


def advance(
    model: Model, state: SamplingState, num_tokens: int, *, sampler: Sampler, stop_ids: tuple[int, ...] = ()
) -> tuple[SamplingState, Rows]:
    """Up to `num_tokens` more tokens for every row that is not done; `state` is used up (its cache is donated)."""
    with model.on_mesh():
        return _advance(model.graphdef, model.state, state, sampler, np.array(stop_ids, np.int32), np.int32(num_tokens))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(graphdef: Any, width: int, weights: Any, inputs: Any, sampler: Sampler, stop_ids: Int[Array, " e"]):
    module: Any = nnx.merge(graphdef, weights)
    tokens, lengths, rows, seed, source = inputs
    num_rows, capacity = tokens.shape
    tokens, (lengths, rows) = shard(tokens, "batch", None), (shard(x, "batch") for x in (lengths, rows))
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(rows)
    empty = jnp.zeros_like(lengths)
    if source is not None:
        ids, real = (shard(x, "batch", None) for x in source)
        cache = module.init_cache(num_rows, capacity, source=ids, source_mask=real)
    else:
        cache = module.init_cache(num_rows, capacity)
    valid = jnp.arange(width) < lengths[:, None]
    hidden, cache = module.extend(tokens[:, :width], cache=cache, lengths=empty, valid=valid)
    at_end = jnp.arange(width) == lengths[:, None] - 1
    hidden = jnp.where(at_end[..., None], hidden, 0).sum(1, keepdims=True)
    state = SamplingState(tokens, lengths, empty > 0, empty, keys, cache)
    state = _append(state, _logits(module, hidden), sampler, stop_ids)
    return state, _rows(state)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(
    graphdef: Any, weights: Any, state: SamplingState, sampler: Sampler, stop_ids: Int[Array, " e"], num_tokens: Array
):
    module: Decoder | EncoderDecoder = nnx.merge(graphdef, weights)

    def unfinished(carry: tuple[Array, SamplingState]) -> Array:
        i, state = carry
        return (i < num_tokens) & ~replicate(state.done).all()

    def body(carry: tuple[Array, SamplingState]) -> tuple[Array, SamplingState]:
        i, state = carry
        return i + 1, step(module, state, sampler, stop_ids)

    _, state = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))
    return state, _rows(state)


def step(
    module: Decoder | EncoderDecoder, state: SamplingState, sampler: Sampler, stop_ids: Int[Array, " e"]
) -> SamplingState:
    """One more token for every row that is not done. A pure function."""
    hidden, cache = module.extend(state.last[:, None], cache=state.cache, lengths=state.lengths - 1)
    state = dataclasses.replace(state, cache=cache)
    return _append(state, _logits(module, hidden), sampler, stop_ids)


def _logits(module: Decoder | EncoderDecoder, hidden: Float[Array, "b 1 d"]) -> Float[Array, "b v"]:
    logits = shard(module.logits(hidden)[:, 0], "batch", None)
    if not (never := getattr(module.config, "never_written", ())):
        return logits
    return jnp.where(np.isin(np.arange(logits.shape[1]), never), -jnp.inf, logits)


def _append(
    state: SamplingState, logits: Float[Array, "b v"], sampler: Sampler, stop_ids: Int[Array, " e"]
) -> SamplingState:
    """The state with a token chosen from `logits` in each row that is not done."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.lengths)
    chosen = sampler.choose(logits, keys)
    new = ~state.done
    here = (jnp.arange(state.tokens.shape[1]) == state.lengths[:, None]) & new[:, None]
    return dataclasses.replace(
        state,
        tokens=jnp.where(here, chosen[:, None], state.tokens),
        lengths=state.lengths + new,
        last=jnp.where(new, chosen, state.last),
        done=state.done | (chosen[:, None] == stop_ids).any(-1),
    )


def _rows(state: SamplingState) -> Rows:
    return Rows(replicate(state.tokens), replicate(state.lengths), replicate(state.done))
