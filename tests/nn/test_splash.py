"""Splash attention, interpreted: soft caps, sinks and a context axis are those of the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.nn import ForwardContext, Mask
from llama_jax.nn.attention import attend as kernels, context
from llama_jax.parallel import make_mesh, shard

LENGTH, HEADS, SCALE = 512, 2, 0.4
SEGMENTS = jnp.asarray(np.repeat([[1, 2, 3]], [70, 250, 192], axis=1), jnp.int32)
CASES = {
    "all of it": (Mask(window=100, segment_ids=SEGMENTS), 1.5, True),
    "causal": (Mask(), None, False),
    "both ways": (Mask(causal=False, segment_ids=SEGMENTS), None, False),
    "a window both ways": (Mask(causal=False, window=60), None, True),
}


def inputs() -> tuple[jax.Array, ...]:
    """q, k, v, sinks, and a random direction of the result."""
    rng = np.random.default_rng(0)
    shapes = (1, LENGTH, HEADS, 8), (1, HEADS, LENGTH, 8), (1, HEADS, LENGTH, 8), (1, HEADS, 1, 1)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (*shapes, shapes[0]))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def results(kernel: str, softcap: float | None, with_sinks: bool, arrays, mask: Mask):
    """Result and gradients of `attend` in the order of the text, on the current mesh."""
    *arrays, direction = arrays
    ctx = ForwardContext(mask, kernel=kernel, context_strategy="all_gather")

    def value(q, k, v, sinks):
        place = lambda x: context.zigzag(x.swapaxes(1, 2)).swapaxes(1, 2)  # noqa: E731
        placed, options = jax.tree.map(context.zigzag, ctx), {"sinks": sinks} if with_sinks else {}
        y = kernels.attend(context.zigzag(q), place(k), place(v), placed, scale=SCALE, softcap=softcap, **options)
        return context.unzigzag(y)

    out, pull = jax.vjp(value, *arrays)
    return out, *pull(shard(direction, "batch", "sequence", "heads", None))


def check(case: str, mesh: dict[str, int]) -> None:
    mask, softcap, with_sinks = CASES[case]
    expected = results("reference", softcap, with_sinks, inputs(), mask)
    with jax.set_mesh(make_mesh(mesh, jax.devices()[: np.prod(list(mesh.values()), dtype=int)])):
        placed = jax.tree.map(lambda x: shard(x, *(None,) * x.ndim), (inputs(), mask))
        found = results("splash", softcap, with_sinks, *placed)
    for one, wanted in zip(found, expected, strict=True):
        assert float(jnp.abs(wanted).max()) > 1e-3 or (not with_sinks and wanted is expected[-1])
        np.testing.assert_allclose(one, wanted, atol=5e-6)


def test_a_context_axis_changes_nothing():
    check("all of it", {"context": 2})


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 1}, {"context": 4, "tensor": 2}], ids=["one device", "eight"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_reference(case: str, mesh: dict[str, int]):
    check(case, mesh)


def test_gathered_gradients_are_summed_in_float32():
    """In bfloat16 the small parts would be lost beside the large one."""
    with jax.set_mesh(make_mesh({"context": 8})):
        x, direction = (shard(jnp.zeros((1, 16, 1), jnp.bfloat16), None, "sequence", None) for _ in range(2))

        def local(x, _):
            weight = jnp.where(jax.lax.axis_index("context") == 0, 256.0, 0.75).astype(x.dtype)
            return jax.vjp(lambda x: context.gathered(x, 1), x)[1](jnp.full((1, 16, 1), weight))[0]

        found = jax.jit(jax.shard_map(local, out_specs=jax.typeof(x).sharding.spec, check_vma=False))(x, direction)
    np.testing.assert_array_equal(found, np.full((1, 16, 1), 262, jnp.bfloat16))  # 261.25, rounded once
