"""A sequence split over devices: attention is exact, whichever way keys travel, and its work is in balance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from in_text_order import attention_and_gradients

from llama_jax.nn import ForwardContext, Mask
from llama_jax.nn.attention import attend as kernels, context
from llama_jax.parallel import make_mesh, shard

BATCH, LENGTH, HEADS, HEAD_DIM = 2, 48, 4, 8
SCALE = HEAD_DIM**-0.5
SEGMENTS = np.repeat([[1, 2, 3, 4], [1, 1, 2, 0]], [3, 20, 12, 13], axis=1)
MASKS = {
    "causal": Mask(),
    "segments": Mask(segment_ids=jnp.asarray(SEGMENTS)),
    "window": Mask(window=9),
    "window and segments": Mask(window=9, segment_ids=jnp.asarray(SEGMENTS)),
    "not causal": Mask(causal=False, segment_ids=jnp.asarray(SEGMENTS)),
}


def inputs(kv_heads: int) -> tuple[jax.Array, ...]:
    """q, k, v and a random direction of the result."""
    rng = np.random.default_rng(0)
    q_shape, kv_shape = (BATCH, LENGTH, HEADS, HEAD_DIM), (BATCH, kv_heads, LENGTH, HEAD_DIM)
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in (q_shape, kv_shape, kv_shape, q_shape))


@functools.partial(jax.jit, static_argnums=(0, 1))
def results(kernel: str, method: str, q, k, v, direction, mask: Mask):
    """Attention and its gradients along `direction`, all in the order of the text."""
    ctx = ForwardContext(mask, kernel=kernel, context_strategy=method)
    return attention_and_gradients(q, k, v, direction, ctx, scale=SCALE)


@pytest.mark.quick("2x4-ring-window and segments", "2x2x2-all_gather-segments")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("mesh", "method"),
    [
        ({"data": 2, "context": 4}, "ring"),
        ({"data": 2, "context": 2, "tensor": 2}, "all_gather"),
        ({"context": 8}, "ring"),
        ({"context": 8}, "all_gather"),
        ({"data": 2, "context": 2, "tensor": 2}, "ring"),
    ],
    ids=["2x4-ring", "2x2x2-all_gather", "8-ring", "8-all_gather", "2x2x2-ring"],
)
def test_exact_whichever_way_keys_travel(method: str, mask: str, mesh: dict[str, int]):
    kv_heads = 2 if "tensor" in mesh else 1
    arrays = inputs(kv_heads)
    expected = results("reference", "ring", *arrays, MASKS[mask])
    with jax.set_mesh(make_mesh(mesh)):
        q, k, v, direction = (shard(x, *(None,) * 4) for x in arrays)
        masked = jax.tree.map(lambda x: shard(x, None, None), MASKS[mask])
        found = results("blockwise", method, q, k, v, direction, masked)
        plain = results("reference", "ring", q, k, v, direction, masked)
    for one, other, wanted in zip(found, plain, expected, strict=True):
        assert float(jnp.abs(wanted).max()) > 0.1
        np.testing.assert_allclose(one, wanted, atol=5e-6)
        np.testing.assert_allclose(other, wanted, atol=5e-6)


@given(st.integers(1, 16))
def test_every_device_has_the_same_causal_work(size: int):
    order = context.chunk_order(size)
    assert sorted(order) == list(range(2 * size))
    # Chunk c sees c chunks before it.
    assert len({order[2 * device] + order[2 * device + 1] for device in range(size)}) == 1


def test_zigzag_is_a_permutation_and_comes_back():
    x = jnp.arange(2 * 32).reshape(2, 32)
    assert context.zigzag(x) is x, "without a mesh nothing is split"
    with jax.set_mesh(make_mesh({"context": 8})):
        assert context.zigzag(shard(x[:, :24], None, None)).shape == (2, 24), "24 is no multiple of 16: as it is"
        y = jax.jit(context.zigzag)(x)
        assert y.addressable_shards[0].data.tolist()[0] == [0, 1, 30, 31]
        np.testing.assert_array_equal(jax.jit(context.unzigzag)(y), x)


@pytest.mark.slow
def test_no_device_holds_all_keys_in_the_ring():
    """Temporaries per device fall as the context axis grows; gathering, they do not."""

    def temporary_bytes(method: str, devices: int) -> int:
        shape = (1, 2048, 2, 64)
        with jax.set_mesh(make_mesh({"context": devices}, jax.devices()[:devices])):
            q = shard(jnp.ones(shape), "batch", "sequence", None, None)
            k = shard(jnp.ones((1, 2, 2048, 64)), "batch", None, "sequence", None)
            ctx = ForwardContext(kernel="blockwise", context_strategy=method)
            attend = jax.jit(lambda q, k: kernels.attend(q, k, k, ctx, scale=1.0))
            return attend.lower(q, k).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes("ring", 8) < 0.7 * temporary_bytes("ring", 4)
    assert temporary_bytes("ring", 8) < 0.7 * temporary_bytes("all_gather", 8)
