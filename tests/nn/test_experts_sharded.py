"""Experts on eight devices compute what they compute on one, whichever way tokens reach them."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of
from flax import nnx

from llama_jax.nn import Experts, GShardRouter, SigmoidTopK, SoftmaxTopK, SwitchRouter
from llama_jax.nn.attention.context import unzigzag, zigzag
from llama_jax.parallel import axes_of, make_mesh, shard

WIDTH, ROWS, LENGTH = 12, 8, 16
MESHES = {
    "expert": {"expert": 8},
    "expert, data and tensor": {"expert": 2, "data": 2, "tensor": 2},
    "expert and fsdp": {"expert": 4, "fsdp": 2},
    "expert and context": {"expert": 2, "context": 2, "fsdp": 2},
}
V3 = SigmoidTopK(
    top_k=2, normalize=True, scaling=2.5, num_groups=4, top_groups=2, bias_update_rate=0.1
)  # fmt: skip
KINDS = {
    "dropless": Experts(8, 16, V3, "silu", gated=True, num_shared=1, load_balance_loss=0.1, router_z_loss=0.1),
    # Few places, so that they are sent; and as many as tokens, so that tokens are gathered.
    "small capacity": Experts(8, 16, GShardRouter(), "relu", gated=False, capacity_factor=0.75, load_balance_loss=0.1),
    "all places": Experts(
        8, 16, SwitchRouter(jitter=0.1), "gelu_tanh", gated=True, dispatch="capacity", router_z_loss=0.1
    ),
    "balanced over the batch": Experts(
        8, 16, SwitchRouter(jitter=0.0), "relu", gated=False, load_balance_loss=0.1, balance_over="batch"
    ),
    "balanced over layers": Experts(
        8, 16, SoftmaxTopK(2, True), "silu", gated=True, load_balance_loss=0.1, balance_over="layers"
    ),
    "biased": Experts(8, 16, SoftmaxTopK(2, True, bias=True), "quick_gelu", gated=True, bias=True, limit=1.0),
}


def stored(config: Experts) -> nnx.State:
    """The module's state as it is stored on the current mesh; the same values on each."""

    @jax.jit
    def init():
        return nnx.state(config.build(WIDTH, rngs=nnx.Rngs(params=jax.random.key(0))))

    return init()


def run(config: Experts, rows: int = ROWS):
    """Output, auxiliary arrays and gradients by path on the current mesh, of rows with padding at their end."""
    graphdef = nnx.split(nnx.eval_shape(lambda: config.build(WIDTH, rngs=nnx.Rngs(params=0))))[0]
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(rows, LENGTH, WIDTH)), jnp.float32)
    segments = jnp.asarray(np.arange(LENGTH)[None] < rng.integers(9, LENGTH + 1, (rows, 1)), jnp.int32)
    direction = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    params, rest = nnx.split_state(stored(config), nnx.Param, ...)

    @jax.jit
    def f(params, rest, x, segments, direction, key):
        def loss(params, x):
            module = nnx.merge(graphdef, params, rest)
            ctx = context_of(segment_ids=segments, dropout_key=key if config.needs_rng else None)
            y, aux = module(x, ctx=ctx)
            losses = [v.prod(0).sum() if "product" in k else v for k, v in aux.items() if "loss" in k or "product" in k]
            return (y * direction).sum() + sum(losses), (y, aux)

        gradient, (y, aux) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return gradient, unzigzag(y), aux

    split = [zigzag(shard(a, "batch", "sequence", *[None] * (a.ndim - 2))) for a in (x, segments, direction)]
    (d_params, d_x), y, aux = f(params, rest, *split, jax.random.key(3))
    flat = {jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(d_params)}
    return {"y": y, "x": unzigzag(d_x)} | flat | aux, params


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name != "dropped_share":
            assert np.abs(value).max() > 0, f"{name} is zero: the comparison would show nothing"
        np.testing.assert_allclose(np.asarray(found[name]), value, atol=2e-5, rtol=2e-5, err_msg=name)


@functools.cache
def of_one_device(kind: str) -> dict[str, jax.Array]:
    return run(KINDS[kind])[0]


# Quickly: each mesh with one kind, each kind on one mesh.
QUICKLY = {("dropless", name) for name in MESHES} | {(kind, "expert and fsdp") for kind in KINDS}
QUICKLY |= {("balanced over layers", "expert and context"), ("balanced over the batch", "expert and context")}
QUICKLY |= {("biased", "expert, data and tensor")}  # a device adds its part of a bias, or adds it once
CASES = [
    pytest.param(*case, marks=() if case in QUICKLY else pytest.mark.slow) for case in itertools.product(KINDS, MESHES)
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_eight_devices_are_one(kind: str, name: str):
    config = KINDS[kind]
    with jax.set_mesh(make_mesh(MESHES[name])):
        found, params = run(config)
        sizes = MESHES[name]
        up = params["experts"]["up_proj"]["weight"][...]
        parts = sizes["expert"] * sizes.get("fsdp", 1) * sizes.get("tensor", 1)
        assert up.addressable_shards[0].data.size * parts == up.size
        assert "expert" in axes_of(jax.eval_shape(lambda: shard(jnp.zeros((ROWS, LENGTH)), "batch", "sequence")))[0]
    assert_same(found, of_one_device(kind))


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_one_row_that_is_whole_on_every_device(dispatch: str):
    config = dataclasses.replace(KINDS["dropless"], dispatch=dispatch)
    expected, _ = run(config, rows=1)
    with jax.set_mesh(make_mesh({"expert": 2, "fsdp": 2, "tensor": 2})):
        assert_same(run(config, rows=1)[0], expected)
