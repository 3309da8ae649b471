"""Positions: what a rotation has to be, every scaling against its source written out another way; those that are
added to embeddings and to scores, against their papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama_jax.config import UserError
from llama_jax.nn import (
    Alibi,
    GroupedQuery,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NTKScaling,
    PositionBias,
    RelativeBias,
    Rope,
    RopeScaling,
    SinusoidalPositions,
    YarnScaling,
    rope as implementation,
)
from llama_jax.parallel import make_mesh, shard

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


def test_a_part_of_a_head_turns_as_a_small_head_and_the_rest_stays():
    x, positions = vectors(5), np.array([0, 1, 7, 100, 4000])
    scaling = LinearScaling(factor=2.0)
    y = rotated(Rope(THETA, scaling, rotary_dim=6), x, positions)
    np.testing.assert_array_equal(y[:, 6:], x[:, 6:])
    np.testing.assert_array_equal(y[:, :6], rotated(Rope(THETA, scaling), x[:, :6], positions))
    np.testing.assert_array_equal(
        rotated(Rope(THETA, None, HEAD_DIM), x, positions), rotated(Rope(THETA, None), x, positions)
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "rope",
    [
        Rope(THETA, None),
        Rope(THETA, LinearScaling(factor=2.0), rotary_dim=6),
        Rope(THETA, YarnScaling(4.0, 64, 32, 1, 1, 0)),
    ],
    ids=["whole", "part", "magnitude"],
)
def test_the_form_for_tpus_is_the_same_turn(rope: Rope, dtype, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    x, d_y = (jnp.asarray(rng.normal(size=(2, 5, 3, HEAD_DIM)), dtype) for _ in range(2))
    positions = jnp.asarray(rng.integers(0, 100, (2, 5)))

    def both() -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(lambda x: rope.rotate(x, positions), x)
        return y, *pull(d_y)

    wanted = both()
    monkeypatch.setattr(implementation, "platform", lambda: "tpu")
    for ours, theirs in zip(both(), wanted, strict=True):
        assert ours.dtype == dtype
        # A step of the dtype: the sum of two products may be rounded once more.
        np.testing.assert_allclose(
            *(np.asarray(a, np.float32) for a in (ours, theirs)),
            rtol=1e-6,
            atol=3e-7 if dtype == jnp.float32 else 2**-7,
        )


def test_learned_positions_are_rows_of_the_table_after_its_offset():
    config = LearnedPositions(num_positions=9, offset=2)
    assert config.limit == 9
    module = config.build(6, rngs=nnx.Rngs(0))
    table = np.asarray(module.weight[...])
    assert table.shape == (11, 6)
    positions = np.array([[0, 1, 8], [3, 3, 0]])
    np.testing.assert_array_equal(module(jnp.asarray(positions)), table[positions + 2])
    assert module(jnp.asarray(positions), jnp.bfloat16).dtype == jnp.bfloat16


def test_sinusoids_are_those_of_the_paper():
    positions, width = np.array([[0, 1, 5], [7, 300, 2]]), 10
    expected = np.zeros((*positions.shape, width))
    for (b, t), i in ((place, i) for place in np.ndindex(positions.shape) for i in range(width // 2)):
        angle = positions[b, t] / 10000 ** (2 * i / width)
        expected[b, t, 2 * i : 2 * i + 2] = math.sin(angle), math.cos(angle)
    paper, halves = (SinusoidalPositions(layout).build(width, rngs=nnx.Rngs(0)) for layout in ("interleaved", "halves"))
    found = paper(jnp.asarray(positions))
    np.testing.assert_allclose(found, expected, atol=3e-5)
    np.testing.assert_array_equal(
        halves(jnp.asarray(positions)), np.concatenate([found[..., ::2], found[..., 1::2]], -1)
    )
    assert SinusoidalPositions().limit is None


@pytest.mark.parametrize("layout", ["interleaved", "halves"])
def test_products_of_sinusoids_depend_on_the_distance_alone(layout):
    module = SinusoidalPositions(layout, base=50.0).build(12, rngs=nnx.Rngs(0))
    rows = np.asarray(module(jnp.arange(40)[None]))[0]
    products = rows @ rows.T
    for distance in (0, 3, 17):
        np.testing.assert_allclose(np.diagonal(products, distance), products[0, distance], atol=1e-4)
    assert products[0, 3] < products[0, 0]


def bucket(offset: int, *, bidirectional: bool, num_buckets: int, max_distance: int) -> int:
    """Section 2.1 of the paper, and Mesh TensorFlow's `_relative_position_bucket`, one pair at a time."""
    first, behind = 0, -offset
    if bidirectional:
        num_buckets //= 2
        if behind < 0:
            first, behind = num_buckets, -behind
    elif behind < 0:
        behind = 0
    exact = num_buckets // 2
    if behind < exact:
        return first + behind
    share = np.float32(math.log(behind / exact)) / np.float32(math.log(max_distance / exact))
    return first + min(exact + math.floor(share * np.float32(num_buckets - exact)), num_buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (16, 1000)])
def test_relative_buckets_are_those_of_t5(bidirectional: bool, num_buckets: int, max_distance: int):
    config = RelativeBias(2, num_buckets, max_distance, bidirectional)
    expected = [
        bucket(d, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance)
        for d in range(-max_distance, max_distance + 1)
    ]
    assert config.buckets().tolist() == expected
    # Every bucket is used, but that of keys 0 places after the query.
    assert len(set(expected)) == (num_buckets - 1 if bidirectional else num_buckets)


def bias_of(config: PositionBias, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    return np.asarray(config.build(rngs=nnx.Rngs(0))(jnp.asarray(queries), jnp.asarray(keys)))


def test_relative_bias_is_looked_up_pair_by_pair():
    config = RelativeBias(num_heads=3, num_buckets=8, max_distance=10, bidirectional=True)
    weight = np.asarray(config.build(rngs=nnx.Rngs(0)).weight[...])
    queries, keys = np.array([[0, 1, 40], [7, 2, 3]]), np.array([[0, 1, 2, 60], [5, 6, 7, 8]])
    expected = np.zeros((2, 3, 3, 4), np.float32)
    for b, t, s in np.ndindex(2, 3, 4):
        offset = int(keys[b, s] - queries[b, t])
        expected[b, :, t, s] = weight[bucket(offset, bidirectional=True, num_buckets=8, max_distance=10)]
    np.testing.assert_array_equal(bias_of(config, queries, keys), expected)
    np.testing.assert_array_equal(bias_of(config, queries[:1], keys[0]), expected[:1])


def test_alibi_has_the_slopes_of_the_paper():
    np.testing.assert_allclose(Alibi(8).slopes(), [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256])
    np.testing.assert_allclose(Alibi(16).slopes()[:3], [1 / 2**0.5, 1 / 2, 1 / 2**1.5])
    # The authors' get_slopes(12): those of 8 heads, then every second one of 16, four of them.
    np.testing.assert_allclose(Alibi(12).slopes(), [*Alibi(8).slopes(), *Alibi(16).slopes()[0::2][:4]])
    for heads in range(1, 20):
        slopes = Alibi(heads).slopes()
        assert len(set(slopes)) == heads
        assert all(0 < slope < 1 for slope in slopes)


def test_alibi_falls_with_the_distance_on_both_sides():
    found = bias_of(Alibi(3), np.array([[3, 4]]), np.arange(6))
    expected = -Alibi(3).slopes()[:, None, None] * np.array([[3, 2, 1, 0, 1, 2], [4, 3, 2, 1, 0, 1]])
    np.testing.assert_allclose(bias_of(Alibi(3, scale=0.5), np.array([[3, 4]]), np.arange(6)), found / 2)
    np.testing.assert_allclose(found, expected[None], rtol=1e-6)


@pytest.mark.parametrize("config", [RelativeBias(4, 8, 20, True), Alibi(4)], ids=lambda c: type(c).__name__)
def test_a_bias_is_the_same_on_a_mesh_and_so_is_its_gradient(config: PositionBias):
    @jax.jit
    def value(queries, keys):
        graphdef, state = nnx.split(config.build(rngs=nnx.Rngs(0)))

        def total(state):
            bias = nnx.merge(graphdef, state)(queries, keys)
            return jnp.sum(jnp.sin(3 * bias)), bias

        return jax.value_and_grad(total, has_aux=True)(state)

    queries, keys = jnp.broadcast_to(jnp.arange(16), (4, 16)), jnp.arange(20)
    expected = value(queries, keys)
    for mesh in ({"data": 2, "tensor": 4}, {"fsdp": 2, "tensor": 2, "context": 2}):
        with jax.set_mesh(make_mesh(mesh)):
            found = value(shard(queries, "batch", "sequence"), shard(keys, None))
            for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
            assert "tensor" in str(found[0][1].sharding.spec)


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


LONGROPE = LongRopeScaling(
    short_factor=tuple(1 + 0.1 * i for i in range(PAIRS)),
    long_factor=tuple(2.0 + i for i in range(PAIRS)),
    original_max_positions=12,
    attention_factor=1.25,
)


@pytest.mark.parametrize("last", [3, 11, 12, 40])
def test_longrope_slows_each_pair_by_its_factor_and_a_row_decides_for_itself(last: int):
    """As the paper's formula in complex numbers; the factors are the long ones from the 13th token on."""
    x, others = vectors(3), vectors(3)
    positions = np.array([[0, 2, last], [0, 1, 2], [5, 30, 12]])
    rope = Rope(theta=THETA, scaling=LONGROPE)
    both = np.stack([x, others, x])
    found = np.asarray(rope.rotate(jnp.asarray(both[:, :, None]), jnp.asarray(positions)))[:, :, 0]
    for row, factors in enumerate(
        (LONGROPE.long_factor if last >= 12 else LONGROPE.short_factor, LONGROPE.short_factor, LONGROPE.long_factor)
    ):
        angles = positions[row][:, None] * np.array(PLAIN) / np.array(factors)
        turned = 1.25 * np.exp(1j * angles) * (both[row][:, :PAIRS] + 1j * both[row][:, PAIRS:])
        expected = np.concatenate([turned.real, turned.imag], axis=-1)
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-5)


def test_longrope_keeps_products_of_the_same_distance():
    """In a long row too: shifted by as much, queries and keys have the same product."""
    x, y, rope = vectors(1), vectors(1), Rope(theta=THETA, scaling=LONGROPE)
    near, far = (rotated(rope, np.concatenate([x, y]), np.array([start, start + 3])) for start in (20, 45))
    np.testing.assert_allclose(near[0] @ near[1], far[0] @ far[1], rtol=1e-4)


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
        (lambda: Rope(theta=10.0, scaling=None, rotary_dim=3), "rotary_dim=3 must be positive and even"),
        (lambda: LearnedPositions(0), "num_positions=0 must be at least 1"),
        (lambda: LearnedPositions(4, offset=-1), "offset=-1 must be at least 0"),
        (lambda: SinusoidalPositions(base=1.0), "base=1.0 must be above 1"),
        (lambda: SinusoidalPositions().build(7, rngs=nnx.Rngs(0)), "hidden_size=7 must be even"),
        (lambda: RelativeBias(0, 8, 20, True), "num_heads=0 must be at least 1"),
        (lambda: RelativeBias(2, 6, 20, True), "num_buckets=6 must be a multiple of 4"),
        (lambda: RelativeBias(2, 8, 4, False), "max_distance=4 must be above 4"),
        (lambda: Alibi(0), "num_heads=0 must be at least 1"),
        (lambda: Alibi(4, scale=0.0), "scale=0.0 must be above 0"),
        (lambda: LinearScaling(factor=0.5), "factor=0.5 must be at least 1"),
        (lambda: NTKScaling(factor=0.0), "factor=0.0 must be at least 1"),
        (
            lambda: LongRopeScaling((), (), 4, 1.0),
            "short_factor and long_factor must be a number above 0 for every pair",
        ),
        (lambda: LongRopeScaling((1.0, 0.0), (1.0, 1.0), 4, 1.0), "must be a number above 0 for every pair"),
        (lambda: LongRopeScaling((1.0,), (1.0, 1.0), 4, 1.0), "short_factor has 1 numbers and long_factor 2"),
        (lambda: LongRopeScaling((1.0,), (1.0,), 0, 1.0), "original_max_positions=0 must be at least 1"),
        (lambda: LongRopeScaling((1.0,), (1.0,), 4, 0.0), "attention_factor=0.0 must be above 0"),
        (
            lambda: GroupedQuery(1, 1, HEAD_DIM + 2, Rope(THETA, LONGROPE), False, False),
            f"have {PAIRS} numbers, and heads have {PAIRS + 1} rotary pairs",
        ),
        (lambda: Llama3Scaling(8.0, 4.0, 4.0, 512), "high_freq_factor=4.0 must be above low_freq_factor=4.0"),
    ],
)
def test_impossible_values(make, sentence: str):
    with pytest.raises(UserError, match=sentence):
        make()
