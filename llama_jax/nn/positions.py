"""Positions added to the embeddings, and biases of the attention scores that depend on positions."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llama_jax.config import Component, Known, UserError
from llama_jax.nn.base import check_above_zero, check_at_least, known_heads
from llama_jax.nn.parameters import cast_and_gather, embed_lookup, parameter
from llama_jax.parallel import shard, spec

# Standard deviations of first values: small compared with token embeddings, as GPT-2 and BERT begin; and a bias with
# which every distance counts almost the same at first.
POSITIONS_STD = 0.02
BIAS_STD = 0.02


class PositionsModule(nnx.Module):
    """A vector for each position."""

    def __call__(self, positions: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Map int [B, T] to [B, T, D] of this dtype."""
        raise NotImplementedError


class Positions(Component):
    """Config of positions that are added to the embeddings."""

    @property
    def limit(self) -> int | None:
        """The number of positions, the first of them 0; None for any."""
        return None

    def build(self, width: int, *, rngs: nnx.Rngs) -> PositionsModule:
        """Return the module for a model of this width."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class LearnedPositions(Positions):
    """A trained vector for each position (Gehring et al. 2017; GPT, BERT, BART).

    num_positions: number of positions.
    offset: rows of the table before that of position 0: 2 in BART, 2 in RoBERTa (its padding index, and one).
    """

    num_positions: int
    offset: int = 0

    @classmethod
    def follow(cls, known: Known) -> dict[str, Any]:
        return {"num_positions": known.get("max_positions")}

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_positions")
        check_at_least(self, 0, "offset")

    @property
    def limit(self) -> int:
        return self.num_positions

    def build(self, width: int, *, rngs: nnx.Rngs) -> "LearnedPositionsModule":
        return LearnedPositionsModule(self, width, rngs=rngs)


class LearnedPositionsModule(PositionsModule):
    """A table of trained vectors."""

    def __init__(self, config: LearnedPositions, width: int, *, rngs: nnx.Rngs):
        self.offset = config.offset
        shape = (config.num_positions + config.offset, width)
        self.weight = parameter(rngs, "weight", shape, (None, "embed"), std=POSITIONS_STD)

    def __call__(self, positions: Int[Array, "b t"], dtype: DTypeLike = jnp.float32) -> Float[Array, "b t d"]:
        return embed_lookup(self.weight[...].astype(dtype), positions + self.offset)


@dataclasses.dataclass(frozen=True)
class SinusoidalPositions(Positions):
    """Sine and cosine of position * base^(-2i/D), for i below D/2 (Vaswani et al. 2017, section 3.5); not trained.

    layout: interleaved, sine and cosine by turns as in the paper, or halves, all sines and then all cosines as in
        Marian.
    base: of the frequencies.
    """

    layout: Literal["interleaved", "halves"] = "interleaved"
    base: float = 10000.0

    def __post_init__(self) -> None:
        if self.base <= 1:
            raise UserError(f"base={self.base} must be above 1")

    def build(self, width: int, *, rngs: nnx.Rngs) -> "SinusoidalPositionsModule":
        if width % 2:
            raise UserError(f"hidden_size={width} must be even for SinusoidalPositions: each sine has its cosine")
        return SinusoidalPositionsModule(self, width)


class SinusoidalPositionsModule(PositionsModule):
    """Sines and cosines, computed in float32."""

    def __init__(self, config: SinusoidalPositions, width: int):
        self.config, self.width = config, width

    def __call__(self, positions: Int[Array, "b t"], dtype: DTypeLike = jnp.float32) -> Float[Array, "b t d"]:
        frequencies = jnp.asarray(self.config.base ** (-np.arange(0, self.width, 2) / self.width), jnp.float32)
        angles = positions[..., None].astype(jnp.float32) * frequencies
        waves = (jnp.sin(angles), jnp.cos(angles))
        if self.config.layout == "halves":
            return jnp.concatenate(waves, axis=-1).astype(dtype)
        return jnp.stack(waves, axis=-1).reshape(*positions.shape, self.width).astype(dtype)


class PositionBiasModule(nnx.Module):
    """A number for each head and pair of positions."""

    def __call__(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """Map int [1 or B, T] and [S] or [B, S] to float32 [1 or B, N, T, S]."""
        raise NotImplementedError


class PositionBias(Component):
    """Config of a bias on the attention scores that depends on the positions of query and key; has `num_heads`."""

    num_heads: int

    @classmethod
    def follow(cls, known: Known) -> dict[str, Any]:
        return {"num_heads": known_heads(known)[0]}

    def build(self, *, rngs: nnx.Rngs) -> PositionBiasModule:
        """Return the module; its first values do not depend on the model's width."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class RelativeBias(PositionBias):
    """A trained number for each head and bucket of distances (Raffel et al. 2020, section 2.1: T5).

    The nearest half of the buckets holds one distance each, the others grow logarithmically up to max_distance; all
    beyond it share the last.

    num_heads: heads of the attention.
    num_buckets: buckets; if bidirectional, half of them are for keys after the query.
    max_distance: smallest distance that is certain to be in the last bucket.
    bidirectional: separate buckets for keys after the query; without, these count as distance 0.
    """

    num_heads: int
    num_buckets: int
    max_distance: int
    bidirectional: bool

    @classmethod
    def follow(cls, known: Known) -> dict[str, Any]:
        both = known.field.startswith("encoder_") or not getattr(known.owner, "generates", True)
        return super().follow(known) | {"num_buckets": 32, "max_distance": 128, "bidirectional": both}  # as T5

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_heads")
        least = 4 if self.bidirectional else 2
        if self.num_buckets < least or self.num_buckets % least:
            raise UserError(f"num_buckets={self.num_buckets} must be a multiple of {least}")
        if self.max_distance <= self.num_buckets // least:
            raise UserError(f"max_distance={self.max_distance} must be above {self.num_buckets // least}")

    def buckets(self) -> Int[np.ndarray, " offsets"]:
        """Return the bucket of each offset (key position minus query position) from -max_distance to max_distance."""
        offsets = np.arange(-self.max_distance, self.max_distance + 1)
        distance = np.abs(offsets) if self.bidirectional else np.maximum(-offsets, 0)
        size = self.num_buckets // 2 if self.bidirectional else self.num_buckets
        exact = size // 2
        # In float32, step by step as in T5: where the logarithm is a whole number, its rounding decides the bucket.
        ratio = np.maximum(distance, exact).astype(np.float32) / np.float32(exact)
        log = np.log(ratio.astype(np.float64)).astype(np.float32) / np.float32(math.log(self.max_distance / exact))
        far = np.minimum(exact + (log * np.float32(size - exact)).astype(int), size - 1)
        bucket = np.where(distance < exact, distance, far)
        return bucket + size * (offsets > 0) if self.bidirectional else bucket

    def build(self, *, rngs: nnx.Rngs) -> "RelativeBiasModule":
        return RelativeBiasModule(self, rngs=rngs)


class RelativeBiasModule(PositionBiasModule):
    """A table of trained numbers, [num_buckets, num_heads]."""

    def __init__(self, config: RelativeBias, *, rngs: nnx.Rngs):
        self.config = config
        shape = (config.num_buckets, config.num_heads)
        self.weight = parameter(rngs, "weight", shape, (None, "heads"), std=BIAS_STD)

    def __call__(
        self, query_positions: Int[Array, "#b t"], key_positions: Int[Array, "*#b s"]
    ) -> Float[Array, "#b n t s"]:
        limit = self.config.max_distance
        by_offset = cast_and_gather(self.weight, jnp.float32).T[:, self.config.buckets()]
        row = jnp.clip(_offsets(query_positions, key_positions), -limit, limit) + limit
        shape = (by_offset.shape[0], *row.shape)
        bias = by_offset.at[:, row].get(out_sharding=spec("heads", "batch", "sequence", None, shape=shape))
        return bias.swapaxes(0, 1)


@dataclasses.dataclass(frozen=True)
class Alibi(PositionBias):
    """Minus the distance, times a slope for each head (Press et al. 2022, ALiBi); not trained.

    Keys after the query are as far away as those before it.

    num_heads: heads of the attention.
    scale: factor of the slopes, as Falcon-RW scales them with the scores; 1 for as they are.
    """

    num_heads: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_heads")
        check_above_zero(self, "scale")

    def slopes(self) -> Float[np.ndarray, " n"]:
        """Return 2^(-8/n), 2^(-16/n)... for a power of two, times `scale`.

        Other numbers of heads begin with those of the power of two below, and fill up with every second slope of twice
        that power, as in the authors' code.
        """
        power = 1 << (self.num_heads.bit_length() - 1)  # the largest power of two that is not above num_heads
        some = 2.0 ** (-8 * np.arange(1, power + 1) / power)
        between = 2.0 ** (-4 * np.arange(1, 2 * power, 2) / power)
        return self.scale * np.concatenate([some, between[: self.num_heads - power]])

    def build(self, *, rngs: nnx.Rngs) -> "AlibiModule":
        return AlibiModule(self)


class AlibiModule(PositionBiasModule):
    """Fixed slopes times distances."""

    def __init__(self, config: Alibi):
        self.config = config

    def __call__(
        self, query_positions: Int[Array, "#b t"], key_positions: Int[Array, "*#b s"]
    ) -> Float[Array, "#b n t s"]:
        slopes = shard(jnp.asarray(self.config.slopes(), jnp.float32), "heads")
        distance = jnp.abs(_offsets(query_positions, key_positions)).astype(jnp.float32)
        return -slopes[:, None, None] * distance[:, None]


def _offsets(query_positions: jax.Array, key_positions: jax.Array) -> Int[Array, "#b t s"]:
    """Return key position minus query position."""
    keys = key_positions if key_positions.ndim == 2 else key_positions[None]
    queries = shard(query_positions, "batch", "sequence")
    return shard(keys, "batch", None)[:, None] - queries[..., None]
