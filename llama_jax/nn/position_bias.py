"""Positions that are added to the attention scores: what `mask.bias` is made of."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from llama_jax.config import Component, UserError
from llama_jax.nn.parameters import cast_and_gather, parameter
from llama_jax.parallel import shard, spec

BIAS_STD = 0.02  # every distance counts almost the same at first


class PositionBiasModule(nnx.Module):
    """A number for each head and pair of positions."""

    def __call__(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """int [1 or B, T] and [S] or [B, S] -> float32 [1 or B, N, T, S]."""
        raise NotImplementedError


class PositionBias(Component):
    """Config of a bias on the attention scores that depends on the positions of query and key; has `num_heads`."""

    num_heads: int

    def build(self, *, rngs: nnx.Rngs) -> PositionBiasModule:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class RelativeBias(PositionBias):
    """A trained number for each head and bucket of distances (Raffel et al. 2020, section 2.1: T5).

    The nearest half of the buckets holds one distance each, the others grow logarithmically up to max_distance; all
    beyond it share the last.

    num_heads: those of the attention.
    num_buckets: buckets; bidirectional, half of them for keys after the query.
    max_distance: where the last bucket begins at the latest.
    bidirectional: whether keys after the query have buckets of their own; without, they count as distance 0.
    """

    num_heads: int
    num_buckets: int
    max_distance: int
    bidirectional: bool

    def __post_init__(self) -> None:
        if self.num_heads < 1:
            raise UserError(f"num_heads={self.num_heads} must be at least 1")
        least = 4 if self.bidirectional else 2
        if self.num_buckets < least or self.num_buckets % least:
            raise UserError(f"num_buckets={self.num_buckets} must be a multiple of {least}")
        if self.max_distance <= self.num_buckets // least:
            raise UserError(f"max_distance={self.max_distance} must be above {self.num_buckets // least}")

    def buckets(self) -> Int[np.ndarray, " offsets"]:
        """Bucket of each key position minus query position, from -max_distance to max_distance."""
        offsets = np.arange(-self.max_distance, self.max_distance + 1)
        distance = np.abs(offsets) if self.bidirectional else np.maximum(-offsets, 0)
        size = self.num_buckets // 2 if self.bidirectional else self.num_buckets
        exact = size // 2
        # In float32, step by step as T5 has it: where the logarithm comes to a whole number, its rounding decides.
        ratio = np.maximum(distance, exact).astype(np.float32) / np.float32(exact)
        log = np.log(ratio.astype(np.float64)).astype(np.float32) / np.float32(math.log(self.max_distance / exact))
        far = np.minimum(exact + (log * np.float32(size - exact)).astype(int), size - 1)
        bucket = np.where(distance < exact, distance, far)
        return bucket + size * (offsets > 0) if self.bidirectional else bucket

    def build(self, *, rngs: nnx.Rngs) -> "RelativeBiasModule":
        return RelativeBiasModule(self, rngs=rngs)


class RelativeBiasModule(PositionBiasModule):
    def __init__(self, config: RelativeBias, *, rngs: nnx.Rngs):
        self.config = config
        shape = (config.num_buckets, config.num_heads)
        self.weight = parameter(rngs, "weight", shape, (None, "heads"), std=BIAS_STD)

    def __call__(
        self, query_positions: Int[Array, "#b t"], key_positions: Int[Array, "*#b s"]
    ) -> Float[Array, "#b n t s"]:
        limit = self.config.max_distance
        by_offset = cast_and_gather(self.weight, jnp.float32).T[:, self.config.buckets()]
        place = jnp.clip(_offsets(query_positions, key_positions), -limit, limit) + limit
        shape = (by_offset.shape[0], *place.shape)
        bias = by_offset.at[:, place].get(out_sharding=spec("heads", "batch", "sequence", None, shape=shape))
        return bias.swapaxes(0, 1)


@dataclasses.dataclass(frozen=True)
class Alibi(PositionBias):
    """Minus the distance, times a slope of each head's own (Press et al. 2022, ALiBi); not trained.

    Keys after the query are as far away as those before it.

    num_heads: those of the attention.
    """

    num_heads: int

    def __post_init__(self) -> None:
        if self.num_heads < 1:
            raise UserError(f"num_heads={self.num_heads} must be at least 1")

    def slopes(self) -> Float[np.ndarray, " n"]:
        """2^(-8/n), 2^(-16/n)... for a power of two; for other numbers of heads, every second slope of twice the
        power of two below fills up, as in the authors' code."""
        power = 1 << (self.num_heads.bit_length() - 1)
        some = 2.0 ** (-8 * np.arange(1, power + 1) / power)
        between = 2.0 ** (-4 * np.arange(1, 2 * power, 2) / power)
        return np.concatenate([some, between[: self.num_heads - power]])

    def build(self, *, rngs: nnx.Rngs) -> "AlibiModule":
        return AlibiModule(self)


class AlibiModule(PositionBiasModule):
    def __init__(self, config: Alibi):
        self.config = config

    def __call__(
        self, query_positions: Int[Array, "#b t"], key_positions: Int[Array, "*#b s"]
    ) -> Float[Array, "#b n t s"]:
        slopes = shard(jnp.asarray(self.config.slopes(), jnp.float32), "heads")
        distance = jnp.abs(_offsets(query_positions, key_positions)).astype(jnp.float32)
        return -slopes[:, None, None] * distance[:, None]


def _offsets(query_positions: jax.Array, key_positions: jax.Array) -> Int[Array, "#b t s"]:
    """Key position minus query position."""
    keys = key_positions if key_positions.ndim == 2 else key_positions[None]
    queries = shard(query_positions, "batch", "sequence")
    return shard(keys, "batch", None)[:, None] - queries[..., None]
