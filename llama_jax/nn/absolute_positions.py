"""Positions that are added to the embeddings."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from llama_jax.config import Component, UserError
from llama_jax.nn.parameters import embed_lookup, parameter

# Small beside token embeddings, as GPT-2 and BERT begin.
POSITIONS_STD = 0.02


class PositionsModule(nnx.Module):
    """A vector for each position."""

    def __call__(self, positions: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        """int [B, T] -> [B, T, D] of this dtype."""
        raise NotImplementedError


class Positions(Component):
    """Config of positions that are added to the embeddings."""

    @property
    def limit(self) -> int | None:
        """How many positions there are, the first of them 0; None: any. Whoever calls has to keep to it."""
        return None

    def build(self, width: int, *, rngs: nnx.Rngs) -> PositionsModule:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class LearnedPositions(Positions):
    """A trained vector for each position (Gehring et al. 2017; GPT, BERT, BART).

    num_positions: how many positions there are.
    offset: rows of the table before that of position 0: 2 in BART, 2 in RoBERTa (its padding index, and one).
    """

    num_positions: int
    offset: int = 0

    def __post_init__(self) -> None:
        if self.num_positions < 1:
            raise UserError(f"num_positions={self.num_positions} must be at least 1")
        if self.offset < 0:
            raise UserError(f"offset={self.offset} must be at least 0")

    @property
    def limit(self) -> int:
        return self.num_positions

    def build(self, width: int, *, rngs: nnx.Rngs) -> "LearnedPositionsModule":
        return LearnedPositionsModule(self, width, rngs=rngs)


class LearnedPositionsModule(PositionsModule):
    def __init__(self, config: LearnedPositions, width: int, *, rngs: nnx.Rngs):
        self.offset = config.offset
        shape = (config.num_positions + config.offset, width)
        self.weight = parameter(rngs, "weight", shape, (None, "embed"), std=POSITIONS_STD)

    def __call__(self, positions: Int[Array, "b t"], dtype: Any = jnp.float32) -> Float[Array, "b t d"]:
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
    def __init__(self, config: SinusoidalPositions, width: int):
        self.config, self.width = config, width

    def __call__(self, positions: Int[Array, "b t"], dtype: Any = jnp.float32) -> Float[Array, "b t d"]:
        frequencies = jnp.asarray(self.config.base ** (-np.arange(0, self.width, 2) / self.width), jnp.float32)
        angles = positions[..., None].astype(jnp.float32) * frequencies
        waves = (jnp.sin(angles), jnp.cos(angles))
        if self.config.layout == "halves":
            return jnp.concatenate(waves, axis=-1).astype(dtype)
        return jnp.stack(waves, axis=-1).reshape(*positions.shape, self.width).astype(dtype)
