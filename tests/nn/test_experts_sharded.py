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
from llama_jax.nn.experts import exchange
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


@pytest.mark.quick("balanced over the batch-expert and fsdp")
@pytest.mark.parametrize(("kind", "name"), list(itertools.product(KINDS, MESHES)))
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


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_one_row_that_is_whole_on_every_device(dispatch: str):
    config = dataclasses.replace(KINDS["dropless"], dispatch=dispatch)
    expected, _ = run(config, rows=1)
    with jax.set_mesh(make_mesh({"expert": 2, "fsdp": 2, "tensor": 2})):
        assert_same(run(config, rows=1)[0], expected)


@dataclasses.dataclass(frozen=True)
class TwoOfEight(SoftmaxTopK):
    """A router that sends all tokens to the last two experts, and few to the others."""

    def route(self, logits, ctx):
        return super().route(logits + 4.0 * (jnp.arange(8) >= 6), ctx)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "room"),
    [("expert", 0.3), ("expert", 1.25), ("expert, data and tensor", 1.25)],
)
def test_a_device_with_most_of_the_rows_takes_them_in_rounds(name: str, room: float, monkeypatch):
    monkeypatch.setattr(exchange, "ROOM", room)
    monkeypatch.setattr(exchange, "LEAST", 1)
    config = dataclasses.replace(KINDS["biased"], router=TwoOfEight(2, True), load_balance_loss=0.0)
    expected, _ = run(config)
    most = ROWS * LENGTH * 2 * float(expected["experts_load"].max())  # on a device with one expert
    assert most > 3 * exchange.ROOM * ROWS * LENGTH * 2 / 8
    with jax.set_mesh(make_mesh(MESHES[name])):
        assert_same(run(config)[0], expected)


def test_rows_are_sent_as_ragged_all_to_all_documents_it():
    """The example of `jax.lax.ragged_all_to_all`, and rows of `into` that nothing is written to."""
    rows = jnp.asarray([[1.0], [2], [2], [3], [4], [0]])
    slices = [[0, 1], [0, 1]], [[1, 2], [1, 1]], [[0, 0], [1, 2]], [[1, 1], [2, 1]]

    @jax.jit
    @functools.partial(jax.shard_map, out_specs=jax.P("expert"))
    def send(rows, into, slices):
        return exchange.exchange(rows, into, exchange._Slices(*slices))

    with jax.set_mesh(make_mesh({"expert": 2}, jax.devices()[:2])):
        split = functools.partial(jax.sharding.reshard, out_shardings=jax.P("expert"))
        found = send(split(rows), split(jnp.full((8, 1), 9.0)), [split(jnp.asarray(s).reshape(-1)) for s in slices])
    assert found[:, 0].tolist() == [1, 3, 9, 9, 2, 2, 4, 9]
