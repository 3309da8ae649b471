"""The gated delta rule, a recurrence of matrices that overwrites what it holds under a key (Yang et al. 2024).

arXiv 2412.06464; projections, convolution and output gate as Qwen3-Next has them. Axes: K key heads, R value heads of
each, I numbers of a key, J of a value.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llama_jax.config import Known, UserError
from llama_jax.nn.base import ForwardContext, Mixer, MixerModule, check_above_zero, check_at_least, known_heads
from llama_jax.nn.norms import RMSNorm
from llama_jax.nn.parameters import Projection, cast_and_gather, child, parameter
from llama_jax.nn.recurrent import begins, check_recurrence, past_inputs
from llama_jax.parallel import reshape, shard, spec

Cache = dict[str, Any]  # arrays
_HEADS = ("batch", None, "kv_heads", None)
_L2_EPS = 1e-6  # added to the squared lengths of queries and keys


@dataclasses.dataclass(frozen=True)
class GatedDeltaNet(Mixer):
    """The gated delta rule: S' = g S + b k (v - g S k)^T with a state S for each value head, y = S'^T q.

    Queries, keys and values pass a causal convolution of each channel and SiLU; queries and keys have length 1. The
    result is normed and multiplied by SiLU of a gate.

    num_key_heads: heads of queries and keys.
    num_value_heads: heads of values, each with a state; a multiple of num_key_heads.
    key_dim: size of a query and of a key.
    value_dim: size of a value.
    conv_kernel: inputs that the convolution sees, the token's own included.
    eps: of the norm of the result.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int
    eps: float

    @classmethod
    def follow(cls, known: Known) -> dict[str, Any]:
        heads, size = known_heads(known)
        sizes = {"num_key_heads": heads, "num_value_heads": heads, "key_dim": size, "value_dim": size}
        return sizes | {"conv_kernel": 4, "eps": 1e-6}

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_key_heads", "num_value_heads", "key_dim", "value_dim", "conv_kernel")
        check_above_zero(self, "eps")
        if self.num_value_heads % self.num_key_heads:
            raise UserError(
                f"num_value_heads={self.num_value_heads} must be a multiple of num_key_heads={self.num_key_heads}"
            )

    def build(self, width: int, *, rngs: nnx.Rngs) -> "GatedDeltaNetModule":
        return GatedDeltaNetModule(self, width, rngs=rngs)

    def score_flops(self, num_keys: float) -> float:
        return 6 * self.num_value_heads * self.key_dim * self.value_dim  # S k, b k (...)^T and S q


class GatedDeltaNetModule(MixerModule):
    """The gated delta rule; its cache is the states [B, K, R, I, J], float32, and the convolution's last inputs."""

    def __init__(self, config: GatedDeltaNet, width: int, *, rngs: nnx.Rngs):
        self.config = config
        heads, kernel = config.num_key_heads, config.conv_kernel
        self.values = config.num_value_heads // heads
        outer, by_head = {"embed": width}, {"kv_heads": heads}
        self.channels = config.key_dim, config.key_dim, self.values * config.value_dim  # of q, k and v
        fused = by_head | {"_qkvz": sum(self.channels) + self.channels[-1]}
        self.in_proj_qkvz = Projection(outer, fused, bias=False, rngs=child(rngs, "in_proj_qkvz"))
        self.in_proj_ba = Projection(
            outer, by_head | {"_ba": 2 * self.values}, bias=False, rngs=child(rngs, "in_proj_ba")
        )
        for name, size in zip("qkv", self.channels, strict=True):
            weight = parameter(rngs, f"conv_{name}", (heads, size, kernel), ("kv_heads", None, None), std=kernel**-0.5)
            setattr(self, f"conv_{name}", weight)
        key, size = child(rngs, "A_log")["params"].key[...], config.num_value_heads
        decay = jax.random.uniform(key, (size,), minval=0.01, maxval=16, out_sharding=spec(None, shape=(size,)))
        self.A_log = nnx.Param(jnp.log(decay), axes=(None,))
        self.dt_bias = parameter(rngs, "dt_bias", (size,), (None,), std=None)
        self.norm = RMSNorm(config.eps).build(config.value_dim, rngs=child(rngs, "norm"))
        out = by_head | {"_values": self.channels[-1]}
        self.out_proj = Projection(out, outer, bias=False, rngs=child(rngs, "out_proj"))

    def __call__(
        self, x: Float[Array, "b t d"], *, positions: Int[Array, "b t"], ctx: ForwardContext, cache: Cache | None = None
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        config, (batch, length, _) = self.config, x.shape
        check_recurrence(config, ctx, length, causal=True)
        held = self.init_cache(batch, length, x.dtype) if cache is None else cache
        qkvz, ba = (shard(projection(x), *_HEADS) for projection in (self.in_proj_qkvz, self.in_proj_ba))
        is_token = None if ctx.is_token is None else shard(ctx.is_token, "batch", None)[..., None, None]
        if is_token is not None:
            qkvz = jnp.where(is_token, qkvz, 0)
        qkv, z = jnp.split(qkvz, [sum(self.channels)], -1)
        window, inputs = past_inputs(qkv, _HEADS[2:], config.conv_kernel, ctx, held["inputs"])
        q, k, v = jnp.split(jax.nn.silu(self._convolved(window)), [config.key_dim, 2 * config.key_dim], -1)
        v, z = (self._by_value(values) for values in (v, z))
        q, k = (y * jax.lax.rsqrt(jnp.sum(y * y, -1, keepdims=True) + _L2_EPS) for y in (q, k))
        b, a = jnp.split(ba.astype(jnp.float32), 2, -1)
        log_rate, dt_bias = (
            cast_and_gather(param, jnp.float32).reshape(config.num_key_heads, self.values)
            for param in (self.A_log, self.dt_bias)
        )
        decay, beta = jnp.exp(-jnp.exp(log_rate) * jax.nn.softplus(a + dt_bias)), jax.nn.sigmoid(b)
        if is_token is not None:  # padding leaves the state as it is
            decay, beta = jnp.where(is_token, decay, 1), jnp.where(is_token, beta, 0)
        if (starts := begins(ctx, reverse=False)) is not None:
            decay = jnp.where(shard(starts, "batch", None)[..., None, None], 0, decay)
        y, state = delta_rule(q * config.key_dim**-0.5, k, v, decay, beta, held["state"])
        y = self.norm(y.astype(x.dtype)) * jax.nn.silu(z.astype(jnp.float32))
        y = self.out_proj(reshape(y.astype(x.dtype), (batch, length, config.num_key_heads, -1), *_HEADS))
        return y, None if cache is None else {"state": state, "inputs": inputs}

    def _convolved(self, window: list[Float[Array, "b t k c"]]) -> Float[Array, "b t k c"]:
        """Return the convolution, float32, of the inputs 0, 1, ... places back."""
        weights = [cast_and_gather(getattr(self, f"conv_{name}"), jnp.float32) for name in "qkv"]
        weight = jnp.flip(jnp.concatenate(weights, axis=1), -1)  # the last entry is the token's own
        found = [values.astype(jnp.float32) * weight[..., back] for back, values in enumerate(window)]
        return sum(found[1:], found[0])

    def _by_value(self, values: Float[Array, "b t k c"]) -> Float[Array, "b t k r j"]:
        shape = (*values.shape[:3], self.values, self.config.value_dim)
        return reshape(values, shape, *_HEADS, None)

    def init_cache(self, batch: int, length: int, dtype: DTypeLike) -> Cache:
        config, channels = self.config, sum(self.channels)
        heads = config.num_key_heads
        state = jnp.zeros((batch, heads, self.values, config.key_dim, config.value_dim), jnp.float32)
        inputs = jnp.zeros((batch, config.conv_kernel - 1, heads, channels), jnp.float32)
        return {"state": shard(state, "batch", "kv_heads", None, None, None), "inputs": shard(inputs, *_HEADS)}


def delta_rule(
    q: Float[Array, "b t k i"],
    k: Float[Array, "b t k i"],
    v: Float[Array, "b t k r j"],
    decay: Float[Array, "b t k r"],
    beta: Float[Array, "b t k r"],
    state: Float[Array, "b k r i j"],
) -> tuple[Float[Array, "b t k r j"], Float[Array, "b k r i j"]]:
    """Return S_t^T q_t at all places and the last state, with S_t = decay S + beta k (v - decay S^T k)^T, in float32.

    One place after the other (equation 10 of arXiv 2412.06464).
    """

    def product(state: jax.Array, vector: jax.Array) -> jax.Array:
        return jnp.einsum("bkrij,bki->bkrj", state, vector, precision="highest")

    def step(state: jax.Array, at: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v, decay, beta = at
        state = state * decay[..., None, None]
        change = (v - product(state, k)) * beta[..., None]
        state = state + k[:, :, None, :, None] * change[..., None, :]
        return state, product(state, q)

    by_place = tuple(values.astype(jnp.float32).swapaxes(0, 1) for values in (q, k, v, decay, beta))
    state, y = jax.lax.scan(step, state, by_place)
    return y.swapaxes(0, 1), state
