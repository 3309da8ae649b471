"""Check each piece of a model before the first step: its results, that it sees no later token, and its cache."""

import dataclasses
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_jax.config import UserError
from llama_jax.models import Compute, ModelConfig
from llama_jax.nn import FeedForward, ForwardContext, Mask, Mixer, Positions, unzigzag, zigzag
from llama_jax.parallel import batch_parts, mesh_axis_sizes, platform, replicate, shard
from llama_jax.training.step import Batch, model_batch

# Tokens of a row in the check, where rows of the run have more, and rows.
LENGTH, ROWS = 64, 16
# Kinds of rows: those below LATER, and two more.
LATER, DOCUMENT, ROW = 2, 2, 3
# Largest relative difference that rounding explains: a mixer may go through an FFT, and keep a bfloat16 cache.
LEAK, DECODING = 1e-4, 2e-2
TURN_OFF = "mend it, or turn the check off with compute.preflight=false"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a model: `key` is its key in the config, `causal` whether it must hide later tokens.

    bias: config of the bias of its attention scores, or None.
    """

    key: str
    config: Any
    causal: bool
    bias: Any = None

    @property
    def name(self) -> str:
        """The piece as a message names it."""
        return f"{self.key}={type(self.config).__name__}"

    @property
    def is_new(self) -> bool:
        """True where the class is from outside of the package."""
        return not type(self.config).__module__.startswith("llama_jax.")

    @property
    def decodes(self) -> bool:
        """True where a cache is to be checked: the package's own are, by its tests."""
        return isinstance(self.config, Mixer) and self.causal and self.is_new

    def context(self, mask: Mask, length: int, **fields: Any) -> ForwardContext:
        """Return the context of a call with this mask on `length` keys."""
        places = jnp.arange(length)
        queries = places[None] if mask.query_places is None else mask.query_places
        bias = None if self.bias is None else self.bias.build(rngs=_rngs())(queries, places)
        return ForwardContext(mask, position_bias=bias, **fields)

    def call(self, module: Any, x: jax.Array, positions: jax.Array, ctx: ForwardContext, cache: Any = None) -> Any:
        """Return everything that the module returns for activations [B, T, D]."""
        if isinstance(self.config, Mixer):
            return module(x, positions=positions, ctx=ctx, cache=cache)
        if isinstance(self.config, Positions):
            return module(positions, x.dtype)
        return module(x, ctx=ctx) if isinstance(self.config, FeedForward) else module(x)

    def result(self, module: Any, x: jax.Array, positions: jax.Array, ctx: ForwardContext) -> jax.Array:
        """Return the activations that the module returns. Raises UserError where it returns something else."""
        found = self.call(module, x, positions, ctx)
        if isinstance(self.config, Mixer | FeedForward):
            wanted = "(result, cache)" if isinstance(self.config, Mixer) else "(result, auxiliary arrays by name)"
            sizes = (2, 3) if isinstance(self.config, Mixer) else (2,)
            if not isinstance(found, tuple) or len(found) not in sizes:
                what = f"a tuple of {len(found)}" if isinstance(found, tuple) else f"a {type(found).__name__}"
                raise UserError(f"{self.name} returns {what}: its module must return {wanted}")
            if (isinstance(self.config, FeedForward) or len(found) == 3) and not isinstance(found[-1], dict):
                raise UserError(f"{self.name} returns auxiliary arrays as a {type(found[-1]).__name__}: use a dict")
            found = found[0]
        if (shape := getattr(found, "shape", None)) != x.shape or found.dtype != x.dtype:
            is_array = f"{shape} {getattr(found, 'dtype', '')}" if shape is not None else f"a {type(found).__name__}"
            raise UserError(f"{self.name} returns {is_array} for {x.shape} {x.dtype}: it must keep shape and type")
        return found


def check_pieces(config: ModelConfig, compute: Compute, batch: Batch, *, samples: bool = False) -> list[str]:
    """Check each mixer, feed-forward, norm and table of positions of the model on the current mesh, each kind once.

    Returns lines for the log.

    Results must have the shape and type of the inputs of `batch`. In a decoder no result may depend on later tokens, by
    its gradient and by its value when they change (each alone misses some: a choice has no gradient, and a change may
    be lost in rounding); in no model on other rows. A mixer's cache must decode what the whole sequence gives; one
    without `init_cache` is for runs without `samples`. Raises UserError.
    """
    inputs = jax.eval_shape(lambda batch: model_batch(batch, config), batch)
    shape = inputs["tokens"].shape
    lengths = {piece: _abstract_check(piece, config, compute, shape, samples=samples) for piece in _pieces(config)}
    # The package's own feed-forwards and norms act on each token alone: its tests hold that.
    checked = {piece: n for piece, n in lengths.items() if n > 1 and (isinstance(piece.config, Mixer) or piece.is_new)}
    drawn = {length: _Drawn.of(length, "prefix" in inputs) for length in set(checked.values())}

    def run() -> list[dict[str, jax.Array]]:
        return [_measured(piece, config, drawn[length]) for piece, length in checked.items()]

    options = {"xla_backend_optimization_level": 0} if platform() == "cpu" else None  # it runs once
    with jax.default_matmul_precision("highest"):
        found = jax.device_get(jax.jit(run, compiler_options=options)())
    return [line for piece, errors in zip(checked, found, strict=True) for line in _judged(piece, errors)]


def _pieces(config: ModelConfig) -> list[Piece]:
    """Return the different pieces of the model."""
    found: dict[Piece, None] = {}
    for stack, layers in config.stacks().items():
        side = "encoder_" if stack.startswith("encoder_") else ""
        causal, bias = config.generates and not side, getattr(config, f"{side}position_bias", None)
        for mixer, feed_forward in layers:
            found[Piece("attention", mixer, causal, bias)] = None
            if feed_forward is not None:
                found[Piece("feed_forward", feed_forward, causal)] = None
        for key in ("norm", "embedding_norm", "positions"):
            if (part := getattr(config, key, None)) is not None:
                found[Piece(key, part, causal)] = None
    return list(found)


def _rngs() -> nnx.Rngs:
    # Bits of the platform's own generator: those of threefry take a second to compile for each shape.
    return nnx.Rngs(params=jax.random.key(0, impl="unsafe_rbg"))


def _module(piece: Piece, width: int) -> Any:
    """Return the module with first values, none of them 0: what is multiplied with a 0 would hide its dependences."""
    graphdef, state = nnx.split(piece.config.build(width, rngs=_rngs()))
    moved = jax.tree.map(lambda x: x + 0.02 if jnp.issubdtype(x.dtype, jnp.floating) else x, state)
    return nnx.merge(graphdef, moved)


def _abstract_check(
    piece: Piece, config: ModelConfig, compute: Compute, shape: tuple[int, ...], *, samples: bool
) -> int:
    """Check shapes and types, and return the length for the other checks; nothing is computed."""
    dtype, width = compute.jax_dtype, config.hidden_size
    kernels = {"kernel": compute.attention_kernel, "context_strategy": compute.context}

    def whole(rows: int, length: int) -> None:
        x = shard(jnp.zeros((rows, length, width), dtype), "batch", "sequence", None)
        ones = shard(jnp.ones((rows, length), jnp.int32), "batch", "sequence")
        ctx = piece.context(Mask(causal=piece.causal, segment_ids=ones), length, is_token=ones > 0, **kernels)
        piece.result(_module(piece, width), x, ones, ctx)

    def cached() -> None:
        rows, length = shape[0], min(shape[1], 4)
        module = _module(piece, width)
        cache = module.init_cache(rows, 2 * length, dtype)
        if any(getattr(x, "shape", ())[:1] != (rows,) for x in jax.tree.leaves(cache)):
            raise UserError(f"{piece.name} has an init_cache with arrays whose first dimension is not the batch")
        x = shard(jnp.zeros((rows, length, width), dtype), "batch", None, None)
        places = shard(jnp.zeros((rows, length), jnp.int32), "batch", None)
        ctx = piece.context(Mask(query_places=places), 2 * length, is_token=places == 0)
        new = piece.call(module, x, places, ctx, cache)[1]
        old, new = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (cache, new))
        if old != new:
            raise UserError(f"{piece.name} returns another cache than init_cache makes: {new}, not {old}")

    _attempt(piece, f"on activations {[*shape, width]}", lambda: jax.eval_shape(lambda: whole(*shape)))
    if piece.decodes:
        try:
            _attempt(piece, "with the cache that init_cache makes", lambda: jax.eval_shape(cached))
        except _NoCache as error:
            if samples:
                raise UserError(
                    f"{piece.name} has no init_cache, which the samples at the end of the run need: define it, or set "
                    "logging.sample_prompts to none"
                ) from error
    parts = 2 * mesh_axis_sizes().get("context", 1)
    short = min(shape[1], LENGTH // parts * parts or parts)
    if short == shape[1]:
        return short
    try:
        jax.eval_shape(lambda: whole(_rows(), short))
    except Exception:  # a mixer of chunks, say, takes multiples of their length: rows of the run are tried above
        return shape[1]
    return short


class _NoCache(Exception):
    """A mixer has no cache."""


def _attempt(piece: Piece, how: str, function: Callable[[], Any]) -> None:
    """Call `function`; raise UserError with the class, the error and its place in the user's file where it fails."""
    try:
        function()
    except (UserError, _NoCache):
        raise
    except NotImplementedError as error:
        if "cache" in how:
            raise _NoCache from error
        raise UserError(f"{piece.name} does not define all methods of its class: {error}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = [frame for frame in frames if "site-packages" not in frame.filename][-1]
        message = str(error).split("\n")[0]
        raise UserError(
            f"{piece.name} fails {how}: {type(error).__name__}: {message} ({place.filename}, line {place.lineno})"
        ) from error


def _rows() -> int:
    """Return the number of rows of the check: those that the mesh splits."""
    sizes = mesh_axis_sizes()
    parts = batch_parts(sizes) if sizes else 1
    return parts * -(-ROWS // parts)


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """Rows of the check: two documents each, and padding at the end of every fourth.

    changed: bool [B, T], tokens that others must not depend on. By turns in four rows: those from a random place on,
    twice; those of the first document; all.
    """

    segments: np.ndarray
    positions: np.ndarray
    prefix: np.ndarray | None
    changed: np.ndarray

    @classmethod
    def of(cls, length: int, has_prefix: bool) -> "_Drawn":
        """Return rows of this length."""
        rng, place, rows = np.random.default_rng(0), np.arange(length), _rows()
        kind, ends = np.arange(rows)[:, None] % 4, rng.integers(1, length, (rows, 1))
        segments = np.where((kind == 0) & (place >= length - length // 8), 0, 1 + (place >= ends))
        cuts = np.resize(1 + rng.permutation(length - 1), (rows, 1))
        changed = np.where(kind < LATER, place >= cuts, (kind == ROW) | (place < ends))
        positions = np.where(place < ends, place, place - ends)
        prefix = (positions < 2).astype(np.int32) if has_prefix else None
        return cls(segments.astype(np.int32), positions.astype(np.int32), prefix, changed)

    def observed(self, causal: bool) -> np.ndarray:
        """Return the tokens, bool [B, T], that see none of those that change."""
        same = self.segments[:, :, None] == self.segments[:, None]
        seen = np.tri(same.shape[1], dtype=bool) | (not causal)
        seen = same & (seen if self.prefix is None else seen | (self.prefix[:, None] > 0))
        return ~(seen & self.changed[:, None]).any(-1) & (self.segments > 0)


def _measured(piece: Piece, config: ModelConfig, drawn: _Drawn) -> dict[str, jax.Array]:
    """Return how far results depend on what they must not see, relative to the size of all.

    `moved` and `reached` are [B, T], the change of each result that must stay, and the gradient of each changed input
    by those; `decoded` is the largest difference of results with a cache.
    """
    module, (rows, length) = _module(piece, config.hidden_size), drawn.segments.shape
    key = jax.random.key(1, impl="unsafe_rbg")
    fields = drawn.segments, drawn.positions, drawn.prefix
    segments, positions, prefix = jax.tree.map(lambda x: zigzag(shard(jnp.asarray(x), "batch", "sequence")), fields)
    mask = Mask(piece.causal, segment_ids=segments, prefix=prefix)
    ctx = piece.context(mask, length, is_token=segments > 0, kernel="reference")
    drawn_values = jax.random.normal(key, (3, rows, length, config.hidden_size))
    # With the barrier each number is computed once: XLA would compute it again where it is used, and round differently.
    x, other, direction = jax.lax.optimization_barrier(
        tuple(shard(values, "batch", "sequence", None) for values in drawn_values)
    )
    changed, observed = drawn.changed[..., None], drawn.observed(piece.causal)[..., None]
    result = lambda x: unzigzag(piece.result(module, zigzag(x), positions, ctx))  # noqa: E731
    y, pull = jax.vjp(result, x)
    (gradient,) = pull(jnp.where(observed, direction, 0))
    difference = result(jnp.where(changed, other, x)) - y
    found: dict[str, jax.Array | None] = {
        "moved": _relative(jnp.where(observed, difference, 0), y),
        "reached": _relative(jnp.where(changed, gradient, 0), gradient),
        "finite": jnp.isfinite(jnp.where(drawn.segments[..., None] > 0, y + gradient, 0)).all(),
    }
    if piece.decodes and length >= 4:
        found["decoded"] = _decoded(piece, module, shard(x, "batch", None, None))
    return {name: replicate(x) for name, x in found.items() if x is not None}


def _relative(difference: jax.Array, whole: jax.Array) -> jax.Array:
    """Return the largest difference of each token, relative to the size of `whole`."""
    size, largest = jnp.sqrt(jnp.mean(whole**2)), jnp.abs(difference).max(-1)
    return jnp.where(largest > 0, largest / size, largest)


def _decoded(piece: Piece, module: Any, x: jax.Array) -> jax.Array | None:
    """Return the largest difference between results with a cache and without, or None where there is no cache.

    Rows have prompts of two lengths, and then one more token.
    """
    rows, length, _ = x.shape
    try:
        cache = module.init_cache(rows, length + 1, x.dtype)
    except (NotImplementedError, AttributeError):  # `_abstract_check` has refused this where samples need a cache
        return None
    place, lengths = jnp.arange(length), length - 1 - jnp.arange(rows) % 2
    lengths = shard(lengths, "batch")
    places = shard(jnp.broadcast_to(place, (rows, length)), "batch", None)
    split = lambda x: zigzag(shard(x, "batch", "sequence", *(None,) * (x.ndim - 2)))  # noqa: E731
    ctx = piece.context(Mask(), length, kernel="reference")
    whole = shard(unzigzag(piece.result(module, split(x), split(places), ctx)), "batch", None, None)
    errors = []
    for at in (places[:, : length - 1], lengths[:, None]):  # the prompts, then the token after each
        here = (at[..., None] == place)[..., None]
        inputs, wanted = (jnp.where(here, z[:, None], 0).sum(2) for z in (x, whole))
        is_token = at < lengths[:, None] if not errors else None
        ctx = piece.context(Mask(query_places=at), length + 1, is_token=is_token, kernel="reference")
        y, cache, *_ = piece.call(module, inputs, at, ctx, cache)
        difference = shard(y, "batch", None, None) - wanted
        errors.append(
            _relative(difference if is_token is None else jnp.where(is_token[..., None], difference, 0), whole)
        )
    return jnp.maximum(errors[0].max(), errors[1].max())


def _judged(piece: Piece, found: dict[str, np.ndarray]) -> list[str]:
    """Return lines for the log about a piece. Raises UserError where it depends on what it must not see."""
    if not found["finite"]:
        raise UserError(f"{piece.name} returns NaN or infinity, or such gradients, for random activations: {TURN_OFF}")
    moved, reached = (~(found[name] <= LEAK) for name in ("moved", "reached"))
    if isinstance(piece.config, FeedForward):
        moved[:] = False  # experts with a capacity drop a token for the choices of others: known, and no gradient
    kind = np.arange(len(moved)) % 4
    if reached[kind == ROW].any():
        raise UserError(f"{piece.name} lets a token see other rows of the batch: {TURN_OFF}")
    other_document = (moved | reached)[kind == DOCUMENT].any()
    if (later := (moved | reached)[kind < LATER]).any() and piece.causal:
        _, place = np.argwhere(later)[0]
        raise UserError(
            f"{piece.name} lets a token see later tokens of its row, as a model that predicts them must not (seen at "
            f"position {place} of {moved.shape[1]}): {TURN_OFF}"
        )
    if not found.get("decoded", 0) <= DECODING:
        raise UserError(
            f"{piece.name} decodes with its init_cache what it does not give for the whole sequence (relative "
            f"difference {found['decoded']:.2g}), so that samples would be wrong: {TURN_OFF}"
        )
    if other_document or later.any():
        return [f"{piece.name} lets a token see other documents of its row: ctx.mask.segment_ids tells them apart"]
    return []
