"""Rotary positions: what a rotation has to be, and every scaling against its source written out another way."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import UserError
from llama_jax.nn import LinearScaling, Llama3Scaling, NTKScaling, Rope, RopeScaling, YarnScaling

THETA, HEAD_DIM = 10000.0, 16
PAIRS = HEAD_DIM // 2
PLAIN = [1 / THETA ** (2 * i / HEAD_DIM) for i in range(PAIRS)]


def rotated(rope: Rope, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return np.asarray(rope.rotate(jnp.asarray(x[None, :, None]), jnp.asarray(positions[None])))[0, :, 0]


def vectors(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, HEAD_DIM)).astype(np.float32)


def test_rotation_is_multiplication_by_complex_numbers():
    x, positions = vectors(5), np.array([0, 1, 7, 100, 5000])
    turned = (x[:, :PAIRS] + 1j * x[:, PAIRS:]) * np.exp(1j * positions[:, None] * np.array(PLAIN))
    y = rotated(Rope(theta=THETA, scaling=None), x, positions)
    np.testing.assert_allclose(y, np.concatenate([turned.real, turned.imag], -1), atol=2e-3)
    np.testing.assert_allclose(y[:3], np.concatenate([turned.real, turned.imag], -1)[:3], atol=1e-5)
    np.testing.assert_array_equal(y[0], x[0])


def test_scores_depend_on_the_distance_alone():
    rope = Rope(theta=THETA, scaling=None)
    q, k = vectors(2)
    scores = [
        rotated(rope, q[None], np.array([p + 3]))[0] @ rotated(rope, k[None], np.array([p]))[0] for p in (0, 5, 60)
    ]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-4)
    assert not np.isclose(scores[0], q @ k, rtol=1e-2)


def llama3(f: float, *, factor: float, low: float, high: float, length: int) -> float:
    """Meta's `apply_scaling` (llama-models, models/llama3/model.py)."""
    wavelength = 2 * math.pi / f
    if wavelength < length / high:
        return f
    if wavelength > length / low:
        return f / factor
    smooth = (length / wavelength - low) / (high - low)
    return (1 - smooth) * f / factor + smooth * f


def yarn(i: int, *, factor: float, fast: float, slow: float, length: int) -> float:
    """The paper's section 3.2 as jquesnelle/yarn writes it, one pair at a time."""

    def dim(rotations: float) -> float:
        return HEAD_DIM * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = max(math.floor(dim(fast)), 0), min(math.ceil(dim(slow)), HEAD_DIM - 1)
    interpolate = min(max((i - low) / (high - low), 0.0), 1.0)
    return PLAIN[i] * (interpolate / factor + (1 - interpolate))


ntk_theta = THETA * 4 ** (HEAD_DIM / (HEAD_DIM - 2))


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, PLAIN),
        (LinearScaling(factor=4.0), [f / 4 for f in PLAIN]),
        (NTKScaling(factor=4.0), [1 / ntk_theta ** (2 * i / HEAD_DIM) for i in range(PAIRS)]),
        (
            Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=512),
            [llama3(f, factor=8, low=1, high=4, length=512) for f in PLAIN],
        ),
        (
            YarnScaling(
                factor=4.0, original_max_positions=512, beta_fast=32.0, beta_slow=1.0, mscale=0.0, mscale_all_dim=0.0
            ),
            [yarn(i, factor=4, fast=32, slow=1, length=512) for i in range(PAIRS)],
        ),
    ],
    ids=lambda v: type(v).__name__,
)
def test_frequencies_against_the_sources(scaling: RopeScaling | None, expected: list[float]):
    found = Rope(theta=THETA, scaling=scaling).frequencies(HEAD_DIM)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    if scaling is not None:
        assert not np.allclose(found, PLAIN)


def test_ntk_keeps_the_fastest_pair_and_slows_the_slowest_by_the_factor():
    found = Rope(theta=THETA, scaling=NTKScaling(factor=4.0)).frequencies(HEAD_DIM)
    np.testing.assert_allclose(found / PLAIN, np.geomspace(1, 1 / 4, PAIRS))


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim", "magnitude"),
    [(0.0, 0.0, 0.1 * math.log(4) + 1), (1.0, 1.0, 1.0), (0.707, 1.0, None), (1.0, 0.5, None)],
)
def test_yarn_scales_attention(mscale: float, mscale_all_dim: float, magnitude: float | None):
    scaling = YarnScaling(4.0, 512, 32.0, 1.0, mscale, mscale_all_dim)
    if magnitude is None:  # DeepSeek-V2's `yarn_get_mscale`, of both
        magnitude = (0.1 * mscale * math.log(4) + 1) / (0.1 * mscale_all_dim * math.log(4) + 1)
    x = vectors(3)
    y = rotated(Rope(theta=THETA, scaling=scaling), x, np.array([0, 3, 9]))
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), magnitude * np.linalg.norm(x, axis=-1), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Rope(theta=1.0, scaling=None), "theta=1.0 must be above 1"),
        (lambda: LinearScaling(factor=0.5), "factor=0.5 must be at least 1"),
        (lambda: NTKScaling(factor=0.0), "factor=0.0 must be at least 1"),
        (lambda: Llama3Scaling(8.0, 4.0, 4.0, 512), "high_freq_factor=4.0 must be above low_freq_factor=4.0"),
    ],
)
def test_impossible_values(make, sentence: str):
    with pytest.raises(UserError, match=sentence):
        make()
