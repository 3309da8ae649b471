"""Attention sinks: a key with a score and no value, by every kernel, on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of

from llama_jax.config import UserError
from llama_jax.nn import Mask
from llama_jax.nn.attention import attend as kernels, blockwise, context
from llama_jax.parallel import make_mesh, shard

LENGTH, SCALE = 32, 0.5
MASKS = {"causal": {}, "window": {"window": 5}, "documents": {"window": 9}}
SEGMENTS = jnp.asarray(np.repeat([[1, 2, 0], [1, 1, 2]], [14, 11, 7], axis=1), jnp.int32)


def inputs() -> tuple[jax.Array, ...]:
    """q, k, v, sinks, and a random direction of the result."""
    rng = np.random.default_rng(0)
    shapes = (2, LENGTH, 4, 8), (2, 2, LENGTH, 8), (2, 2, LENGTH, 6), (1, 4, 1, 1), (2, LENGTH, 4, 6)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def fields_of(name: str) -> dict:
    return MASKS[name] | ({"segment_ids": SEGMENTS} if name == "documents" else {})


def with_one_key_more(q, k, v, sinks, mask: Mask):
    """The formula over the keys and one more, whose score is the sink and whose value is 0."""
    k, v = (jnp.repeat(x, 2, axis=1) for x in (k, v))
    scores = jnp.where(mask.allowed(0, LENGTH, 0, LENGTH)[:, None], SCALE * jnp.einsum("btnh,bnsh->bnts", q, k), -1e30)
    scores = jnp.concatenate([scores, jnp.broadcast_to(sinks, (*scores.shape[:3], 1))], axis=-1)
    return jnp.einsum("bnts,bnsh->btnh", jax.nn.softmax(scores)[..., :-1], v)


def found(kernel: str, method: str, mask: str):
    """Result and gradients of `attend` in the order of the text."""
    *arrays, direction = inputs()
    ctx = context_of(True, kernel=kernel, context_strategy=method, **fields_of(mask))

    def value(q, k, v, sinks):
        place = lambda x: context.zigzag(x.swapaxes(1, 2)).swapaxes(1, 2)  # noqa: E731
        placed = jax.tree.map(context.zigzag, ctx)
        y = kernels.attend(context.zigzag(q), place(k), place(v), placed, scale=SCALE, sinks=sinks)
        return context.unzigzag(y)

    def both(arrays, direction):
        out, pull = jax.vjp(value, *arrays)
        return out, *pull(shard(direction, "batch", "sequence", "heads", None))

    return jax.jit(both)(arrays, direction)


@functools.cache
def expected(mask: str):
    *arrays, direction = inputs()
    out, pull = jax.vjp(lambda *arrays: with_one_key_more(*arrays, Mask(True, **fields_of(mask))), *arrays)
    return out, *pull(direction)


def check(results, mask: str) -> None:
    for one, wanted in zip(results, expected(mask), strict=True):
        assert float(jnp.abs(wanted).max()) > 0.1
        np.testing.assert_allclose(one, wanted, atol=5e-6)


@pytest.mark.quick("reference-documents", "blockwise-documents")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kernel", ["reference", "blockwise"])
def test_kernels_are_the_formula(kernel: str, mask: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blockwise, "MIN_QUERY_BLOCK", 12)
    monkeypatch.setattr(blockwise, "KEY_BLOCK", 8)
    check(found(kernel, "ring", mask), mask)


@pytest.mark.quick("mesh0-blockwise-ring")
@pytest.mark.parametrize(
    ("mesh", "kernel", "method"),
    [
        ({"data": 2, "tensor": 4}, "blockwise", "ring"),
        ({"context": 4, "tensor": 2}, "blockwise", "ring"),
        ({"data": 2, "context": 4}, "blockwise", "all_gather"),
        ({"context": 4, "tensor": 2}, "reference", "ring"),
    ],
)
def test_a_mesh_changes_nothing(mesh: dict[str, int], kernel: str, method: str):
    with jax.set_mesh(make_mesh(mesh)):
        results = found(kernel, method, "documents")
    check(results, "documents")


def test_a_kernel_without_them_refuses_by_name():
    q, k, v, sinks, _ = inputs()
    with pytest.raises(UserError, match="attention sinks: take blockwise"):
        kernels.attend(q, k, v, context_of(True, kernel="cudnn"), scale=SCALE, sinks=sinks)
