"""Mamba-2 (arXiv 2405.21060): a recurrence of matrices whose decay, input and output depend on the token.

For each head S' = exp(dt A) S + dt x B and y = C S' + D x, with a state S of head_dim x state_size float32 numbers. The
text is read in chunks: inside of one the recurrence is written as products of matrices, as linear attention with a
decay is, and only the state goes from one to the next (section 6). A chunk of one token is the recurrence itself.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llama_jax.config import Known, UserError
from llama_jax.nn.base import ForwardContext, Mixer, MixerModule, PyTree, check_above_zero, check_at_least
from llama_jax.nn.parameters import Projection, cast_and_gather, child, parameter
from llama_jax.nn.recurrent import begins, check_recurrence, past_inputs
from llama_jax.parallel import axes_of, mesh_axis_sizes, shard, spec

# Of a chunk's products, which grow with its length, and the number of steps, which falls with it.
CHUNK = 64
# Of first values, as in the code of the paper: -A is between these, and dt between these, even in the logarithm.
_FIRST_A, _FIRST_DT = (1.0, 16.0), (1e-3, 0.1)


@dataclasses.dataclass(frozen=True)
class Mamba2(Mixer):
    """Mamba-2: projections, a causal convolution of a few tokens, the recurrence, a gated RMSNorm, a projection.

    num_heads: heads, each with its own decay; with `head_dim` they are usually twice as wide as the model.
    head_dim: numbers of a head.
    state_size: numbers that the state keeps for each of a head's.
    num_groups: groups of heads that share B and C, and a mean square of the norm.
    conv_kernel: tokens that the convolution sees, the own one included.
    conv_bias: add a bias in the convolution.
    bias: add a bias in the projections.
    eps: added to the mean square of the gated norm.
    min_step: least dt.
    max_step: largest dt, or none.
    """

    num_heads: int
    head_dim: int
    state_size: int = 128
    num_groups: int = 1
    conv_kernel: int = 4
    conv_bias: bool = True
    bias: bool = False
    eps: float = 1e-5
    min_step: float = 0.0
    max_step: float | None = None

    has_scores = False

    @classmethod
    def follow(cls, known: Known) -> dict[str, Any]:
        inner = 2 * known.get("hidden_size", 32)
        head_dim = math.gcd(inner, 64)
        return {"num_heads": inner // head_dim, "head_dim": head_dim}

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_heads", "head_dim", "state_size", "num_groups", "conv_kernel")
        check_at_least(self, 0, "min_step")
        check_above_zero(self, "eps", "max_step")
        if self.num_heads % self.num_groups:
            raise UserError(f"num_groups={self.num_groups} must divide num_heads={self.num_heads}")
        if self.max_step is not None and self.max_step < self.min_step:
            raise UserError(f"max_step={self.max_step} must be at least min_step={self.min_step}")

    def build(self, width: int, *, rngs: nnx.Rngs) -> "Mamba2Module":
        return Mamba2Module(self, width, rngs=rngs)

    def score_flops(self, num_keys: float) -> float:
        """Return the FLOPs of one token's recurrence, 5 for each number of the state, however long the text."""
        return 5.0 * self.num_heads * self.head_dim * self.state_size


class _Convolution(nnx.Module):
    """silu of a sum over the last tokens, of each number by itself, with a bias if asked for."""

    def __init__(self, dims: dict[str, int], config: Mamba2, *, rngs: nnx.Rngs):
        self.shape, self.axes = tuple(dims.values()), tuple(None if name[0] == "_" else name for name in dims)
        size = config.conv_kernel
        self.weight = parameter(rngs, "weight", (*self.shape, size), (*self.axes, None), std=size**-0.5)
        self.bias = parameter(rngs, "bias", self.shape, self.axes, std=0.0) if config.conv_bias else None

    def __call__(
        self, x: Float[Array, "b t *dims"], ctx: ForwardContext, cache: Float[Array, "b s *dims"] | None
    ) -> tuple[Float[Array, "b t *dims"], Float[Array, "b s *dims"] | None]:
        """Return the result and the cache, the last inputs."""
        weight = cast_and_gather(self.weight, x.dtype)
        window, cache = past_inputs(x, self.axes, weight.shape[-1], ctx, cache)
        # The last of the kernel is the token's own.
        y = sum(weight[..., -1 - back] * values for back, values in enumerate(window))
        return jax.nn.silu(y if self.bias is None else y + cast_and_gather(self.bias, x.dtype)), cache


class Mamba2Module(MixerModule):
    """Mamba-2; its cache is the state [B, N, H, S], float32, and the last inputs of the convolutions.

    What releases have as one tensor are several, so that heads can be split over devices: gate (z), x, B, C and dt.
    """

    def __init__(self, config: Mamba2, width: int, *, rngs: nnx.Rngs):
        self.config = config
        heads = {"heads": config.num_heads, "_head_dim": config.head_dim}
        groups = {"_groups": config.num_groups, "_state": config.state_size}

        def projection(name: str, dims: dict[str, int]) -> Projection:
            return Projection({"embed": width}, dims, bias=config.bias, rngs=child(rngs, name))

        self.z_proj, self.x_proj = projection("z_proj", heads), projection("x_proj", heads)
        self.b_proj, self.c_proj = projection("b_proj", groups), projection("c_proj", groups)
        self.dt_proj = projection("dt_proj", {"heads": config.num_heads})
        self.x_conv = _Convolution(heads, config, rngs=child(rngs, "x_conv"))
        self.b_conv = _Convolution(groups, config, rngs=child(rngs, "b_conv"))
        self.c_conv = _Convolution(groups, config, rngs=child(rngs, "c_conv"))
        self.a_log = _first_values(rngs, "a_log", config.num_heads)
        self.dt_bias = _first_values(rngs, "dt_bias", config.num_heads)
        self.skip = parameter(rngs, "skip", (config.num_heads,), ("heads",), std=None)
        self.gated_norm = parameter(rngs, "gated_norm", tuple(heads.values()), ("heads", None), std=None)
        self.o_proj = Projection(heads, {"embed": width}, bias=config.bias, rngs=child(rngs, "o_proj"))

    def __call__(
        self, x: Float[Array, "b t d"], *, positions: Int[Array, "b t"], ctx: ForwardContext, cache: PyTree = None
    ) -> tuple[Float[Array, "b t d"], PyTree]:
        check_recurrence(self.config, ctx, x.shape[1], causal=True)
        config, past, dtype = self.config, {} if cache is None else dict(cache), x.dtype
        if ctx.is_token is not None:  # what padding may be, times 0, may be nan
            x = jnp.where(shard(ctx.is_token, "batch", "sequence")[..., None], x, 0)
        u, past["x"] = self.x_conv(self.x_proj(x), ctx, past.get("x"))
        b, past["b"] = self.b_conv(self.b_proj(x), ctx, past.get("b"))
        c, past["c"] = self.c_conv(self.c_proj(x), ctx, past.get("c"))
        z = shard(self.z_proj(x), "batch", None, "heads", None)
        u, b, c, z = (values.astype(jnp.float32) for values in (u, b, c, z))

        dt = shard(self.dt_proj(x), "batch", None, "heads").astype(jnp.float32)
        dt = jax.nn.softplus(dt + cast_and_gather(self.dt_bias, jnp.float32))
        dt = jnp.clip(dt, config.min_step, config.max_step)
        if ctx.is_token is not None:
            dt = jnp.where(shard(ctx.is_token, "batch", None)[..., None], dt, 0)  # the state stays
        decay = -jnp.exp(cast_and_gather(self.a_log, jnp.float32)) * dt
        state = past["state"] if cache is not None else self._first_state(x.shape[0])
        y, past["state"] = _on_each_device(u * dt[..., None], decay, b, c, begins(ctx, reverse=False), state)
        y = y + cast_and_gather(self.skip, jnp.float32)[:, None] * u
        return self.o_proj(self._gated_norm(y, z).astype(dtype)), None if cache is None else past

    def _gated_norm(self, y: Float[Array, "b t n h"], z: Float[Array, "b t n h"]) -> Float[Array, "b t n h"]:
        """Return y silu(z) divided by the root mean square of its group, times the weight."""
        y = y * jax.nn.silu(z)
        squares = shard(jnp.mean(y * y, axis=-1), "batch", None, None)  # of whole groups on every device
        groups = self.config.num_groups
        squares = squares.reshape(*squares.shape[:2], groups, -1).mean(-1)
        factor = jax.lax.rsqrt(jnp.repeat(squares, self.config.num_heads // groups, axis=-1) + self.config.eps)
        return y * shard(factor, "batch", None, "heads")[..., None] * cast_and_gather(self.gated_norm, jnp.float32)

    def _first_state(self, batch: int) -> Float[Array, "b n h s"]:
        config = self.config
        shape = (batch, config.num_heads, config.head_dim, config.state_size)
        return shard(jnp.zeros(shape, jnp.float32), "batch", "heads", None, None)

    def init_cache(self, batch: int, length: int, dtype: DTypeLike) -> PyTree:
        convolutions, size = {"x": self.x_conv, "b": self.b_conv, "c": self.c_conv}, self.config.conv_kernel - 1
        past = {
            name: shard(jnp.zeros((batch, size, *conv.shape), dtype), "batch", None, *conv.axes)
            for name, conv in convolutions.items()
        }
        return past | {"state": self._first_state(batch)}


def _first_values(rngs: nnx.Rngs, name: str, num_heads: int) -> nnx.Param:
    """Return a number for each head: the logarithm of -A, or what softplus maps to dt."""
    low, high = _FIRST_A if name == "a_log" else _FIRST_DT
    key, partition = child(rngs, name)["params"].key[...], spec("heads", shape=(num_heads,))
    share = jax.random.uniform(key, (num_heads,), jnp.float32, out_sharding=partition)
    if name == "a_log":
        return nnx.Param(jnp.log(low + share * (high - low)), axes=("heads",))
    return nnx.Param(jnp.log(jnp.expm1(low * (high / low) ** share)), axes=("heads",))


def _on_each_device(
    x: jax.Array, decay: jax.Array, b: jax.Array, c: jax.Array, starts: jax.Array | None, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return `state_space`, computed by each device for its rows and heads, without communication in the loop."""
    groups = jnp.arange(x.shape[2]) // (x.shape[2] // b.shape[2])
    if not mesh_axis_sizes():
        return state_space(x, decay, b, c, groups, starts, state, CHUNK)
    x, decay = shard(x, "batch", None, "heads", None), shard(decay, "batch", None, "heads")
    state, groups = shard(state, "batch", "heads", None, None), shard(groups, "heads")
    b, c = (shard(values, "batch", None, None, None) for values in (b, c))
    starts = None if starts is None else shard(starts, "batch", None)
    rows, _, heads, _ = axes_of(x)

    def local(x: Any, decay: Any, b: Any, c: Any, groups: Any, starts: Any, state: Any) -> tuple[jax.Array, jax.Array]:
        if heads:  # marked as varying, so that gradients are summed over the devices after the loop and not in it
            b, c = (jax.lax.pcast(values, heads, to="varying") for values in (b, c))
        return state_space(x, decay, b, c, groups, starts, state, CHUNK)

    out = jax.P(rows or None, None, heads or None), jax.P(rows or None, heads or None)
    return jax.shard_map(local, out_specs=out)(x, decay, b, c, groups, starts, state)


def state_space(
    x: Float[Array, "b t n h"],
    decay: Float[Array, "b t n"],
    b: Float[Array, "b t g s"],
    c: Float[Array, "b t g s"],
    groups: Int[Array, " n"],
    starts: Bool[Array, "b t"] | None,
    state: Float[Array, "b n h s"],
    chunk: int,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b n h s"]]:
    """Return y and the last state of S' = exp(decay) S + x b, y = c S', for chunks of `chunk` tokens.

    `groups` are the rows of b and c of each head; `starts` is where a document begins, with a state of 0.
    """
    length = x.shape[1]
    chunk = min(chunk, length)
    starts = jnp.zeros(x.shape[:2], bool) if starts is None else starts

    def in_chunks(values: jax.Array) -> jax.Array:
        values = jnp.pad(values, ((0, 0), (0, -length % chunk), *((0, 0),) * (values.ndim - 2)))  # changes no state
        return values.reshape(values.shape[0], -1, chunk, *values.shape[2:]).swapaxes(0, 1)

    causal = jnp.tri(chunk, dtype=bool)[..., None]

    def step(state: jax.Array, at: Any) -> tuple[jax.Array, jax.Array]:
        x, decay, b, c, starts = at
        document = jnp.cumsum(starts, axis=1)[..., None]  # 0 for that of the state
        total = jnp.cumsum(decay, axis=1)
        same = causal & (document[:, :, None] == document[:, None])
        # Sums of the decays after s up to t, [B, T, S, N]: differences of `total` would cancel.
        sums = jnp.cumsum(jnp.where(causal & ~causal.swapaxes(0, 1), decay[:, :, None], 0), axis=1)
        between = jnp.exp(jnp.where(same, sums, -jnp.inf))
        scores = jnp.einsum("btgk,bsgk->btsg", c, b)[..., groups] * between
        kept = jnp.where(document == 0, jnp.exp(total), 0)
        y = jnp.einsum("btsn,bsnh->btnh", scores, x)
        y = y + jnp.einsum("btnk,bnhk->btnh", c[:, :, groups], state) * kept[..., None]
        # What the last token's document has added; `between` has the decay from each token to the last.
        added = jnp.einsum("bsnh,bsnk->bnhk", x * between[:, -1, :, :, None], b[:, :, groups])
        return kept[:, -1, :, None, None] * state + added, y

    # Rematerialized: the backward pass keeps the states between chunks, not the decays inside of them.
    state, y = jax.lax.scan(jax.checkpoint(step), state, tuple(map(in_chunks, (x, decay, b, c, starts))))
    return y.swapaxes(0, 1).reshape(x.shape[0], -1, *x.shape[2:])[:, :length], state
