"""Attention kernels: rounding, memory, which of them is chosen and what they refuse (the formula: the file beside)."""

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


SEGMENTS = np.array([[0] * 5 + [1] * 20 + [2] * 14, [3] * 13 + [0] * 26])


@functools.partial(jax.jit, static_argnums=0)
def results(name: str, q, k, v, direction, mask: Mask):
    """The kernel's result, and its gradient in q, k and v along `direction`."""

    def value(q, k, v):
        return kernels.KERNELS[name].run(q, k, v, mask, scale=SCALE)

    out, pull = jax.vjp(value, q, k, v)
    return out, *pull(direction)


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


@pytest.mark.parametrize("length", [32, 29])
@pytest.mark.parametrize("begin", [0, 3, 11])
def test_blocks_of_a_cache_after_the_last_query_are_not_read(begin: int, length: int):
    """For each block of queries; beyond the block of keys with its last one stands what makes any result NaN."""
    q, k, v, _ = inputs(length, 2, queries=15)
    mask = Mask(query_places=begin + jnp.array([np.arange(15), np.arange(15) // 2]))
    whole = kernels.reference(q, k, v, mask, scale=SCALE)
    for queries in (12, 15):
        read = -(-(begin + queries) // 4) * 4
        keys, values = (x.at[:, :, read:].set(jnp.nan) for x in (k, v))
        found = kernels.blockwise_attention(q, keys, values, mask, scale=SCALE)
        np.testing.assert_allclose(found[:, :queries], whole[:, :queries], atol=1e-6)


@pytest.mark.slow
def test_bfloat16_is_as_near_as_the_reference_in_bfloat16():
    length, kv_heads, mask = 39, 2, Mask(segment_ids=jnp.asarray(SEGMENTS))
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


@pytest.mark.slow
@pytest.mark.parametrize("case", ["segments, grouped", "causal", "prefill"])
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
    with jax.set_mesh(make_mesh({"context": 2}, jax.devices()[:2])):
        assert [chosen("auto", 256, context_strategy=method) for method in ("ring", "all_gather")] == [
            "blockwise",
            "splash",
        ]
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


@pytest.mark.parametrize(
    ("name", "method", "sentence"),
    [
        ("cudnn", "all_gather", "a sequence split over mesh.context"),
        ("splash", "ring", r"a ring over mesh.context \(with compute.context='all_gather' it can\)"),
        ("splash", "all_gather", "a sequence of 256 in 8 parts, no multiple of 1024"),
    ],
)
def test_accelerated_kernels_refuse_a_split_sequence(name: str, method: str, sentence: str):
    q, k, v, _ = inputs(256, 2)
    with (
        jax.set_mesh(make_mesh({"context": 8})),
        pytest.raises(UserError, match=f"'{name}' cannot do {sentence}: take blockwise, or auto"),
    ):
        kernels.attend(q.astype(jnp.bfloat16), k, v, context_of(kernel=name, context_strategy=method), scale=SCALE)


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
