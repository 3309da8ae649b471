"""Rotary positions and the ways to stretch them over longer contexts."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax.config import Component, Known, UserError
from llama_jax.nn.base import check_above_zero, check_at_least, known_heads
from llama_jax.parallel import platform


class RopeScaling(Component):
    """Config of a change to the rotary frequencies for contexts longer than those of pretraining."""

    def frequencies(self, frequencies: np.ndarray, theta: float, head_dim: int) -> np.ndarray:
        """Return the scaled inverse frequencies, [H/2]."""
        raise NotImplementedError

    def magnitude(self) -> float:
        """Return the factor of cos and sin."""
        return 1.0

    def score_magnitude(self) -> float:
        """Return the factor of latent attention's scores."""
        return 1.0

    def beyond(self) -> tuple[int, "RopeScaling"] | None:
        """Return the longest text that has these frequencies, and the scaling of longer ones; None for all texts."""
        return None


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021): position p turns pair i of a head by p * theta^(-2i/rotary_dim).

    Pairs are (i, i + rotary_dim/2): the rotated halves of Hugging Face's Llama. Weights of families that interleave
    pairs are permuted when imported.

    theta: base of the frequencies.
    scaling: how they are stretched for long contexts, or none.
    rotary_dim: size of the first part of a head, which is rotated; none for all of it.
    """

    theta: float
    scaling: RopeScaling | None
    rotary_dim: int | None = None

    def __post_init__(self) -> None:
        if self.theta <= 1:
            raise UserError(f"theta={self.theta} must be above 1")
        if self.rotary_dim is not None and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise UserError(f"rotary_dim={self.rotary_dim} must be positive and even")

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Return the angle per position of each pair, float64 [rotary_dim/2]; without rotary_dim [H/2]."""
        head_dim = self.rotary_dim or head_dim
        frequencies = self.theta ** (-np.arange(0, head_dim, 2) / head_dim)
        return frequencies if self.scaling is None else self.scaling.frequencies(frequencies, self.theta, head_dim)

    def rotate(self, x: Float[Array, "b t n h"], positions: Int[Array, "b t"]) -> Float[Array, "b t n h"]:
        """Return x rotated by its positions; angles are float32 whatever the dtype of x.

        Where the scaling differs for long texts, the largest position of each row decides for the whole row.
        """
        frequencies = jnp.asarray(self.frequencies(x.shape[-1]), jnp.float32)
        if self.scaling is not None and (beyond := self.scaling.beyond()) is not None:
            length, scaling = beyond
            long = jnp.asarray(dataclasses.replace(self, scaling=scaling).frequencies(x.shape[-1]), jnp.float32)
            is_long = positions.max(axis=1)[:, None, None, None] >= length
            frequencies = jnp.where(is_long, long, frequencies)
        angles = positions[..., None, None].astype(jnp.float32) * frequencies
        magnitude = 1.0 if self.scaling is None else self.scaling.magnitude()
        cos, sin = magnitude * jnp.cos(angles), magnitude * jnp.sin(angles)
        if platform() == "cpu":  # else XLA would compute them again for every head of every layer
            cos, sin = jax.lax.optimization_barrier((cos, sin))
        if platform() == "tpu":
            return _turned(x, cos, sin)
        rotary, rest = jnp.split(x, [2 * frequencies.shape[-1]], axis=-1)
        # Pair i is (x[i], x[i + rotary_dim/2]), which turns by the angle of its position.
        first, second = jnp.split(rotary.astype(jnp.float32), 2, axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
        return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated


@jax.custom_vjp
def _turned(x: Float[Array, "b t n h"], cos: Float[Array, "b t 1 r"], sin: Float[Array, "b t 1 r"]) -> jax.Array:
    """Return what `Rope.rotate` computes, for TPUs: there halves of a head would be copied to places of their own.

    The other number of each pair is found by a product with a permutation, which is exact.
    """
    half, rest = cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]
    first = np.arange(half)
    exchange = np.zeros((x.shape[-1], x.shape[-1]))
    exchange[first + half, first], exchange[first, first + half] = -1, 1
    other = jnp.einsum(
        "btnh,hg->btng",
        x,
        jnp.asarray(exchange, x.dtype),
        precision=jax.lax.Precision.HIGHEST,  # else float32 would be rounded to bfloat16
        preferred_element_type=jnp.float32,
    )
    cos, sin = (jnp.concatenate([angle, angle], axis=-1) for angle in (cos, sin))
    cos, sin = (jnp.pad(y, ((0, 0), (0, 0), (0, 0), (0, rest)), constant_values=v) for y, v in ((cos, 1), (sin, 0)))
    return (x.astype(jnp.float32) * cos + other * sin).astype(x.dtype)


# The gradient is turned back. By a call of `_turned`, so that no policy keeps the product for the backward pass.
_turned.defvjp(
    lambda x, cos, sin: (_turned(x, cos, sin), (cos, sin)),
    lambda angles, d_y: (_turned(d_y, angles[0], -angles[1]), None, None),
)


def known_rope(known: Known) -> Rope | None:
    """Return the rotary positions around, or Llama's where the model has no other positions."""
    others = known.get("positions") is not None or known.get("position_bias") is not None
    return known.values.get("rope", None if others else Rope(theta=10000.0, scaling=None))


@dataclasses.dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """Positions divided by `factor` (Chen et al. 2023, position interpolation).

    factor: how many times longer the context becomes.
    """

    factor: float

    def __post_init__(self) -> None:
        check_at_least(self, 1, "factor")

    def frequencies(self, frequencies: np.ndarray, theta: float, head_dim: int) -> np.ndarray:
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class NTKScaling(RopeScaling):
    """theta raised so that the slowest pair slows down by `factor` and the fastest keeps its speed ("NTK-aware").

    factor: how many times longer the context becomes.
    """

    factor: float

    def __post_init__(self) -> None:
        check_at_least(self, 1, "factor")

    def frequencies(self, frequencies: np.ndarray, theta: float, head_dim: int) -> np.ndarray:
        # The exponent makes the slowest frequency, base^(-(head_dim-2)/head_dim), exactly `factor` times slower.
        base = theta * self.factor ** (head_dim / (head_dim - 2))
        return base ** (-np.arange(0, head_dim, 2) / head_dim)


@dataclasses.dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """YaRN (Peng et al. 2023): slow pairs are interpolated, fast ones kept, with a ramp between; attention is scaled.

    cos and sin are multiplied by m(mscale) / m(mscale_all_dim) where m(s) = 0.1 s ln(factor) + 1; with both 0, by m(1).

    factor: how many times longer the context becomes.
    original_max_positions: the context of pretraining.
    beta_fast: pairs that turn more often than this within it are kept.
    beta_slow: pairs that turn less often are interpolated.
    mscale: numerator of the magnitude, as above.
    mscale_all_dim: denominator of the magnitude, as above.
    truncate: the ramp begins and ends at whole pairs.
    """

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float
    truncate: bool = True

    @classmethod
    def follow(cls, known: Known) -> dict[str, Any]:
        usual = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}
        return usual | {"original_max_positions": known.get("max_positions")}

    def __post_init__(self) -> None:
        check_at_least(self, 1, "factor")

    def _m(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0

    def magnitude(self) -> float:
        if self.mscale and self.mscale_all_dim:
            return self._m(self.mscale) / self._m(self.mscale_all_dim)
        return self._m(1.0)

    def score_magnitude(self) -> float:
        return self._m(self.mscale_all_dim) ** 2

    def frequencies(self, frequencies: np.ndarray, theta: float, head_dim: int) -> np.ndarray:
        def pair_with(turns: float) -> float:
            """Return the (fractional) index of the pair that turns `turns` times within the original context."""
            return head_dim * math.log(self.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

        # Pairs below `low` turn often and are kept, those above `high` are interpolated, a linear ramp between.
        low, high = pair_with(self.beta_fast), pair_with(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
        return frequencies / self.factor * ramp + frequencies * (1 - ramp)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Llama 3.1's piecewise scaling by wavelength: long ones are interpolated, short ones kept, a ramp between.

    factor: how many times longer the context becomes.
    low_freq_factor: pairs that turn less often than this within the original context are interpolated.
    high_freq_factor: pairs that turn more often are kept.
    original_max_positions: the context of pretraining.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    @classmethod
    def follow(cls, known: Known) -> dict[str, Any]:
        usual = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        return usual | {"original_max_positions": known.get("max_positions")}

    def __post_init__(self) -> None:
        check_at_least(self, 1, "factor")
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"high_freq_factor={self.high_freq_factor} must be above low_freq_factor={self.low_freq_factor}"
            )

    def frequencies(self, frequencies: np.ndarray, theta: float, head_dim: int) -> np.ndarray:
        turns = self.original_max_positions * frequencies / (2 * math.pi)
        keep = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return frequencies / self.factor * (1 - keep) + frequencies * keep


@dataclasses.dataclass(frozen=True)
class LongRopeScaling(RopeScaling):
    """LongRoPE (Ding et al. 2024): each pair is slowed by its own factor, another one in texts beyond the old context.

    short_factor: of every pair, where a row's positions all are within the context of pretraining.
    long_factor: of every pair in other rows.
    original_max_positions: the context of pretraining.
    attention_factor: factor of cos and sin, in short and in long rows.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_positions: int
    attention_factor: float

    @classmethod
    def follow(cls, known: Known) -> dict[str, Any]:
        same = (1.0,) * ((known.get("rotary_dim") or known_heads(known)[1]) // 2)
        usual = {"short_factor": same, "long_factor": same, "attention_factor": 1.0}
        return usual | {"original_max_positions": known.get("max_positions")}

    def __post_init__(self) -> None:
        check_at_least(self, 1, "original_max_positions")
        check_above_zero(self, "attention_factor")
        if not self.short_factor or min(*self.short_factor, *self.long_factor) <= 0:
            raise UserError("short_factor and long_factor must be a number above 0 for every pair of a head")
        if len(self.short_factor) != len(self.long_factor):
            raise UserError(
                f"short_factor has {len(self.short_factor)} numbers and long_factor {len(self.long_factor)}: both must "
                "have one for every pair of a head"
            )

    def magnitude(self) -> float:
        return self.attention_factor

    def beyond(self) -> tuple[int, RopeScaling]:
        return self.original_max_positions, dataclasses.replace(self, short_factor=self.long_factor)

    def frequencies(self, frequencies: np.ndarray, theta: float, head_dim: int) -> np.ndarray:
        if len(self.short_factor) != len(frequencies):
            raise UserError(
                f"short_factor and long_factor have {len(self.short_factor)} numbers, and heads have "
                f"{len(frequencies)} rotary pairs: give one for each"
            )
        return frequencies / np.array(self.short_factor)
