"""What tests of a mixer do with one: run it with random parameters, decode with it, put it on a mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contexts import context_of
from flax import nnx
from jax.sharding import NamedSharding

from llama_jax.nn import ForwardContext
from llama_jax.nn.attention.context import unzigzag, zigzag
from llama_jax.parallel import make_mesh, shard

WIDTH, BATCH, LENGTH = 16, 8, 24


def values_of(config: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters by name, every one random and none small."""
    state = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: config.build(WIDTH, rngs=nnx.Rngs(0)))))
    rng = np.random.default_rng(seed)
    flat = {".".join(path): x.shape for path, x in nnx.traversals.flatten_mapping(state).items()}
    normal = {name: rng.normal(size=shape).astype(np.float32) for name, shape in flat.items()}
    return {name: 1 + 0.3 * x if "norm" in name else 0.3 * x for name, x in normal.items()}


def module_of(config: Any, values: dict[str, Any]) -> Any:
    """The module with these parameters, each where its own metadata says on the current mesh."""
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(WIDTH, rngs=nnx.Rngs(0))))
    named = {tuple(name.split(".")): jnp.asarray(value) for name, value in values.items()}
    nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(named))
    return nnx.merge(graph, state)


@functools.partial(jax.jit, static_argnums=0)
def run(config: Any, values: dict[str, Any], x: jax.Array, ctx: ForwardContext, positions: Any = None) -> jax.Array:
    places = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]) if positions is None else positions
    return module_of(config, values)(x, positions=places, ctx=ctx)[0]


def inputs(length: int = LENGTH, rows: int = BATCH, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, length, WIDTH)), jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 4))
def decode(config: Any, values: dict[str, Any], x: jax.Array, lengths: jax.Array, steps: int) -> jax.Array:
    """`steps` single tokens of each row b of x from position lengths[b] on, with what is before in the cache."""
    module = module_of(config, values)
    rows, total = x.shape[:2]

    def extend(cache: Any, start: jax.Array, size: int) -> tuple[Any, jax.Array]:
        index = start[:, None] + jnp.arange(size)
        piece = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, size))(x, start)
        y, cache, *_ = module(piece, positions=index, ctx=context_of(query_places=index), cache=cache)
        return cache, y

    # What is before: one padded piece, of which only lengths[b] count.
    cache, _ = extend(module.init_cache(rows, total, jnp.float32), jnp.zeros_like(lengths), total - steps)
    _, y = jax.lax.scan(lambda cache, step: extend(cache, lengths + step, 1), cache, jnp.arange(steps))
    return y[:, :, 0].swapaxes(0, 1)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(
    config: Any, values: dict[str, Any], x: jax.Array, direction: jax.Array, ctx: ForwardContext, positions: jax.Array
) -> Any:
    """The result, and the gradients of its losses and of itself along a direction."""

    def loss(values, x):
        y, _, *aux = module_of(config, values)(x, positions=positions, ctx=ctx)
        return (y * direction).sum() + sum(jax.tree.leaves(aux)), y

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(values, x)


def placed(config: Any, values: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Parameters where the module declares them on the current mesh."""
    abstract = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: config.build(WIDTH, rngs=nnx.Rngs(0)))))
    flat = {".".join(path): x for path, x in nnx.traversals.flatten_mapping(abstract).items()}
    mesh = jax.sharding.get_mesh()
    return {
        name: jax.device_put(value, NamedSharding(mesh, flat[name].sharding.spec)) for name, value in values.items()
    }


def documents(length: int = LENGTH) -> tuple[ForwardContext, jax.Array]:
    """Rows of two documents and some padding."""
    segments = np.repeat([[1, 2, 0]], [9, length - 11, 2], axis=1).repeat(BATCH, 0)
    positions = np.concatenate([np.arange(9), np.arange(length - 11), [0, 0]])[None].repeat(BATCH, 0)
    return context_of(segment_ids=jnp.asarray(segments)), jnp.asarray(positions)


def assert_sharded_is_unsharded(config: Any, *, atol: float = 1e-5) -> None:
    values, arrays = values_of(config), (inputs(), inputs(seed=2), *documents())
    expected = with_gradients(config, values, *arrays)
    with jax.set_mesh(make_mesh({"fsdp": 2, "tensor": 2, "context": 2})):
        arrays = jax.tree.map(lambda a: zigzag(shard(a, "batch", *(None,) * (a.ndim - 1))), arrays)
        (loss, y), (d_values, d_x) = with_gradients(config, placed(config, values), *arrays)
        found = (loss, unzigzag(y)), (d_values, unzigzag(d_x))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, atol=atol * max(1, float(jnp.abs(b).max())))


def assert_decodes_on_a_mesh(config: Any) -> None:
    values, x, lengths = values_of(config), inputs(), jnp.arange(BATCH) % 4 + 1
    expected = decode(config, values, x, lengths, 19)
    with jax.set_mesh(make_mesh({"data": 2, "tensor": 4})):
        found = decode(config, placed(config, values), shard(x, "batch", None, None), shard(lengths, "batch"), 19)
    np.testing.assert_allclose(np.asarray(found), expected, atol=5e-6)
