"""Norms, feed-forwards and attentions against their formulas in numpy, and on a mesh against one device."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of
from flax import nnx
from jax.sharding import NamedSharding

from llama_jax.config import UserError, from_json, to_json
from llama_jax.nn import (
    MLP,
    CrossAttention,
    GatedLinearUnit,
    GroupedQuery,
    LayerNorm,
    LinearScaling,
    Mixer,
    RelativeBias,
    RMSNorm,
    Rope,
    SwiGLU,
    dropout,
)
from llama_jax.parallel import make_mesh, shard

BATCH, LENGTH, WIDTH = 4, 12, 16
ROPE = Rope(theta=10000.0, scaling=None)
PLAIN = GroupedQuery(num_heads=4, num_kv_heads=2, head_dim=8, rope=None, qkv_bias=True, out_bias=True)
CROSS = CrossAttention(num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True, out_bias=True)
Params = dict[str, Any]


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def parts(config: Any, width: int = WIDTH) -> tuple[Any, Any]:
    """What `nnx.split` gives of the piece, its parameters random and none small."""
    graphdef, state = nnx.split(config.build(width, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(state)
    rng = np.random.default_rng(1)
    values = [jnp.asarray(0.3 + rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    return graphdef, jax.tree.unflatten(tree, values)


def built(config: Any, width: int = WIDTH) -> tuple[Any, Params]:
    """The piece, and its parameters by dotted name in float64."""
    module = nnx.merge(*parts(config, width))
    flat = nnx.to_flat_state(nnx.state(module))
    return module, {".".join(map(str, path)): np.asarray(value[...], np.float64) for path, value in flat}


def test_layer_norm_is_the_formula():
    x = 3 + 5 * numbers(2, 3, WIDTH)
    for bias in (True, False):
        module, p = built(LayerNorm(eps=1e-2, bias=bias))
        expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-2) * p["weight"]
        np.testing.assert_allclose(module(jnp.asarray(x)), expected + p.get("bias", 0), atol=1e-5)
        assert ("bias" in p) == bias
        low = module(jnp.asarray(x, jnp.bfloat16))
        # Statistics of bfloat16 numbers in float32, rounded once.
        high = module(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))
        assert low.dtype == jnp.bfloat16
        np.testing.assert_array_equal(low, high.astype(jnp.bfloat16))
    offset, p = built(LayerNorm(eps=1e-2, bias=True, zero_centered=True))
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-2) * (1 + p["weight"])
    np.testing.assert_allclose(offset(jnp.asarray(x)), expected + p["bias"], atol=1e-5)


def test_rms_norm_rounds_before_or_after_its_weight():
    x = jnp.asarray(numbers(64, WIDTH), jnp.bfloat16)
    first, p = built(RMSNorm(eps=1e-6))
    last, _ = built(RMSNorm(eps=1e-6, cast_last=True))
    x_64 = np.asarray(x, np.float64)
    normal = x_64 / np.sqrt((x_64**2).mean(-1, keepdims=True) + 1e-6)
    error = lambda y: np.abs(np.asarray(y, np.float64) - normal * p["weight"]).max()  # noqa: E731
    assert error(last(x)) < error(first(x))
    np.testing.assert_allclose(first(x.astype(jnp.float32)), normal * p["weight"], atol=1e-5)
    np.testing.assert_allclose(last(x.astype(jnp.float32)), normal * p["weight"], atol=1e-5)


ACTIVATIONS = {
    "relu": lambda x: np.where(x > 0, x, 0),
    "relu_squared": lambda x: np.where(x > 0, x, 0) ** 2,
    "gelu": lambda x: x * np.vectorize(lambda v: 0.5 * math.erfc(-v / math.sqrt(2)))(x),
    "gelu_tanh": lambda x: x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": lambda x: 1 - 2 / (np.exp(2 * x) + 1),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forwards_are_their_formulas(activation):
    # Small enough that the two GELUs differ by more than the tolerance and nothing saturates.
    x = 0.3 * numbers(2, 3, WIDTH)
    formula = ACTIVATIONS[activation]
    for bias in (True, False):
        module, p = built(MLP(24, activation, bias))
        up = x @ p["up_proj.weight"] + p.get("up_proj.bias", 0)
        expected = formula(up) @ p["down_proj.weight"] + p.get("down_proj.bias", 0)
        found, aux = module(jnp.asarray(x), ctx=context_of())
        assert aux == {}
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=2e-5)

        module, p = built(GatedLinearUnit(24, activation, bias))
        up, gate = (x @ p[f"{name}.weight"] + p.get(f"{name}.bias", 0) for name in ("up_proj", "gate_proj"))
        expected = (formula(gate) * up) @ p["down_proj.weight"] + p.get("down_proj.bias", 0)
        np.testing.assert_allclose(module(jnp.asarray(x), ctx=context_of())[0], expected, atol=1e-4, rtol=2e-5)
        assert len(p) == (6 if bias else 3)


def test_the_gelus_differ_and_swiglu_is_the_gated_unit_of_silu():
    x = jnp.asarray(numbers(2, 3, WIDTH))
    run = lambda config: np.asarray(built(config)[0](x, ctx=context_of())[0])  # noqa: E731
    assert np.abs(run(MLP(24, "gelu", True)) - run(MLP(24, "gelu_tanh", True))).max() > 1e-4
    np.testing.assert_array_equal(run(SwiGLU(24, True)), run(GatedLinearUnit(24, "silu", True)))


def heads_of(x: np.ndarray, p: Params, name: str) -> np.ndarray:
    return np.einsum("btd,dnh->btnh", x, p[f"{name}.weight"]) + p.get(f"{name}.bias", 0)


def attention(q, k, v, allowed: np.ndarray, scale: float, softcap: float | None = None) -> np.ndarray:
    """Head by head; every kv head serves as many query heads as there are for it."""
    out = np.zeros(q.shape)
    for n in range(q.shape[2]):
        kv = n * k.shape[2] // q.shape[2]
        scores = scale * np.einsum("bth,bsh->bts", q[:, :, n], k[:, :, kv])
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max(-1, keepdims=True)) * allowed
        out[:, :, n] = weights / weights.sum(-1, keepdims=True) @ v[:, :, kv]
    return out


def normed(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


CAUSAL = np.tri(LENGTH, dtype=bool)
NEAR = np.abs(np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))) < 3
VARIANTS = {
    "multi-head": ({"num_kv_heads": 4}, CAUSAL),
    "multi-query": ({"num_kv_heads": 1}, CAUSAL),
    "a scale": ({"scale": 0.11}, CAUSAL),
    "window": ({"window": 3}, CAUSAL & NEAR),
    "window of one": ({"window": 1}, np.eye(LENGTH, dtype=bool)),
    "window, both ways": ({"window": 3}, NEAR),
    "normed heads": ({"qk_norm": RMSNorm(eps=1e-3)}, CAUSAL),
    "soft cap": ({"softcap": 1.5}, CAUSAL),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_grouped_queries_are_the_formula(variant: str):
    changes, allowed = VARIANTS[variant]
    config = dataclasses.replace(PLAIN, **changes)
    module, p = built(config)
    x = 0.3 * numbers(2, LENGTH, WIDTH)
    q, k, v = (heads_of(x, p, f"{name}_proj") for name in "qkv")
    if config.qk_norm is not None:
        q, k = normed(q, p["q_norm.weight"], 1e-3), normed(k, p["k_norm.weight"], 1e-3)
    out = attention(q, k, v, allowed, config.scale or 8**-0.5, config.softcap)
    expected = np.einsum("btnh,nhd->btd", out, p["o_proj.weight"]) + p["o_proj.bias"]
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
    ctx = context_of(causal=not allowed[0, 1:].any())
    found, cache = module(jnp.asarray(x), positions=positions, ctx=ctx)
    assert cache is None
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_heads_are_normed_before_they_turn():
    # Weights that differ within a pair: a norm after the turn would give another result.
    config = dataclasses.replace(PLAIN, qk_norm=LayerNorm(eps=1e-6, bias=True), rope=ROPE)
    module, p = built(config)
    x, positions = jnp.asarray(numbers(1, LENGTH, WIDTH)), jnp.arange(LENGTH)[None]
    q, k, v = (heads_of(np.asarray(x), p, f"{name}_proj") for name in "qkv")

    def turned(y: np.ndarray, name: str) -> np.ndarray:
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
        y = y * p[f"{name}.weight"] + p[f"{name}.bias"]
        angle = np.arange(LENGTH)[:, None] * 10000.0 ** (-np.arange(4) / 4)
        z = (y[..., :4] + 1j * y[..., 4:]) * np.exp(1j * angle)[:, None]
        return np.concatenate([z.real, z.imag], -1)

    out = attention(turned(q, "q_norm"), turned(k, "k_norm"), v, CAUSAL, 8**-0.5)
    expected = np.einsum("btnh,nhd->btd", out, p["o_proj.weight"]) + p["o_proj.bias"]
    np.testing.assert_allclose(module(x, positions=positions, ctx=context_of())[0], expected, atol=1e-4)


def test_cross_attention_is_the_formula():
    """Each target sees the source of its own segment, all of it; the keys are made once."""
    module, p = built(CROSS)
    x, source = 0.3 * numbers(2, 5, WIDTH), 0.3 * numbers(2, 7, WIDTH, seed=2)
    targets = np.array([[1, 1, 1, 2, 2], [1, 1, 1, 1, 1]])
    sources = np.array([[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0]])
    ctx = context_of(causal=False, segment_ids=jnp.asarray(targets), key_segment_ids=jnp.asarray(sources))
    q, k, v = heads_of(x, p, "q_proj"), heads_of(source, p, "k_proj"), heads_of(source, p, "v_proj")
    out = attention(q, k, v, targets[:, :, None] == sources[:, None], 8**-0.5)
    expected = np.einsum("btnh,nhd->btd", out, p["o_proj.weight"]) + p["o_proj.bias"]
    keys = module.keys(jnp.asarray(source))
    assert {name: a.shape for name, a in keys.items()} == {"k": (2, 2, 7, 8), "v": (2, 2, 7, 8)}
    np.testing.assert_allclose(module(jnp.asarray(x), keys, ctx=ctx), expected, atol=1e-4)
    one = ctx.with_mask(segment_ids=ctx.mask.segment_ids[:, 3:4])
    np.testing.assert_allclose(module(jnp.asarray(x[:, 3:4]), keys, ctx=one), expected[:, 3:4], atol=1e-4)
    with pytest.raises(ValueError, match="sees all of its source"):
        module(jnp.asarray(x), keys, ctx=ctx.with_mask(causal=True))


@functools.partial(jax.jit, static_argnums=0)
def decoded(graphdef: Any, state: Any, x: jax.Array) -> jax.Array:
    """The row read as a prompt of 5, whose last 2 are padding, then token by token."""
    module, rows = nnx.merge(graphdef, state), x.shape[0]

    def extend(cache, begin, x, is_token=None):
        places = begin + jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        ctx = context_of(query_places=places, is_token=valid)
        return module(x, positions=places, ctx=ctx, cache=cache)

    valid = jnp.broadcast_to(jnp.arange(5) < 3, (rows, 5))
    prompt, cache = extend(module.init_cache(rows, LENGTH, x.dtype), 0, x[:, :5].at[:, 3:].set(7), valid)
    step = lambda cache, t: extend(cache, t, jax.lax.dynamic_slice_in_dim(x, t, 1, 1))[::-1]  # noqa: E731
    _, ys = jax.lax.scan(step, cache, jnp.arange(3, LENGTH))
    return jnp.concatenate([prompt[:, :3], ys[:, :, 0].swapaxes(0, 1)], axis=1)


@pytest.mark.parametrize("changes", [{"window": 3}, {"qk_norm": RMSNorm(1e-5), "softcap": 5.0, "scale": 1.0}])
def test_cached_is_the_whole_row(changes: dict[str, Any]):
    config = dataclasses.replace(PLAIN, rope=dataclasses.replace(ROPE, rotary_dim=4), **changes)
    graphdef, state = parts(config)
    x = jnp.asarray(0.3 * numbers(2, LENGTH, WIDTH))
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
    expected, _ = nnx.merge(graphdef, state)(x, positions=positions, ctx=context_of())
    np.testing.assert_allclose(decoded(graphdef, state, x), expected, atol=2e-5)


def test_dropout_keeps_the_mean_and_is_off_outside_of_training():
    x = jnp.asarray(1 + numbers(8, 64, 32))
    for config in (MLP(64, "relu", True, dropout=0.3), GatedLinearUnit(64, "relu", True, dropout=0.3)):
        assert config.needs_rng
        assert not dataclasses.replace(config, dropout=0.0).needs_rng
        module, _ = built(config, 32)
        plain, _ = built(dataclasses.replace(config, dropout=0.0), 32)
        still, _ = module(x, ctx=context_of())
        np.testing.assert_array_equal(still, plain(x, ctx=context_of())[0])
        moved, _ = module(x, ctx=context_of(dropout_key=jax.random.key(3)))
        assert float(jnp.abs(moved - still).mean() / jnp.abs(still).mean()) > 0.05
        np.testing.assert_allclose(moved.mean(), still.mean(), rtol=0.02)


def test_attention_weights_are_dropped_in_training_alone():
    config = dataclasses.replace(PLAIN, dropout=0.4, rope=None)
    assert config.needs_rng
    x, positions = jnp.asarray(0.1 * numbers(64, LENGTH, WIDTH)), jnp.zeros((64, LENGTH), jnp.int32)
    module, _ = built(config)
    plain, _ = built(dataclasses.replace(config, dropout=0.0))
    run = lambda module, **fields: module(x, positions=positions, ctx=context_of(**fields))[0]  # noqa: E731
    np.testing.assert_array_equal(run(module), run(plain))
    moved = run(module, dropout_key=jax.random.key(0))
    assert float(jnp.abs(moved - run(plain)).mean()) > 0.05
    np.testing.assert_allclose(moved.mean((0, 1)), run(plain).mean((0, 1)), atol=0.25)
    cross, _ = built(dataclasses.replace(CROSS, dropout=0.4))
    training = context_of(causal=False, dropout_key=jax.random.key(0))
    keys = cross.keys(x)
    assert not np.allclose(cross(x, keys, ctx=training), cross(x, keys, ctx=context_of(causal=False)))
    both = dataclasses.replace(PLAIN, dropout=0.4)
    assert not np.allclose(cross(x, keys, ctx=training), built(both)[0](x, positions=positions, ctx=training)[0])


@functools.partial(jax.jit, static_argnums=0)
def block(graphdefs: tuple, states: tuple, x, segments, key):
    """Value and gradients of an encoder-decoder block made of these pieces."""
    places = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])

    def value(states, x):
        norm, bias, mixer, cross, mlp, gated = (nnx.merge(*part) for part in zip(graphdefs, states, strict=True))
        x = shard(x, "batch", "sequence", None)
        ctx = context_of(segment_ids=segments, position_bias=bias(places[:1], places[0]), dropout_key=key)
        y, _ = mixer(norm(x), positions=places, ctx=ctx)
        other = context_of(causal=False, segment_ids=segments, key_segment_ids=segments, dropout_key=key)
        y += cross(norm(x + y), cross.keys(x), ctx=other)
        y += mlp(x + y, ctx=ctx)[0]
        y += gated(norm(y), ctx=ctx)[0]
        return jnp.sum(jnp.sin(y)), y

    return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(states, x)


class BiasOfWidth:
    """A position bias, built like the other pieces."""

    def build(self, width: int, *, rngs: nnx.Rngs):
        return RelativeBias(4, 8, 16, bidirectional=False).build(rngs=rngs)


@pytest.mark.quick("fsdp")
@pytest.mark.parametrize("mesh", [{"data": 4, "tensor": 2}, {"fsdp": 2, "tensor": 4}], ids=["4x2", "fsdp"])
def test_on_a_mesh_everything_is_the_same_and_so_is_what_is_dropped(mesh: dict[str, int]):
    mixer = dataclasses.replace(
        PLAIN, rope=Rope(1e4, None, 4), qk_norm=LayerNorm(1e-5, True), window=5, softcap=20.0, dropout=0.3
    )
    pieces = (
        LayerNorm(1e-5, True),
        BiasOfWidth(),
        mixer,
        dataclasses.replace(CROSS, qkv_bias=False, dropout=0.3),  # a bias of its keys would have no gradient
        MLP(24, "gelu", True, dropout=0.3),
        GatedLinearUnit(24, "relu_squared", False, dropout=0.3),
    )
    graphdefs, states = zip(*(parts(piece) for piece in pieces), strict=True)
    states = jax.tree.map(lambda a: 0.3 * a, states)
    x = jnp.asarray(numbers(BATCH, LENGTH, WIDTH))
    segments = jnp.asarray(np.repeat([[1, 2]], [5, 7], axis=1).repeat(BATCH, 0))
    key = jax.random.key(5)
    expected = block(graphdefs, states, x, segments, key)
    devices = make_mesh(mesh)
    with jax.set_mesh(devices):
        abstract = jax.eval_shape(lambda: [nnx.split(piece.build(WIDTH, rngs=nnx.Rngs(0)))[1] for piece in pieces])
        place = lambda value, a: jax.device_put(value, NamedSharding(devices, a.sharding.spec))  # noqa: E731
        placed = jax.tree.map(place, states, tuple(abstract))
        x, segments = (shard(a, *(None,) * a.ndim) for a in (x, segments))
        found = block(graphdefs, placed, x, segments, key)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.abs(other).max())
        assert scale > 1e-3
        np.testing.assert_allclose(one, other, atol=2e-5 * scale + 1e-6)


@pytest.mark.parametrize("rate", [0.25, 0.9])
def test_the_share_that_is_dropped(rate: float):
    x = jnp.ones((64, 64, 64))
    y = dropout(x, rate, context_of(dropout_key=jax.random.key(1)), "here")
    np.testing.assert_allclose((y == 0).mean(), rate, atol=0.01)
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)
    other = dropout(x, rate, context_of(dropout_key=jax.random.key(1)), "there")
    assert bool((y != other).any()), "each place draws for itself"


def test_a_window_costs_what_it_sees():
    assert dataclasses.replace(PLAIN, window=8).score_flops(100.0) == PLAIN.score_flops(8.0)
    assert dataclasses.replace(PLAIN, window=8).score_flops(5.0) == PLAIN.score_flops(5.0)
    assert CROSS.score_flops(5.0) == PLAIN.score_flops(5.0)


def test_a_config_of_before_reads_as_it_was():
    """Options that came later have defaults: what an older version saved means what it meant."""
    new = dataclasses.replace(PLAIN, rope=ROPE)
    data = to_json(new)
    for name in ("scale", "qk_norm", "window", "softcap", "dropout"):
        del data[name]
    del data["rope"]["rotary_dim"]
    assert from_json(Mixer, data) == new
    every = dataclasses.replace(new, qk_norm=LayerNorm(1e-5, False), window=4, softcap=30.0, scale=1.0, dropout=0.1)
    every = dataclasses.replace(every, rope=Rope(1e4, LinearScaling(2.0), 4))
    assert from_json(Mixer, to_json(every)) == every


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LayerNorm(eps=0.0, bias=True), "eps=0.0 must be above 0"),
        (lambda: RMSNorm(eps=-1.0), "eps=-1.0 must be above 0"),
        (lambda: MLP(0, "relu", True), "intermediate_size=0 must be at least 1"),
        (lambda: GatedLinearUnit(8, "relu", True, dropout=1.0), "dropout=1.0 must be at least 0 and below 1"),
        (lambda: dataclasses.replace(PLAIN, window=0), "window=0 must be at least 1"),
        (lambda: dataclasses.replace(PLAIN, softcap=0.0), "softcap=0.0 must be above 0"),
        (lambda: dataclasses.replace(PLAIN, scale=-1.0), "scale=-1.0 must be above 0"),
        (lambda: dataclasses.replace(PLAIN, dropout=-0.1), "dropout=-0.1 must be at least 0 and below 1"),
        (lambda: dataclasses.replace(PLAIN, rope=Rope(1e4, None, 10)), "rope.rotary_dim=10 must be at most head_dim=8"),
        (lambda: dataclasses.replace(PLAIN, rope=ROPE, head_dim=7), "head_dim=7 must be positive, and even for rotary"),
        (lambda: dataclasses.replace(CROSS, num_kv_heads=3), "num_kv_heads=3 does not divide num_heads=4"),
        (lambda: dataclasses.replace(CROSS, dropout=2.0), "dropout=2.0 must be at least 0 and below 1"),
    ],
)
def test_impossible_values(make, sentence: str):
    with pytest.raises(UserError, match=sentence):
        make()


def test_a_bias_for_other_heads_is_refused():
    module, _ = built(PLAIN)
    x = jnp.asarray(numbers(1, LENGTH, WIDTH))
    ctx = context_of(position_bias=jnp.zeros((1, 2, LENGTH, LENGTH)))
    with pytest.raises(UserError, match=r"heads.*4|4.*heads"):
        module(x, positions=jnp.arange(LENGTH)[None], ctx=ctx)
