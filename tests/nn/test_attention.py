"""Attention kernels: the reference against plain numpy, every other kernel against the reference, and its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of

from llama_jax.config import UserError
from llama_jax.nn import GroupedQuery, Mask, Rope
from llama_jax.nn.attention import attend as kernels, blockwise
from llama_jax.parallel import make_mesh

BATCH, HEADS, HEAD_DIM = 2, 4, 8
SCALE = HEAD_DIM**-0.5


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks small enough that a few dozen positions span several, the last of them partly."""
    monkeypatch.setattr(blockwise, "MIN_QUERY_BLOCK", 12)
    monkeypatch.setattr(blockwise, "KEY_BLOCK", 8)


def inputs(length: int, kv_heads: int, *, queries: int | None = None, dtype=jnp.float32) -> tuple[jax.Array, ...]:
    """q, k, v and a random direction of the result."""
    q_shape = (BATCH, queries or length, HEADS, HEAD_DIM)
    kv_shape = (BATCH, kv_heads, length, HEAD_DIM)
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in (q_shape, kv_shape, kv_shape, q_shape))


def in_numpy(q: np.ndarray, k: np.ndarray, v: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Multi-head attention as the formula says, a head and a query at a time; float64."""
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        scores = np.array([q[b, t, n] @ k[b, s, n] for s in range(k.shape[1])]) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max()) * allowed[b, t]
        out[b, t, n] = weights / weights.sum() @ v[b, :, n]
    return out


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
def test_reference_is_the_formula(kv_heads: int, causal: bool):
    length = 7
    q, k, v, _ = inputs(length, kv_heads)
    segments = np.array([[0] * 7, [0, 0, 0, 1, 1, 1, 1]])
    mask = Mask(causal=causal, segment_ids=jnp.asarray(segments))
    allowed = segments[:, :, None] == segments[:, None]
    if causal:
        allowed &= np.tri(length, dtype=bool)
    # Query head n reads kv head n // group: with K = N that is plain multi-head attention.
    full_k, full_v = (np.repeat(np.asarray(x, np.float64), HEADS // kv_heads, axis=1).swapaxes(1, 2) for x in (k, v))
    expected = in_numpy(np.asarray(q, np.float64), full_k, full_v, allowed)
    np.testing.assert_allclose(kernels.reference(q, k, v, mask, scale=SCALE), expected, atol=2e-6)


SEGMENTS = np.array([[0] * 5 + [1] * 20 + [2] * 14, [3] * 13 + [0] * 26])
Q_INDEX = np.array([range(10, 23), range(22, 35)])
PLACES = np.array([range(10, 34), range(13, 37)])
CASES = {
    "causal, multi-head, odd length": (39, 4, None, Mask()),
    "segments, grouped": (39, 2, None, Mask(segment_ids=jnp.asarray(SEGMENTS))),
    "not causal, multi-query": (24, 1, None, Mask(causal=False)),
    "queries at places of a cache": (37, 2, 13, Mask(query_places=jnp.asarray(Q_INDEX))),
    "not causal, segments": (24, 2, None, Mask(causal=False, segment_ids=jnp.asarray(SEGMENTS[:, :24]))),
    "whole blocks of queries at places of a cache": (37, 2, 24, Mask(query_places=jnp.asarray(PLACES))),
    "window": (39, 2, None, Mask(window=11, segment_ids=jnp.asarray(SEGMENTS))),
    "window, not causal": (39, 2, None, Mask(window=5, causal=False)),
}
LONG_SEGMENTS = jnp.asarray(np.repeat([[1, 2, 3], [1, 2, 0]], [30, 100, 126], axis=1))
LONG_CASES = {
    "causal, multi-head": (256, 4, None, Mask()),
    "segments, grouped": (256, 2, None, Mask(segment_ids=LONG_SEGMENTS)),
    "window, multi-query": (256, 1, None, Mask(window=70, segment_ids=LONG_SEGMENTS)),
    "not causal, window": (256, 4, None, Mask(causal=False, window=40)),
}


@functools.partial(jax.jit, static_argnums=0)
def results(name: str, q, k, v, direction, mask: Mask):
    """The kernel's result, and its gradient in q, k and v along `direction`."""

    def value(q, k, v):
        return kernels.KERNELS[name].run(q, k, v, mask, scale=SCALE)

    out, pull = jax.vjp(value, q, k, v)
    return out, *pull(direction)


@pytest.mark.parametrize(
    ("name", "case"),
    [("blockwise", case) for case in CASES] + [("splash", case) for case in LONG_CASES],
)
def test_kernel_is_the_reference(name: str, case: str):
    length, kv_heads, queries, mask = (LONG_CASES if name == "splash" else CASES)[case]
    arrays = inputs(length, kv_heads, queries=queries)
    expected = results("reference", *arrays, mask)
    for array, wanted in zip(results(name, *arrays, mask), expected, strict=True):
        np.testing.assert_allclose(array, wanted, atol=5e-6)
        assert float(jnp.abs(wanted).max()) > 0.1


@pytest.mark.parametrize("last", [3, 7, 8, 20, 31])
def test_only_the_used_part_of_a_cache_is_read(last: int, monkeypatch: pytest.MonkeyPatch):
    """Beyond the first 8, 16 or 32 keys that reach the last query stands what makes any result NaN."""
    q, k, v, _ = inputs(32, 2, queries=2)
    mask = Mask(query_places=jnp.array([[last - 1, last], [0, 1]]))
    whole = kernels.reference(q, k, v, mask, scale=SCALE)
    monkeypatch.setattr(kernels, "PART_BYTES", k.nbytes // 5)
    part = next(size for size in (8, 16, 32) if size > last)
    k, v = (x.at[:, :, part:].set(jnp.nan) for x in (k, v))
    np.testing.assert_allclose(kernels.reference(q, k, v, mask, scale=SCALE), whole, atol=1e-6)


def test_a_window_is_the_formula():
    length, window = 9, 3
    q, k, v, _ = inputs(length, HEADS)
    places = np.arange(length)
    for causal in (True, False):
        near = np.abs(places[:, None] - places) < window
        allowed = np.broadcast_to(near & np.tri(length, dtype=bool) if causal else near, (BATCH, length, length))
        expected = in_numpy(*(np.asarray(x, np.float64) for x in (q, k.swapaxes(1, 2), v.swapaxes(1, 2))), allowed)
        mask = Mask(causal=causal, window=window)
        np.testing.assert_allclose(kernels.reference(q, k, v, mask, scale=SCALE), expected, atol=2e-6)


def test_bfloat16_is_as_near_as_the_reference_in_bfloat16():
    length, kv_heads, _, mask = CASES["segments, grouped"]
    exact = results("reference", *inputs(length, kv_heads), mask)
    rounded = inputs(length, kv_heads, dtype=jnp.bfloat16)
    for mine, plain, wanted in zip(
        results("blockwise", *rounded, mask), results("reference", *rounded, mask), exact, strict=True
    ):
        assert mine.dtype == jnp.bfloat16
        error, usual = (np.abs(np.asarray(x, np.float32) - wanted).max() for x in (mine, plain))
        assert error < 1.5 * usual, "the online softmax loses more than rounding does"


def temporary_bytes(name: str, length: int) -> int:
    compiled = results.lower(name, *inputs(length, 2), Mask()).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_the_gradient_is_linear_in_the_sequence(monkeypatch: pytest.MonkeyPatch):
    # As with the real sizes, the number of query blocks stays and their size grows.
    monkeypatch.setattr(blockwise, "MAX_QUERY_BLOCKS", 4)
    short, long = (temporary_bytes("blockwise", length) for length in (128, 256))
    assert long < 2.3 * short
    plain_short, plain_long = (temporary_bytes("reference", length) for length in (128, 256))
    assert plain_long > 3.5 * plain_short, "what the blocks avoid has to be visible, or this test shows nothing"
    assert long < plain_long / 4


@pytest.mark.parametrize("case", ["causal", "segments, grouped", "prefill"])
def test_no_masks_are_kept_for_a_scan_over_layers(case: str, monkeypatch: pytest.MonkeyPatch):
    """JAX computes what is the same in all layers once, before the scan: not all blocks of the mask, then."""
    for name, size in {"MAX_QUERY_BLOCKS": 4, "MIN_QUERY_BLOCK": 32, "KEY_BLOCK": 32}.items():
        monkeypatch.setattr(blockwise, name, size)

    def loss(scales, q, k, v, mask):
        layer = lambda x, scale: (kernels.blockwise_attention(scale * x, k, v, mask, scale=SCALE), None)  # noqa: E731
        return jax.lax.scan(jax.checkpoint(layer), q, scales)[0].sum()

    def temporary_bytes(length: int) -> int:
        segments, places = jnp.zeros((BATCH, length), jnp.int32), jnp.tile(jnp.arange(length), (BATCH, 1))
        masks = {"causal": {}, "segments, grouped": {"segment_ids": segments}, "prefill": {"query_places": places}}
        arguments = jnp.ones(3), *inputs(length, 2)[:3], Mask(**masks[case])
        return jax.jit(jax.grad(loss)).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(512) < 2.3 * temporary_bytes(256)


def test_kernels_are_chosen_by_name_and_length(monkeypatch: pytest.MonkeyPatch):
    def chosen(name: str, length: int, dtype=jnp.float32, **fields) -> str:
        q, k, _, _ = inputs(length, 2, dtype=dtype)
        return kernels.choose(q, k, context_of(kernel=name, **fields))

    assert chosen("auto", 12) == "reference"
    assert chosen("auto", 13) == "blockwise"
    assert (chosen("blockwise", 12), chosen("reference", 13)) == ("blockwise", "reference")
    monkeypatch.setattr(kernels, "platform", lambda: "tpu")
    assert chosen("auto", 128) == "splash"
    assert chosen("auto", 130) == "blockwise", "splash refuses it"
    assert chosen("auto", 128, query_places=jnp.zeros((BATCH, 128), int)) == "blockwise"
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    assert chosen("auto", 128) == "blockwise", "cuDNN has no float32"
    assert chosen("auto", 128, jnp.bfloat16) == "cudnn"


@pytest.mark.parametrize(
    ("name", "length", "sentence"),
    [
        (
            "flsh",
            128,
            "attention_kernel='flsh' does not exist: the kernels are auto, reference, blockwise, splash, cudnn",
        ),
        ("splash", 130, "attention_kernel='splash' cannot do a sequence of 130, no multiple of 128: take blockwise"),
        ("cudnn", 128, "attention_kernel='cudnn' cannot do float32: take blockwise, or auto"),
    ],
)
def test_a_kernel_refuses_by_name(name: str, length: int, sentence: str):
    q, k, v, _ = inputs(length, 2)
    with pytest.raises(UserError, match=sentence):
        kernels.attend(q, k, v, context_of(kernel=name), scale=SCALE)


def test_accelerated_kernels_refuse_a_split_sequence():
    q, k, v, _ = inputs(256, 2)
    with jax.set_mesh(make_mesh({"context": 8})):
        for name in ("splash", "cudnn"):
            with pytest.raises(UserError, match=f"'{name}' cannot do a sequence split over mesh.context"):
                kernels.attend(q.astype(jnp.bfloat16), k, v, context_of(kernel=name), scale=SCALE)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rope", "sentence"),
    [
        (0, 1, 8, None, "num_heads=0 must be at least 1"),
        (6, 4, 8, None, "num_kv_heads=4 does not divide num_heads=6: take one of 1, 2, 3, 6"),
        (4, 0, 8, None, "num_kv_heads=0 does not divide"),
        (4, 2, 7, Rope(theta=1e4, scaling=None), "head_dim=7 must be positive, and even"),
        (4, 2, 0, None, "head_dim=0 must be positive"),
    ],
)
def test_impossible_heads(heads: int, kv_heads: int, head_dim: int, rope: Rope | None, sentence: str):
    with pytest.raises(UserError, match=sentence):
        GroupedQuery(heads, kv_heads, head_dim, rope, qkv_bias=False, out_bias=False)


def test_odd_heads_are_possible_without_rotary_positions():
    assert GroupedQuery(4, 2, 7, None, qkv_bias=False, out_bias=False).head_dim == 7
