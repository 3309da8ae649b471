"""Random numbers of training are functions of places in the batch, whatever the mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of

from llama_jax.nn import draw, dropout, unzigzag, zigzag
from llama_jax.parallel import axes_of, make_mesh, shard

MESHES = [
    {"context": 8},
    {"context": 4, "tensor": 2},
    {"data": 2, "context": 4},
    {"context": 2, "fsdp": 2, "tensor": 2},
    {"data": 4, "tensor": 2},
]


def drawn(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> dict[str, jax.Array]:
    """Dropout of ones and uniform numbers, in the order of the text on every mesh."""

    def both(x: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        ctx = context_of(dropout_key=key)
        found = {"dropout": dropout(x, 0.3, ctx, "here", axes)}
        found["uniform"] = draw(jax.random.uniform, ctx, "there", x.shape, axes)
        assert axes_of(found["uniform"]) == axes_of(x), "drawn where it is used"
        return {name: unzigzag(y) for name, y in found.items()}

    return jax.jit(both)(zigzag(shard(jnp.ones(shape), *axes)), jax.random.key(3))


@pytest.mark.quick(
    "(4, 48, 6)-('batch', 'sequence', None)-{'data': 2, 'context': 4}",
    "(4, 16, 8)-('batch', 'sequence', 'mlp')-{'data': 4, 'tensor': 2}",
    "(3, 15, 5)-('batch', 'sequence', None)-{'context': 8}",
)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((4, 48, 6), ("batch", "sequence", None)),
        ((4, 16, 8), ("batch", "sequence", "mlp")),
        ((4, 32), ("batch", "sequence")),
        ((4, 24, 5), ("batch", "sequence", None)),  # on eight devices it is split in the order of the text
        ((3, 15, 5), ("batch", "sequence", None)),  # and this one not at all
    ],
    ids=str,
)
def test_every_token_draws_what_it_draws_on_one_device(mesh: dict[str, int], shape: Any, axes: Any):
    expected = drawn(shape, axes)
    with jax.set_mesh(make_mesh(mesh)):
        found = drawn(shape, axes)
    for name, value in expected.items():
        assert len(np.unique(value)) > 1
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_draw_of_one_device_is_jax_s_of_the_whole_array():
    """So that a run of before goes on as it would have."""
    ctx, shape = context_of(dropout_key=jax.random.key(1)), (2, 16, 8)
    for axes in (("batch", "sequence", None), ("batch", "heads", None)):
        expected = jax.random.uniform(ctx.random_key("here"), shape)
        np.testing.assert_array_equal(draw(jax.random.uniform, ctx, "here", shape, axes), expected)
    keep = jax.random.bernoulli(ctx.random_key("here"), 0.7, shape)
    np.testing.assert_array_equal(dropout(jnp.ones(shape), 0.3, ctx, "here") != 0, keep)
