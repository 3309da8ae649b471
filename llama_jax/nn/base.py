"""Masks, the context of a forward pass, and the base classes of the pieces of a model."""

import contextlib
import contextvars
import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llama_jax.config import Component, Known, UserError

type Recorder = Callable[[str, Any], None]

PyTree = Any  # arrays, or what has them: dicts, tuples and registered classes, as `jax.tree` walks over them


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["query_places", "key_places", "segment_ids", "key_segment_ids", "prefix"],
    meta_fields=["causal", "window"],
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys each query attends to, as a small value instead of a dense matrix; None where nothing is restricted.

    causal: hide the keys after a query.
    window: hide keys `window` or more places before a query, and where it is not causal, as many after it.
    prefix: [B, S], 1 at keys that all queries of their document attend to, those before them too.
    segment_ids: [B, T], the document of each query, 0 at padding; a query attends to keys of the same document only.
    key_segment_ids: [B, S], the document of each key; None where the keys are the queries' own tokens.
    query_places: [B, T], the place of each query among the keys; None where query t is at place t.
    key_places: [S] or [B, S], the place of each key; None where key s is at place s.
    """

    causal: bool = True
    window: int | None = None
    # Arrays or None, or JAX's placeholders when it rebuilds the tree.
    prefix: PyTree = None
    segment_ids: PyTree = None
    key_segment_ids: PyTree = None
    query_places: PyTree = None
    key_places: PyTree = None

    def allowed(
        self, first_query: int | Array, num_queries: int, first_key: int | Array, num_keys: int
    ) -> Bool[Array, "#b t s"]:
        """Return the dense mask of a block of queries against a block of keys, whose beginnings may be traced."""

        def queries(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, first_query, num_queries, axis=1)[..., None]

        def keys(x: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, first_key, num_keys, axis=axis)

        if self.key_places is None:
            key_place = first_key + jnp.arange(num_keys)
        else:
            key_place = keys(self.key_places, self.key_places.ndim - 1)[..., None, :]
        if self.query_places is None:
            query_place = (first_query + jnp.arange(num_queries))[None, :, None]
        else:
            query_place = queries(self.query_places)
        allowed = key_place <= query_place if self.causal else jnp.ones((*query_place.shape[:2], num_keys), bool)
        if self.prefix is not None:
            allowed |= keys(self.prefix, 1)[:, None] > 0
        if self.window is not None:
            allowed &= key_place > query_place - self.window
            if not self.causal or self.prefix is not None:  # else nothing after the query is left to hide
                allowed &= key_place < query_place + self.window
        if self.segment_ids is not None:
            key_segments = self.segment_ids if self.key_segment_ids is None else self.key_segment_ids
            allowed &= queries(self.segment_ids) == keys(key_segments, 1)[:, None]
        return allowed


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["mask", "position_bias", "is_token", "dropout_key"],
    meta_fields=["kernel", "context_strategy"],
)
@dataclasses.dataclass(frozen=True)
class ForwardContext:
    """The arguments of a forward pass that every mixer and feed-forward gets along with the activations.

    mask: which keys each query attends to.
    is_token: [B, T], false at padding, which must not count nor change a state; None where all inputs are tokens.
    position_bias: [1 or B, N, T, S], added to the scaled scores, in the order of the text; None for no bias.
    dropout_key: the random key of this layer and step in training; None elsewhere.
    kernel: name of the run's attention kernel, or auto.
    context_strategy: how keys and values reach the other parts of a sequence that is split: ring or all_gather.
    """

    mask: Mask = Mask()
    # Arrays or None, or JAX's placeholders when it rebuilds the tree.
    is_token: PyTree = None
    position_bias: PyTree = None
    dropout_key: PyTree = None
    kernel: str = "auto"
    context_strategy: str = "ring"

    def with_mask(self, **changes: Any) -> "ForwardContext":
        """Return the same context with these fields of its mask changed."""
        return dataclasses.replace(self, mask=dataclasses.replace(self.mask, **changes))

    @property
    def cache_start(self) -> Int[Array, " b"]:
        """The place in the cache of each row's first input; only where a cache is given."""
        assert self.mask.query_places is not None
        return self.mask.query_places[:, 0]

    def row_means(self, values: Float[Array, "b t *_"]) -> Float[Array, "b *_"]:
        """Return the means over the tokens of each row, [B, T, ...] -> [B, ...]: 0 where a row has none."""
        return self._means(values, (1,))

    def batch_means(self, values: Float[Array, "b t *_"]) -> Float[Array, "*_"]:
        """Return the means over the tokens of all rows, [B, T, ...] -> [...]: 0 where there are none."""
        return self._means(values, (0, 1))

    def _means(self, values: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        if self.is_token is None:
            return values.mean(axes)
        is_token = self.is_token.reshape(*self.is_token.shape, *(1,) * (values.ndim - 2))
        return jnp.where(is_token, values, 0).sum(axes) / jnp.maximum(is_token.sum(axes), 1)

    def mean_of_rows(self, values: Float[Array, " b"]) -> Float[Array, ""]:
        """Return the mean over the rows that have tokens, [B] -> []: 0 where none has."""
        if self.is_token is None:
            return values.mean()
        has_tokens = self.is_token.any(1)
        return jnp.where(has_tokens, values, 0).sum() / jnp.maximum(has_tokens.sum(), 1)

    def random_key(self, name: str) -> jax.Array:
        """Return the random key of `name` in this layer and step: the same on every mesh."""
        return jax.random.fold_in(self.dropout_key, zlib.crc32(name.encode()))


_recorder: contextvars.ContextVar[Recorder | None] = contextvars.ContextVar("recorder", default=None)


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Call `recorder(name, value)` with everything that is given to `record` while something is traced."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def record(name: str, value: Callable[[], Any]) -> None:
    """Give `value()`, of the trace under way, to those who look inside the model; do nothing where nobody does."""
    if (recorder := _recorder.get()) is not None:
        recorder(name, value())


def check_rate(name: str, rate: float) -> None:
    """Raise UserError unless the option `name` is a share that can be dropped."""
    if not 0 <= rate < 1:
        raise UserError(f"{name}={rate} must be at least 0 and below 1")


def check_at_least(config: object, least: int, *names: str, hint: str = "") -> None:
    """Raise UserError where one of these fields of `config` is below `least`; None is allowed."""
    for name in names:
        if (value := getattr(config, name)) is not None and value < least:
            raise UserError(f"{name}={value} must be at least {least}{hint}")


def check_above_zero(config: object, *names: str, hint: str = "") -> None:
    """Raise UserError where one of these fields of `config` is 0 or below; None is allowed."""
    for name in names:
        if (value := getattr(config, name)) is not None and not value > 0:
            raise UserError(f"{name}={value} must be above 0{hint}")


def known_heads(known: Known) -> tuple[int, int]:
    """Return number and size of the heads of the attention around, or heads of about 64 that fill the model's width."""
    width = known.get("hidden_size", 0)
    num_heads = known.get("num_heads", max(1, width // 64))
    return num_heads, known.get("head_dim", max(2, width // num_heads // 2 * 2))


class Piece(Component):
    """Config of a part of a layer."""

    @property
    def needs_rng(self) -> bool:
        """True where training draws random numbers in it (dropout, jitter)."""
        return getattr(self, "dropout", 0.0) > 0


class MixerModule(nnx.Module):
    """Mixes information along the sequence: attention, or a recurrence."""

    def __call__(
        self, x: jax.Array, *, positions: jax.Array, ctx: ForwardContext, cache: PyTree = None
    ) -> tuple[Any, ...]:
        """Map [B, T, D] to ([B, T, D], cache); with a cache, the inputs go to the places `ctx.mask.query_places` in it.

        A mixer may return auxiliary arrays as a third value, as a feed-forward does.
        """
        raise NotImplementedError

    def init_cache(self, batch: int, length: int, dtype: DTypeLike) -> PyTree:
        """Return an empty cache: any pytree of arrays with a leading batch dimension."""
        raise NotImplementedError

    def init_window(self, batch: int, length: int, dtype: DTypeLike, room: int) -> PyTree:
        """Return an empty cache that may keep only the entries that later tokens attend to, of 1 to `room` at once."""
        return self.init_cache(batch, length, dtype)


class Mixer(Piece):
    """Config of a mixer. `has_scores` is False where it has heads, and no scores that a bias could be added to."""

    has_scores: ClassVar[bool] = True

    def build(self, width: int, *, rngs: nnx.Rngs) -> MixerModule:
        """Return the module for inputs of this width."""
        raise NotImplementedError

    def score_flops(self, num_keys: float) -> float:
        """Return the FLOPs of one token's forward pass beyond its parameters' products, with this number of keys."""
        return 0.0


class FeedForwardModule(nnx.Module):
    """Acts on every position alone."""

    def __call__(self, x: jax.Array, *, ctx: ForwardContext) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Map [B, T, D] to ([B, T, D], auxiliary arrays by name; {} where there are none).

        `loss.NAME` is a scalar that training adds to the mean cross-entropy, weighted already; a mean over the rows, so
        that parts of a batch add up. `product.NAME` has two vectors [2, E]: the loss of that name is the dot product of
        their means over the layers of a stack. `statistic.NAME` is what the module's `buffer` NAME is updated with.
        Others are metrics: scalars or vectors, whose mean over the layers is logged.
        """
        raise NotImplementedError


class FeedForward(Piece):
    """Config of a feed-forward."""

    @classmethod
    def follow(cls, known: Known) -> dict[str, Any]:
        activation = getattr(known.old, "activation", "silu")  # a constant of SwiGLU
        return {"intermediate_size": 4 * known.get("hidden_size", 1), "activation": activation, "bias": False}

    def build(self, width: int, *, rngs: nnx.Rngs) -> FeedForwardModule:
        """Return the module for inputs of this width."""
        raise NotImplementedError

    def idle_parameters(self, width: int) -> int:
        """Return the number of matrix parameters that one token is not multiplied with: experts not chosen."""
        return 0
