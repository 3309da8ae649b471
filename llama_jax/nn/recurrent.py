"""Models of text from before attention: recurrent networks, and the feed-forward n-gram model.

Each is a mixer whose cache has a fixed size, however long the text: a state, or the last few inputs.

The recurrences are Flax's cells, made of two linear maps. The map of the inputs is one product for all positions. The
map of the state runs on each device for its rows (`shard_map`): the gradient of its weight is summed over the devices
once, where the compiler would sum it at every position of the sequence.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import zeros
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llama_jax.config import Known, UserError
from llama_jax.nn.attention import context
from llama_jax.nn.base import ForwardContext, Mixer, MixerModule, PyTree, check_at_least
from llama_jax.nn.parameters import Projection, child
from llama_jax.parallel import axes_of, mesh_axis_sizes, shard

State = PyTree  # arrays [B, H], float32: what a cell of Flax carries


class Recurrent(Mixer):
    """Config of a recurrent network that runs from the first token to the last, with a `cell` of Flax.

    The state begins at 0. The result is the state, [B, T, state_size]; a projection maps it to the model's width where
    that differs.
    """

    state_size: int
    cell: ClassVar[Callable[..., Any]]
    num_gates: ClassVar[int]

    @classmethod
    def follow(cls, known: Known) -> dict[str, Any]:
        return {"state_size": known.get("hidden_size")}

    def __post_init__(self) -> None:
        check_at_least(self, 1, "state_size")

    def build(self, width: int, *, rngs: nnx.Rngs) -> "RecurrentModule":
        return RecurrentModule(self, width, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class ElmanRNN(Recurrent):
    """h' = tanh(W x + U h + b) (Elman 1990; as a language model Mikolov et al. 2010).

    state_size: numbers in the state.
    """

    state_size: int

    cell = nnx.SimpleCell
    num_gates = 1


@dataclasses.dataclass(frozen=True)
class LSTM(Recurrent):
    """Long short-term memory with a forget gate, without peepholes (Hochreiter and Schmidhuber 1997, Gers et al. 2000).

    i, f, g, o = W x + U h + b; c' = sigmoid(f) c + sigmoid(i) tanh(g); h' = sigmoid(o) tanh(c').

    state_size: numbers in the state h; the memory c has as many.
    """

    state_size: int

    cell = nnx.OptimizedLSTMCell
    num_gates = 4


@dataclasses.dataclass(frozen=True)
class GRU(Recurrent):
    """Gated recurrent unit (Cho et al. 2014) with the reset gate after the product, which has no bias.

    r, z = sigmoid(W x + U h + b); n = tanh(W x + b + r (U h)); h' = (1 - z) n + z h.

    state_size: numbers in the state.
    """

    state_size: int

    cell = nnx.GRUCell
    num_gates = 3


@dataclasses.dataclass(frozen=True)
class BidirectionalRNN(Mixer):
    """One recurrent network from the left and one from the right, for encoders (Schuster and Paliwal 1997).

    The result is both states, concatenated; a projection maps it to the model's width where that is not twice the
    state's size.

    network: kind and size of each of the two.
    """

    network: Recurrent

    @classmethod
    def follow(cls, known: Known) -> dict[str, Any]:
        return {"network": known.old if isinstance(known.old, Recurrent) else known.make(LSTM)}

    def build(self, width: int, *, rngs: nnx.Rngs) -> "BidirectionalRNNModule":
        return BidirectionalRNNModule(self, width, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class NGram(Mixer):
    """The feed-forward n-gram model: down(tanh(up([x_t, x_{t-1}, ..., x_{t-n+2}]))) (Bengio et al. 2003, eq. 1).

    Inputs before a document's first are zero. The original maps the hidden layer to the vocabulary; so does this where
    `hidden_size` is the model's width, which leaves out `down`.

    order: the n of n-gram: a token is predicted from the n - 1 before it.
    hidden_size: width of the hidden layer.
    """

    order: int
    hidden_size: int

    def __post_init__(self) -> None:
        check_at_least(self, 2, "order", hint=": a token predicted from the one before it")
        check_at_least(self, 1, "hidden_size")

    def build(self, width: int, *, rngs: nnx.Rngs) -> "NGramModule":
        return NGramModule(self, width, rngs=rngs)


class _Cell(nnx.Module):
    """A cell's parameters, and its run over a sequence."""

    def __init__(self, config: Recurrent, width: int, *, rngs: nnx.Rngs):
        self.config = config
        gates = {"_gates": config.num_gates * config.state_size}
        self.input_proj = Projection({"embed": width}, gates, bias=True, rngs=child(rngs, "input_proj"))
        self.state_proj = Projection({"_state": config.state_size}, gates, bias=False, rngs=child(rngs, "state_proj"))

    def first_state(self, batch: int) -> State:
        state = _flax_cell(self.config, None).initialize_carry((batch, 1), nnx.Rngs(0))
        return jax.tree.map(lambda x: shard(jnp.broadcast_to(x, (batch, self.config.state_size)), "batch", None), state)

    def __call__(
        self, x: Float[Array, "b t d"], ctx: ForwardContext, state: State, *, reverse: bool = False
    ) -> tuple[Float[Array, "b t h"], State]:
        """Return the states at all positions, in the dtype of x, and the last one.

        The state begins at 0 in each document, and stays as it is at padding.
        """
        inputs = shard(self.input_proj(x), "batch", None, None)
        weight = self.state_proj.matrix(jnp.dtype("float32"))
        flags = jax.tree.map(lambda x: shard(x, "batch", None), (begins(ctx, reverse=reverse), ctx.is_token))
        rows = axes_of(inputs)[0] if mesh_axis_sizes() else ()

        def local(inputs: jax.Array, weight: jax.Array, flags: PyTree, state: State) -> tuple[jax.Array, State]:
            # Marked as varying, so that the weight's gradient is summed over the devices after the loop and not in it.
            cell = _flax_cell(self.config, jax.lax.pcast(weight, rows, to="varying") if rows else weight)

            def step(state: State, at: PyTree) -> tuple[State, jax.Array]:
                x, (begins, is_token) = at
                if begins is not None:
                    state = _choose(begins, jax.tree.map(jnp.zeros_like, state), state)
                new, y = cell(state, x)
                return (new if is_token is None else _choose(is_token, new, state)), y

            by_position = jax.tree.map(lambda x: x.swapaxes(0, 1), (inputs, flags))
            state, y = jax.lax.scan(step, state, by_position, reverse=reverse)
            return y.swapaxes(0, 1), state

        # On each device by itself: the loop over positions then has no communication at all.
        run = local if not mesh_axis_sizes() else jax.shard_map(local, out_specs=jax.P(rows or None))
        y, state = run(inputs, weight, flags, state)
        return y.astype(x.dtype), state


class RecurrentModule(MixerModule):
    """A recurrent network; its cache is the cell's state."""

    def __init__(self, config: Recurrent, width: int, *, rngs: nnx.Rngs):
        self.config = config
        self.cell = _Cell(config, width, rngs=child(rngs, "cell"))
        self.o_proj = _projection_to(width, {"_state": config.state_size}, bias=False, rngs=child(rngs, "o_proj"))

    def __call__(
        self, x: Float[Array, "b t d"], *, positions: Int[Array, "b t"], ctx: ForwardContext, cache: State = None
    ) -> tuple[Float[Array, "b t d"], State]:
        check_recurrence(self.config, ctx, x.shape[1], causal=True)
        y, state = self.cell(x, ctx, self.cell.first_state(x.shape[0]) if cache is None else cache)
        return _projected(y, self.o_proj), None if cache is None else state

    def init_cache(self, batch: int, length: int, dtype: DTypeLike) -> State:
        return self.cell.first_state(batch)


class BidirectionalRNNModule(MixerModule):
    """Two recurrent networks, without a cache."""

    def __init__(self, config: BidirectionalRNN, width: int, *, rngs: nnx.Rngs):
        self.config = config
        self.left = _Cell(config.network, width, rngs=child(rngs, "left"))
        self.right = _Cell(config.network, width, rngs=child(rngs, "right"))
        states = {"_states": 2 * config.network.state_size}
        self.o_proj = _projection_to(width, states, bias=False, rngs=child(rngs, "o_proj"))

    def __call__(
        self, x: Float[Array, "b t d"], *, positions: Int[Array, "b t"], ctx: ForwardContext, cache: PyTree = None
    ) -> tuple[Float[Array, "b t d"], PyTree]:
        check_recurrence(self.config, ctx, x.shape[1], causal=False)
        state = self.left.first_state(x.shape[0])
        from_left, _ = self.left(x, ctx, state)
        from_right, _ = self.right(x, ctx, state, reverse=True)
        return _projected(jnp.concatenate([from_left, from_right], axis=-1), self.o_proj), cache

    def init_cache(self, batch: int, length: int, dtype: DTypeLike) -> Any:
        raise UserError(
            "attention=BidirectionalRNN reads a text from both ends and cannot continue it: take LSTM, GRU or ElmanRNN"
        )


class NGramModule(MixerModule):
    """The n-gram model; its cache is the last n - 2 inputs, [B, n - 2, D]."""

    def __init__(self, config: NGram, width: int, *, rngs: nnx.Rngs):
        self.config = config
        inputs, hidden = {"embed": width, "_inputs": config.order - 1}, {"mlp": config.hidden_size}
        self.up_proj = Projection(inputs, hidden, bias=True, rngs=child(rngs, "up_proj"))
        self.down_proj = _projection_to(width, hidden, bias=True, rngs=child(rngs, "down_proj"))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        positions: Int[Array, "b t"],
        ctx: ForwardContext,
        cache: Float[Array, "b s d"] | None = None,
    ) -> tuple[Float[Array, "b t d"], PyTree]:
        check_recurrence(self.config, ctx, x.shape[1], causal=True)
        window, cache = past_inputs(x, (None,), self.config.order - 1, ctx, cache)
        # [B, T, D, n - 1]: the projection contracts width and distance at once.
        hidden = jnp.tanh(self.up_proj(jnp.stack(window, axis=-1)))
        return _projected(hidden, self.down_proj), cache

    def init_cache(self, batch: int, length: int, dtype: DTypeLike) -> Float[Array, "b s d"]:
        width = self.up_proj.in_shape[0]
        return shard(jnp.zeros((batch, self.config.order - 2, width), dtype), "batch", None, None)


def _flax_cell(config: Recurrent, weight: jax.Array | None) -> Any:
    """Return Flax's cell for inputs that are projected already, and a state that is projected with `weight`."""
    cell = config.cell(1, 1, kernel_init=zeros, recurrent_kernel_init=zeros, rngs=nnx.Rngs(0))
    cell.dense_i, cell.dense_h = (lambda x: x), (lambda h: h @ weight)
    return cell


def _projection_to(width: int, dims: dict[str, int], *, bias: bool, rngs: nnx.Rngs) -> Projection | None:
    """Return a projection to the model's width, or None where it has this width already."""
    return None if sum(dims.values()) == width else Projection(dims, {"embed": width}, bias=bias, rngs=rngs)


def _projected(y: jax.Array, projection: Projection | None) -> jax.Array:
    return shard(y, "batch", "sequence", None) if projection is None else projection(y)


def _choose(condition: Bool[Array, " b"], yes: State, no: State) -> State:
    return jax.tree.map(lambda a, b: jnp.where(condition[:, None], a, b), yes, no)


def past_inputs(
    x: Float[Array, "b t *dims"],
    axes: tuple[str | None, ...],
    count: int,
    ctx: ForwardContext,
    cache: Float[Array, "b s *dims"] | None,
) -> tuple[list[Float[Array, "b t *dims"]], Float[Array, "b s *dims"] | None]:
    """Return the inputs 0, 1, ... `count` - 1 places back, zero before a document's first, and the cache after them.

    The cache has the last `count` - 1 inputs before x. `axes` are the logical axes of the dimensions after the first
    two, of which the second is not split.
    """
    batch, length, *dims = x.shape
    num_before = count - 1
    before = jnp.zeros((batch, num_before, *dims), x.dtype) if cache is None else cache.astype(x.dtype)
    inputs = jnp.concatenate([shard(values, "batch", None, *axes) for values in (before, x)], axis=1)

    def back(values: jax.Array, distance: int) -> jax.Array:
        return jax.lax.slice_in_dim(values, num_before - distance, num_before - distance + length, axis=1)

    window = [back(inputs, distance) for distance in range(count)]
    if (segments := ctx.mask.segment_ids) is not None:
        segments = shard(segments, "batch", None)
        # -1, which is no segment id: inputs before the row belong to none of its documents.
        padded = jnp.pad(segments, ((0, 0), (num_before, 0)), constant_values=-1)
        same = [
            (back(padded, distance) == segments).reshape(batch, length, *(1,) * len(dims)) for distance in range(count)
        ]
        window = [jnp.where(seen, values, 0) for seen, values in zip(same, window, strict=True)]
    if cache is None:
        return window, None
    # The last inputs before the end of each row, after which there is padding.
    ends = jnp.full(batch, length) if ctx.is_token is None else ctx.is_token.sum(-1)
    last = jax.vmap(lambda row, end: jax.lax.dynamic_slice_in_dim(row, end, num_before))
    return window, last(inputs, shard(ends, "batch")).astype(cache.dtype)


def begins(ctx: ForwardContext, *, reverse: bool) -> Bool[Array, "b t"] | None:
    """Return where a document begins in reading order; `reverse` reads from the right."""
    segment_ids = ctx.mask.segment_ids
    if segment_ids is None:
        return None
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changes, ((0, 0), (0, 1) if reverse else (1, 0)))


def check_recurrence(config: Mixer, ctx: ForwardContext, length: int, *, causal: bool) -> None:
    """Raise UserError for what a recurrence cannot do."""
    mask = ctx.mask
    name = f"attention={type(config).__name__}"
    if mask.causal and not causal:
        raise UserError(f"{name} sees what comes later, in a model that must not: take LSTM, GRU or ElmanRNN")
    if not mask.causal and causal:
        raise UserError(f"{name} never sees what comes later, and this model should: take BidirectionalRNN")
    asked = {
        "a prefix that is seen whole": mask.prefix is not None,
        "relative positions (position_bias)": ctx.position_bias is not None,
        "a window": mask.window is not None,
        "a sequence split over mesh.context": mask.query_places is None and context.splits(length),
    }
    for what, is_asked in asked.items():
        if is_asked:
            raise UserError(f"{name} cannot do {what}: choose an attention, or leave it out")
