"""Recurrent networks, Mamba-2, the delta rule, the n-gram model: formulas, the state as a cache, documents, devices."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of
from delta_formula import delta_in_numpy
from flax import nnx

from llama_jax.config import UserError
from llama_jax.nn import GRU, LSTM, BidirectionalRNN, ElmanRNN, GatedDeltaNet, Mamba2, Mixer, NGram, mamba
from llama_jax.parallel import make_mesh, shard, spec
from llama_jax.planning import Program, read_collectives

WIDTH, ROWS, LENGTH = 8, 4, 13
# With a projection to the width behind, and without.
MIXERS = {
    "elman": ElmanRNN(state_size=6),
    "lstm": LSTM(state_size=8),
    "gru": GRU(state_size=5),
    "delta": GatedDeltaNet(num_key_heads=2, num_value_heads=4, key_dim=3, value_dim=5, conv_kernel=3, eps=1e-2),
    "bigram": NGram(order=2, hidden_size=8),
    "4-gram": NGram(order=4, hidden_size=6),
    "mamba": Mamba2(4, 2, state_size=3, num_groups=2, conv_kernel=3, bias=True, min_step=0.2, max_step=1.5),
}
ENCODER = BidirectionalRNN(network=ElmanRNN(state_size=3))
BOTH = MIXERS | {"two elmans": ENCODER}
SEGMENTS = np.repeat([[1, 2, 0], [3, 1, 2]], [4, 7, 2], axis=1).repeat(2, 0).astype(np.int32)

ATOL = dict.fromkeys(BOTH, 2e-6) | {"mamba": 1e-5}  # of products of three linear maps

Weights = dict[str, np.ndarray]


@pytest.fixture(autouse=True, scope="module")
def short_chunks() -> Iterator[None]:
    """Of Mamba-2: the texts have several, the last of them shorter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba, "CHUNK", 4)
        yield


def template(config: Mixer) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: config.build(WIDTH, rngs=nnx.Rngs(params=0))))


def weights_of(config: Mixer) -> Weights:
    """Random weights by name, none of them small, biases too."""
    rng = np.random.default_rng(0)
    flat = nnx.to_flat_state(template(config)[1])
    return {".".join(map(str, path)): rng.normal(size=v.shape, scale=0.6).astype(np.float32) for path, v in flat}


def module_of(config: Mixer, weights: Any) -> Any:
    graphdef, state = template(config)
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), [weights[name] for name in names]))


@functools.partial(jax.jit, static_argnums=0)
def run(config: Mixer, weights: Any, x: jax.Array, cache: Any = None, **fields: Any) -> tuple[jax.Array, Any]:
    """(result, cache) of a mixer; `fields` are the context's."""
    ctx = context_of(causal=not isinstance(config, BidirectionalRNN), **fields)
    return module_of(config, weights)(x, positions=jnp.zeros(x.shape[:2], jnp.int32), ctx=ctx, cache=cache)


def inputs(rows: int = ROWS, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(rows, length, WIDTH)).astype(np.float32)


def on_mesh(x: np.ndarray) -> jax.Array:
    return shard(jnp.asarray(x), "batch", *(None,) * (x.ndim - 1))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def in_numpy(config: Mixer, weights: Weights, x: np.ndarray) -> np.ndarray:
    """The formulas for one text [T, D], a place at a time, in float64."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    if isinstance(config, NGram):
        y = np.stack([ngram_in_numpy(config, w, x, t) for t in range(len(x))])
        return y @ w["down_proj.weight"] + w["down_proj.bias"] if "down_proj.weight" in w else y
    if isinstance(config, Mamba2):
        return mamba_in_numpy(config, w, x)
    if isinstance(config, GatedDeltaNet):
        return delta_in_numpy(config, w, x)
    if isinstance(config, BidirectionalRNN):
        left = states_in_numpy(config.network, w, "left", x)
        right = states_in_numpy(config.network, w, "right", x[::-1])[::-1]
        y = np.concatenate([left, right], axis=-1)
    else:
        y = states_in_numpy(config, w, "cell", x)
    return y @ w["o_proj.weight"] if "o_proj.weight" in w else y


def ngram_in_numpy(config: NGram, w: Weights, x: np.ndarray, t: int) -> np.ndarray:
    hidden = w["up_proj.bias"].copy()
    for back in range(min(config.order - 1, t + 1)):
        hidden += x[t - back] @ w["up_proj.weight"][:, back]
    return np.tanh(hidden)


def mamba_in_numpy(config: Mamba2, w: Weights, x: np.ndarray) -> np.ndarray:
    projected = {
        name: np.tensordot(x, w[f"{name}_proj.weight"], 1) + w[f"{name}_proj.bias"]
        for name in ("z", "x", "b", "c", "dt")
    }
    state, found = np.zeros((config.num_heads, config.head_dim, config.state_size)), []
    group = [head * config.num_groups // config.num_heads for head in range(config.num_heads)]

    def convolved(name: str, t: int) -> np.ndarray:
        kernel = w[f"{name}_conv.weight"]
        back = range(min(config.conv_kernel, t + 1))
        y = sum(kernel[..., config.conv_kernel - 1 - i] * projected[name][t - i] for i in back)
        return (y + w[f"{name}_conv.bias"]) * sigmoid(y + w[f"{name}_conv.bias"])

    for t in range(len(x)):
        u, b, c = (convolved(name, t) for name in "xbc")
        dt = np.clip(np.log1p(np.exp(projected["dt"][t] + w["dt_bias"])), config.min_step, config.max_step)
        decay = np.exp(-np.exp(w["a_log"]) * dt)
        state = decay[:, None, None] * state + (dt[:, None] * u)[..., None] * b[group][:, None]
        y = (state * c[group][:, None]).sum(-1) + w["skip"][:, None] * u
        y = (y * projected["z"][t] * sigmoid(projected["z"][t])).reshape(config.num_groups, -1)
        y = y / np.sqrt((y * y).mean(-1, keepdims=True) + config.eps)
        found.append(y.reshape(w["gated_norm"].shape) * w["gated_norm"])
    return np.tensordot(np.stack(found), w["o_proj.weight"], 2) + w["o_proj.bias"]


def states_in_numpy(config: Mixer, w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    of_input, of_state = w[f"{name}.input_proj.weight"], w[f"{name}.state_proj.weight"]
    bias, h = w[f"{name}.input_proj.bias"], np.zeros(len(of_state))
    c, found = np.zeros_like(h), []
    for x_t in x:
        a, u = x_t @ of_input + bias, h @ of_state
        if isinstance(config, ElmanRNN):
            h = np.tanh(a + u)
        elif isinstance(config, LSTM):
            i, f, g, o = np.split(a + u, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            (a_r, a_z, a_n), (u_r, u_z, u_n) = np.split(a, 3), np.split(u, 3)
            z = sigmoid(a_z + u_z)
            h = (1 - z) * np.tanh(a_n + sigmoid(a_r + u_r) * u_n) + z * h
        found.append(h)
    return np.stack(found)


@pytest.mark.parametrize("name", BOTH)
def test_is_the_formula(name: str):
    config, weights, x = BOTH[name], weights_of(BOTH[name]), inputs()
    found, _ = run(config, weights, x)
    assert found.shape == x.shape
    np.testing.assert_allclose(found, [in_numpy(config, weights, row) for row in x], atol=ATOL[name])


@pytest.mark.quick("lstm", "4-gram", "mamba")
@pytest.mark.parametrize("name", BOTH)
def test_packed_documents_are_separate_documents(name: str):
    """Each document as if it stood alone; so is the padding behind the last, of which nothing is asked."""
    config, weights, x = BOTH[name], weights_of(BOTH[name]), inputs()
    found = np.asarray(run(config, weights, x, segment_ids=SEGMENTS)[0])
    for row, segments, y in zip(x, SEGMENTS, found, strict=True):
        for segment in set(segments) - {0}:
            here = segments == segment
            np.testing.assert_allclose(y[here], in_numpy(config, weights, row[here]), atol=ATOL[name])


def test_an_encoder_does_not_see_padding():
    config, weights, x = ENCODER, weights_of(ENCODER), inputs()
    lengths = np.array([13, 5, 1, 8])
    found, _ = run(config, weights, x, is_token=np.arange(LENGTH) < lengths[:, None])
    for row, length, y in zip(x, lengths, found, strict=True):
        np.testing.assert_allclose(y[:length], in_numpy(config, weights, row[:length]), atol=2e-6)


MESH = {"data": 2, "fsdp": 2, "context": 2}


@pytest.mark.quick("lstm-None", "delta-None", "4-gram-None", "mamba-mesh13")
@pytest.mark.parametrize(("name", "mesh"), list(itertools.product(MIXERS, (None, MESH))))
def test_continued_with_the_cache_is_the_whole_text(name: str, mesh: dict[str, int] | None):
    """Rows of different lengths, padded, twice; then token by token."""
    config, weights, x = MIXERS[name], weights_of(MIXERS[name]), inputs()
    whole = np.asarray(run(config, weights, x)[0])
    with jax.set_mesh(make_mesh(mesh)) if mesh else contextlib.nullcontext():
        cache = jax.jit(lambda: module_of(config, weights).init_cache(ROWS, 99, jnp.float32))()
        lengths = np.zeros(ROWS, int)
        for new, width in (([4, 5, 1, 2], 6), ([0, 6, 1, 5], 6), *[([1] * ROWS, 1)] * 2):
            part = np.full((ROWS, width, WIDTH), 7.0, np.float32)  # padding that would be noticed
            for row in range(ROWS):
                part[row, : new[row]] = x[row, lengths[row] : lengths[row] + new[row]]
            index, valid = lengths[:, None] + np.arange(width), np.arange(width) < np.array(new)[:, None]
            inputs_BTD = shard(jnp.asarray(part), "batch", "sequence", None)
            y, cache = run(
                config,
                weights,
                inputs_BTD,
                cache,
                query_places=jnp.asarray(index),
                is_token=None if width == 1 else shard(jnp.asarray(valid), "batch", None),
            )
            assert y.sharding == inputs_BTD.sharding, "a block adds them"
            for row in range(ROWS):
                expected = whole[row, lengths[row] : lengths[row] + new[row]]
                np.testing.assert_allclose(np.asarray(y)[row, : new[row]], expected, atol=ATOL[name])
            lengths += new


@pytest.mark.parametrize("name", MIXERS)
def test_the_cache_does_not_grow_with_the_text(name: str):
    config = MIXERS[name]

    def shapes(length: int, dtype: Any) -> Any:
        caches = jax.eval_shape(lambda: config.build(WIDTH, rngs=nnx.Rngs(params=0)).init_cache(3, length, dtype))
        return [(a.shape, a.dtype) for a in jax.tree.leaves(caches)]

    assert shapes(10, jnp.bfloat16) == shapes(10_000, jnp.bfloat16)
    size = sum(np.prod(shape) for shape, _ in shapes(10, jnp.bfloat16)) / 3
    states = {"elman": 6, "lstm": 2 * 8, "gru": 5, "bigram": 0, "4-gram": 2 * WIDTH}
    states |= {"delta": 4 * 3 * 5 + 2 * 2 * (3 + 3 + 10), "mamba": 4 * 2 * 3 + 2 * (4 * 2 + 2 * 2 * 3)}
    assert size == states[name]
    if not isinstance(config, NGram | Mamba2):  # of whose caches last inputs are a part
        assert {dtype for _, dtype in shapes(10, jnp.bfloat16)} == {jnp.dtype("float32")}


@pytest.mark.quick("lstm", "delta", "4-gram")
@pytest.mark.parametrize("name", BOTH)
def test_padding_teaches_nothing_whatever_it_is(name: str):
    """Also in a row that has nothing else: weights learn what they learn without it."""
    config, weights, x = BOTH[name], weights_of(BOTH[name]), inputs()
    segments = SEGMENTS.copy()
    segments[-1] = 0

    told = (segments > 0)[..., None]

    @jax.jit
    @jax.grad
    def gradient(weights: Weights, x: jax.Array) -> jax.Array:
        return (run(config, weights, x, segment_ids=segments)[0] * told).sum()

    expected = gradient(weights, x)
    found = gradient(weights, np.where(told, x, 1e30).astype(np.float32))
    for key, value in expected.items():
        assert np.abs(value).max() > 0.01
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.quick("lstm", "delta", "4-gram")
@pytest.mark.parametrize("name", BOTH)
def test_gradients_reach_what_may_be_seen(name: str):
    config, weights, x = BOTH[name], weights_of(BOTH[name]), inputs(rows=1)
    segments = SEGMENTS[-1:]
    direction = np.random.default_rng(2).normal(size=WIDTH)
    jacobian = jax.jit(jax.jacrev(lambda x: run(config, weights, x, segment_ids=segments)[0][0] @ direction))(x)
    size = np.abs(np.asarray(jacobian)[:, 0]).max(-1)  # [of t, from s]
    allowed = segments == segments.T
    if name in MIXERS:
        allowed &= np.tri(LENGTH, dtype=bool)
    if isinstance(config, NGram):
        allowed &= ~np.tri(LENGTH, k=1 - config.order, dtype=bool)
    np.testing.assert_array_equal(size > 0, allowed)


@pytest.mark.parametrize("name", BOTH)
def test_the_order_of_rows_does_not_matter(name: str):
    config, weights, x = BOTH[name], weights_of(BOTH[name]), inputs()
    order = np.array([2, 0, 3, 1])
    found, _ = run(config, weights, x, segment_ids=SEGMENTS)
    permuted, _ = run(config, weights, x[order], segment_ids=SEGMENTS[order])
    np.testing.assert_array_equal(permuted, found[order])


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(config: Mixer, weights: Any, x: jax.Array, segment_ids: jax.Array):
    def loss(weights: Any, x: jax.Array) -> jax.Array:
        y, _ = run(config, weights, x, segment_ids=segment_ids)
        return jnp.square(y - 0.3).sum()

    return jax.value_and_grad(loss, argnums=(0, 1))(weights, x)


@pytest.mark.quick("lstm-mesh0", "4-gram-mesh3")
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("lstm", {"data": 8}),
        ("delta", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("two elmans", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("4-gram", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("mamba", {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
)
def test_eight_devices_compute_what_one_does(name: str, mesh: dict[str, int]):
    config, weights = BOTH[name], weights_of(BOTH[name])
    arguments = inputs(rows=8), SEGMENTS.repeat(2, 0)
    expected = loss_and_gradient(config, weights, *arguments)
    with jax.set_mesh(make_mesh(mesh)):
        axes = {".".join(map(str, path)): v.get_metadata("axes") for path, v in nnx.to_flat_state(template(config)[1])}
        placed = {
            key: jax.device_put(value, jax.NamedSharding(jax.sharding.get_mesh(), spec(*axes[key], shape=value.shape)))
            for key, value in weights.items()
        }
        x, segments = (on_mesh(a) for a in arguments)
        found = loss_and_gradient(config, placed, x, segments)
        assert found[1][1].addressable_shards[0].data.shape[0] * mesh["data"] * mesh.get("fsdp", 1) == 8
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # Mamba's gradients in float32 are themselves up to 1.8e-5 of their size away from those in float64.
        np.testing.assert_allclose(np.asarray(a), b, atol=2e-5 * float(jnp.abs(b).max()), rtol=2e-6)


@pytest.mark.quick("lstm-mesh0")
@pytest.mark.parametrize(
    ("name", "mesh"), [("lstm", {"data": 8}), ("delta", {"data": 8}), ("mamba", {"data": 4, "tensor": 2})]
)
def test_devices_do_not_talk_at_every_place(name: str, mesh: dict[str, int]):
    """The gradient of a recurrence's weight is summed over the devices once, not in the loop over places."""
    config, weights = MIXERS[name], weights_of(MIXERS[name])
    with jax.set_mesh(make_mesh(mesh)):
        x, segments = (on_mesh(a) for a in (inputs(rows=8), SEGMENTS.repeat(2, 0)))
        text = loss_and_gradient.lower(config, weights, x, segments).compile().as_text()
    assert "while(" in text
    collectives = read_collectives(Program(text), mesh)
    assert "all-reduce" in {c.kind for c in collectives}
    assert {c.loops for c in collectives} == {()}


@pytest.mark.parametrize(("name", "limit"), [("lstm", 0.02), ("mamba", 0.2)])
def test_bfloat16_inputs_and_a_float32_state(name: str, limit: float):
    config, weights, x = MIXERS[name], weights_of(MIXERS[name]), inputs()
    exact, _ = run(config, weights, x)
    cache = module_of(config, weights).init_cache(ROWS, LENGTH, jnp.bfloat16)
    half, cache = run(config, weights, x.astype(jnp.bfloat16), cache)
    assert half.dtype == jnp.bfloat16
    states = [cache["state"]] if name == "mamba" else jax.tree.leaves(cache)
    assert {a.dtype for a in states} == {jnp.dtype("float32")}
    assert 1e-4 < np.abs(half.astype(jnp.float32) - exact).max() < limit


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"causal": False}, "attention=GRU never sees what comes later.*BidirectionalRNN"),
        ({"prefix": np.ones((1, 8), int)}, "attention=GRU cannot do a prefix that is seen whole"),
        ({"position_bias": np.ones((1, 1, 8, 8), np.float32)}, "attention=GRU cannot do relative positions"),
        ({"window": 3}, "attention=GRU cannot do a window"),
    ],
)
def test_what_a_recurrence_cannot_do(fields: dict[str, Any], sentence: str):
    module, x = module_of(GRU(5), weights_of(GRU(5))), jnp.asarray(inputs(1, 8))
    with pytest.raises(UserError, match=sentence):
        module(x, positions=jnp.zeros((1, 8), int), ctx=context_of(**fields))


@pytest.mark.parametrize("name", ["elman", "4-gram", "two elmans", "mamba"])
def test_no_recurrence_over_a_split_sequence(name: str):
    config = BOTH[name]
    with (
        jax.set_mesh(make_mesh({"data": 4, "context": 2})),
        pytest.raises(UserError, match=r"cannot do a sequence split over mesh\.context"),
    ):
        jax.eval_shape(lambda: run(config, weights_of(config), jnp.asarray(inputs(4, 8))))


def test_a_bidirectional_network_is_for_encoders():
    module, x = module_of(ENCODER, weights_of(ENCODER)), jnp.asarray(inputs())
    with pytest.raises(UserError, match="BidirectionalRNN sees what comes later"):
        module(x, positions=jnp.zeros((ROWS, LENGTH), int), ctx=context_of())
    with pytest.raises(UserError, match="BidirectionalRNN reads a text from both ends and cannot continue it"):
        module.init_cache(1, 10, jnp.float32)


@pytest.mark.parametrize(
    ("config", "change", "sentence"),
    [
        (GRU(5), {"state_size": 0}, "state_size=0 must be at least 1"),
        (MIXERS["delta"], {"num_value_heads": 3}, "num_value_heads=3 must be a multiple of num_key_heads=2"),
        (MIXERS["delta"], {"eps": 0.0}, "eps=0.0 must be above 0"),
        (NGram(2, 5), {"order": 1}, "order=1 must be at least 2"),
        (NGram(2, 5), {"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        (MIXERS["mamba"], {"num_groups": 3}, "num_groups=3 must divide num_heads=4"),
        (MIXERS["mamba"], {"max_step": 0.1}, "max_step=0.1 must be at least min_step=0.2"),
    ],
)
def test_impossible_configs(config: Mixer, change: dict[str, int], sentence: str):
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(config, **change)


@pytest.mark.parametrize("chunk", [1, 3, 13])
def test_chunks_of_any_length_are_the_recurrence(chunk: int):
    """Also with documents that begin inside of a chunk, and tokens that change no state."""
    rng = np.random.default_rng(0)
    x, b, c = (rng.normal(size=(2, LENGTH, *dims)).astype(np.float32) for dims in ((4, 2), (2, 3), (2, 3)))
    decay, state = -rng.exponential(size=(2, LENGTH, 4)), rng.normal(size=(2, 4, 2, 3))
    starts, groups = rng.random((2, LENGTH)) < 0.2, np.array([0, 0, 1, 1])
    x[:, 5], decay[:, 5] = 0, 0
    arguments = map(jnp.array, (x, np.float32(decay), b, c, groups, starts, np.float32(state)))
    y, last = mamba.state_space(*arguments, chunk)
    for t in range(LENGTH):
        state = np.where(starts[:, t, None, None, None], 0, state) * np.exp(decay[:, t])[..., None, None]
        state = state + x[:, t, ..., None] * b[:, t, groups][:, :, None]
        np.testing.assert_allclose(y[:, t], (state * c[:, t, groups][:, :, None]).sum(-1), atol=1e-5)
    np.testing.assert_allclose(last, state, atol=1e-5)
