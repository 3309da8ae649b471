"""The programs of decoding, on the device: prefill, copies of cached rows, and the decode loop.

Sizes are rounded up to powers of two, so that few programs are compiled. What has the size of the model, the cache,
stays on the device and is donated from call to call; `Rows`, a few numbers a row, come from the host and go back.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from llama_jax.models import Decoder, EncoderDecoder, Model, ModelConfig, cache_shapes
from llama_jax.nn import HELD, PyTree, is_ring, line_of, ring_of
from llama_jax.parallel import mesh_axis_sizes, replicate, shard
from llama_jax.sampling.controls import Logits, Written
from llama_jax.sampling.sampler import Sampler, logprobs

SMALLEST_BUCKET = 16
# More ids that end a text than these are rounded up to a power of two.
FEWEST_STOPS = 4
# Faults of a row's logits.
NOT_NUMBERS, NOTHING_ALLOWED = 1, 2

Ints = Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The texts of a batch: row b is `tokens[b, :lengths[b]]`, its prompt included; the rest is never read.

    A row that is `done` gets no more tokens; `fault` is 0, or the reason why its logits chose none.
    """

    tokens: Int[Ints, "b s"]
    lengths: Int[Ints, " b"]
    done: Bool[Ints, " b"]
    fault: Int[Ints, " b"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Orders:
    """How the rows of a batch are continued.

    Row b has a prompt of `prompts[b]` tokens, and ends at `limits[b]` tokens or at any of `stop_ids[b]` (-1 is
    padding). Its draws depend on `seeds[b]` (64 bits, the upper half first), `numbers[b]` and the position alone.
    """

    prompts: Int[Ints, " b"]
    limits: Int[Ints, " b"]
    stop_ids: Int[Ints, "b e"]
    seeds: UInt[Ints, "b 2"]
    numbers: Int[Ints, " b"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """A batch within the loop. The cache holds all of a row's text but the last token, which is `last[b]`."""

    rows: Any  # Rows of arrays on the device, as the orders
    last: Int[Array, " b"]
    orders: Any
    keys: Key[Array, " b"]
    cache: PyTree  # any pytree with a leading batch dimension


@dataclasses.dataclass(frozen=True)
class CacheSize:
    """Size of a cache: rows, positions, type (None: that of the activations), and of an encoder-decoder the source.

    With `room` for so many tokens at once a decoder's layers keep no more than their window.
    """

    rows: int
    length: int
    dtype: DTypeLike | None = None
    source: int = 0
    room: int | None = None

    def shapes(self, module: Any) -> PyTree:
        """Return the abstract cache."""

        def make() -> PyTree:
            if self.room is not None:
                return module.init_cache(self.rows, self.length, self.dtype, self.room)
            if not self.source:
                return module.init_cache(self.rows, self.length, self.dtype)
            there = shard(jnp.ones((self.rows, self.source), bool), "batch", None)
            source = shard(jnp.zeros((self.rows, self.source), jnp.int32), "batch", None)
            return module.init_cache(self.rows, self.length, self.dtype, source=source, source_mask=there)

        return jax.eval_shape(make)


def power_of_two(size: int) -> int:
    """Return the next power of two."""
    return 1 << max(size - 1, 0).bit_length()


def bucket(length: int, limit: int) -> int:
    """Return the size to compile for: the next power of two, at least 16 and at most `limit`."""
    return min(max(SMALLEST_BUCKET, power_of_two(length)), limit)


@functools.lru_cache(64)
def can_be_cut(config: ModelConfig) -> bool:
    """Return whether a decoder's cache may be cut at any position: it holds entries of positions alone, and no states.

    Of an encoder-decoder it is the cache of the target.
    """
    shapes = [jax.tree.leaves(cache_shapes(config, n)) for n in (SMALLEST_BUCKET, 2 * SMALLEST_BUCKET)]
    return all(a.shape != b.shape for a, b in zip(*shapes, strict=True))


def turns_by_length(config: ModelConfig) -> bool:
    """Return whether keys depend on how long the text is (LongRoPE), so that a prompt's must be computed at once."""
    ropes = [getattr(mixer, "rope", None) for mixer, _ in config.layer_pieces()]
    return any(rope is not None and rope.scaling is not None and rope.scaling.beyond() for rope in ropes)


def prefill(
    model: Model, size: CacheSize, cache: PyTree | None, tokens: np.ndarray, starts: np.ndarray, counts: np.ndarray
) -> PyTree:
    """Return the cache with `counts` [B] more tokens of [B, T] in rows that hold `starts` [B]; None is an empty one.

    The given cache is used up. `starts + T` must be at most the cache's length.
    """
    with model.on_mesh():
        return _prefill(model.graphdef, size, model.state, cache, tokens, starts, counts)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _prefill(
    graphdef: PyTree, size: CacheSize, weights: PyTree, cache: PyTree, tokens: Array, starts: Array, counts: Array
) -> PyTree:
    module: Any = nnx.merge(graphdef, weights)
    tokens, starts, counts = shard(tokens, "batch", None), shard(starts, "batch"), shard(counts, "batch")
    if cache is None:
        cache = module.init_cache(size.rows, size.length, size.dtype)
    is_token = jnp.arange(tokens.shape[1]) < counts[:, None]
    return module.extend(tokens, cache=cache, lengths=starts, is_token=is_token)[1]


def encode(model: Model, size: CacheSize, source: np.ndarray, mask: np.ndarray) -> PyTree:
    """Return the caches of empty targets whose sources are [B, S]; `mask` [B, S] is false at padding."""
    with model.on_mesh():
        return _encode(model.graphdef, size, model.state, source, mask)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(graphdef: PyTree, size: CacheSize, weights: PyTree, source: Array, mask: Array) -> PyTree:
    module: Any = nnx.merge(graphdef, weights)
    source, mask = shard(source, "batch", None), shard(mask, "batch", None)
    return module.init_cache(size.rows, size.length, size.dtype, source=source, source_mask=mask)


@functools.lru_cache(1024)
def smallest_ring(config: ModelConfig, length: int, room: int) -> int | None:
    """Return the fewest positions that a layer of a decoder's cache of this `length` keeps, None where all keep all."""
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        windows = getattr(config, "position_bias", None) is None and not config.has_source
        found = cache_shapes(config, length, room=room) if windows else []
    return min((layer[HELD].shape[1] for layer in found if is_ring(layer)), default=None)


def place(
    model: Model,
    size: CacheSize,
    cache: PyTree | None,
    other: PyTree,
    rows: Sequence[int],
    sources: Sequence[int],
    lengths: Sequence[int] | None = None,
) -> PyTree:
    """Return `cache` with the rows `sources` [N] of another one, longer or shorter, at `rows` [N].

    The cache is used up; None is a new one of `size`. Entries beyond its length are cut off. `lengths` [N] are the
    entries of each source row, which a ring is made of.
    """
    pad = 0, power_of_two(len(rows)) - len(rows)
    lengths = [0] * len(rows) if lengths is None else lengths
    numbers = [np.pad(np.asarray(x, np.int32), pad, "edge") for x in (rows, sources, lengths)]
    cache = empty(model, size) if cache is None else cache
    with model.on_mesh():
        return _place(cache, other, *numbers)


def empty(model: Model, size: CacheSize) -> PyTree:
    """Return a cache of zeros."""
    with model.on_mesh():
        return _empty(model.graphdef, size, model.state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty(graphdef: PyTree, size: CacheSize, weights: PyTree) -> PyTree:
    def zeros(like: jax.ShapeDtypeStruct) -> Array:
        found = jnp.zeros(like.shape, like.dtype)
        return jax.sharding.reshard(found, like.sharding.spec) if mesh_axis_sizes() else found

    return jax.tree.map(zeros, size.shapes(nnx.merge(graphdef, weights)))


@functools.partial(jax.jit, donate_argnums=0)
def _place(cache: PyTree, other: PyTree, rows: Array, sources: Array, lengths: Array) -> PyTree:

    def put(old: Array, one: Array, row: Array) -> Array:
        one = one[(slice(None), *(slice(n) for n in old.shape[1:]))]
        one = jnp.pad(one, [(0, 0), *((0, n - m) for n, m in zip(old.shape[1:], one.shape[1:], strict=True))])
        return jax.lax.dynamic_update_slice_in_dim(old, one, row, axis=0)

    def copy(old: PyTree, new: PyTree, row: Array, source: Array, length: Array) -> PyTree:
        one = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, source, 1, axis=0), new)
        if is_ring(old) and not is_ring(one):
            one = ring_of(one, old[HELD].shape[1], length)
        elif is_ring(one) and not is_ring(old):
            one = line_of(one, old["k"].shape[2])
        return jax.tree.map(lambda old, one: put(old, one, row), old, one)

    def copies(cache: PyTree, other: PyTree, rows: Array, sources: Array, lengths: Array) -> PyTree:
        def body(i: Array, cache: PyTree) -> PyTree:
            numbers = rows[i], sources[i], lengths[i]
            layer = lambda x: isinstance(x, dict) and "k" in x  # noqa: E731
            return jax.tree.map(lambda old, new: copy(old, new, *numbers), cache, other, is_leaf=layer)

        return jax.lax.fori_loop(0, len(rows), body, cache)

    if not mesh_axis_sizes():
        return copies(cache, other, rows, sources, lengths)
    # From and to any device: the compiler finds the communication.
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, cache)
    anywhere: Any = jax.sharding.auto_axes(copies, out_sharding=specs)
    return anywhere(cache, other, rows, sources, lengths)


@dataclasses.dataclass(frozen=True)
class Logged:
    """Log-probabilities to return: of the `top` most probable tokens, for `steps` tokens of a row."""

    top: int
    steps: int


def advance(
    model: Model,
    cache: PyTree,
    rows: Rows,
    orders: Orders,
    sampler: Sampler,
    num_tokens: int,
    *,
    until: int | None = None,
    logged: Logged | None = None,
) -> tuple[PyTree, tuple[Rows, PyTree]]:
    """Add up to `num_tokens` tokens to every row that is not done, until `until` rows are done (default: all).

    The cache is used up. Returns it, the rows, whole on every device, and where they are `logged`, of the i-th token
    made here by each row: log-probability [B, steps], most probable tokens [B, steps, top] and their
    log-probabilities.
    """
    limits = np.array([num_tokens, len(rows.done) if until is None else until], np.int32)
    with model.on_mesh():
        return _advance(model.graphdef, logged, model.state, cache, (rows, orders), sampler, limits)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _advance(
    graphdef: PyTree,
    logged: Logged | None,
    weights: PyTree,
    cache: PyTree,
    batch: tuple[Rows, Orders],
    sampler: Sampler,
    limits: Array,
) -> tuple[PyTree, tuple[Rows, PyTree]]:
    module: Decoder | EncoderDecoder = nnx.merge(graphdef, weights)
    state = begun(*batch, cache)
    rows = state.rows
    log = None if logged is None else _no_log(len(rows.lengths), logged)

    def unfinished(carry: tuple[Array, SamplingState, PyTree]) -> Array:
        i, state, _ = carry
        return (i < limits[0]) & (replicate(state.rows.done).sum() < limits[1])

    def body(carry: tuple[Array, SamplingState, PyTree]) -> tuple[Array, SamplingState, PyTree]:
        i, state, log = carry
        state, logits = step(module, state, sampler)
        if logged is not None:
            new = logprobs(logits, state.last, logged.top)
            write = functools.partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=1)
            log = jax.tree.map(write, log, new)
        return i + 1, state, log

    _, state, log = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state, log))
    return state.cache, jax.tree.map(replicate, (state.rows, log))


def step(module: Decoder | EncoderDecoder, state: SamplingState, sampler: Sampler) -> tuple[SamplingState, Logits]:
    """Return the state with one more token in every row that is not done, and the model's logits. A pure function."""
    hidden, cache = module.extend(state.last[:, None], cache=state.cache, lengths=state.rows.lengths - 1)
    logits = logits_of(module, hidden)[:, 0]
    return append(dataclasses.replace(state, cache=cache), logits, sampler), logits


def begun(rows: Any, orders: Any, cache: PyTree) -> SamplingState:
    """Return the state in which a loop on the device begins."""
    rows, orders = by_rows(rows), by_rows(orders)
    last = Written(rows.tokens, rows.lengths, orders.prompts).last(1)[:, 0]
    return SamplingState(rows, last, orders, _keys(orders), cache)


def by_rows(arrays: PyTree) -> PyTree:
    """Return arrays [B, ...], split as the rows of a batch are."""
    return jax.tree.map(lambda x: shard(x, "batch", *(None,) * (x.ndim - 1)), arrays)


def _keys(orders: Any) -> Key[Array, " b"]:

    # The keys of jax.random.key(seed), whose seed may have 64 bits only where JAX's integers do.
    def key(seed: Array, number: Array) -> Array:
        return jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), number)

    return jax.vmap(key)(orders.seeds, orders.numbers)


def _no_log(num_rows: int, logged: Logged) -> PyTree:
    shape = num_rows, logged.steps
    ids = jnp.zeros((*shape, logged.top), jnp.int32)
    log = jnp.zeros(shape), ids, jnp.zeros(ids.shape)
    return by_rows(log)


def logits_of(module: Any, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
    """Return the logits of hidden states, -inf for what the model never writes."""
    logits = shard(module.logits(hidden), "batch", None, None)
    never = getattr(module.config, "never_written", ())
    return jnp.where(np.isin(np.arange(logits.shape[-1]), never), -jnp.inf, logits) if never else logits


def append(state: SamplingState, logits: Logits, sampler: Sampler) -> SamplingState:
    """Return the state with a token chosen from `logits` in each row that is not done."""
    rows, orders = state.rows, state.orders
    sane = jnp.isfinite(logits.max(-1))  # a NaN anywhere is the maximum
    logits = sampler.controlled(logits, Written(rows.tokens, rows.lengths, orders.prompts))
    best = logits.max(-1)
    fault = jnp.where(sane & (best < jnp.inf), jnp.where(best == -jnp.inf, NOTHING_ALLOWED, 0), NOT_NUMBERS)
    # The key depends on the row and the position alone, so that other rows and chunks of streaming change no draw.
    keys = jax.vmap(jax.random.fold_in)(state.keys, rows.lengths)
    chosen = sampler.choose(logits, keys)
    new = ~rows.done & (fault == 0)
    here = (jnp.arange(rows.tokens.shape[1]) == rows.lengths[:, None]) & new[:, None]
    lengths = rows.lengths + new
    ended = ~new | (lengths >= orders.limits) | (chosen[:, None] == orders.stop_ids).any(-1)
    rows = Rows(
        tokens=jnp.where(here, chosen[:, None], rows.tokens),
        lengths=lengths,
        done=rows.done | ended,
        fault=jnp.where(rows.done, rows.fault, fault),
    )
    return dataclasses.replace(state, rows=rows, last=jnp.where(new, chosen, state.last))
