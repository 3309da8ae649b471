"""What experts must be, whoever routes: the sum over a token's choices, the same whichever way it is computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of
from flax import nnx

from llama_jax.config import UserError
from llama_jax.nn import Experts, GShardRouter, SigmoidTopK, SoftmaxTopK, SwitchRouter
from llama_jax.nn.experts import groups

WIDTH, ROWS, LENGTH = 6, 3, 20
MIXTRAL = Experts(8, 10, SoftmaxTopK(2, normalize=True), "silu", gated=True)
SWITCH = Experts(4, 10, SwitchRouter(jitter=0.0), "relu", gated=False, capacity=3)
GSHARD = Experts(4, 10, GShardRouter(), "gelu_tanh", gated=True, capacity_factor=0.8)
QWEN2 = dataclasses.replace(MIXTRAL, num_shared=1, shared_size=7, shared_gate=True)
# The limit is below most values: both are clamped.
GPT_OSS = Experts(8, 10, SoftmaxTopK(2, True, bias=True), "quick_gelu", gated=True, bias=True, limit=0.5)
V3 = Experts(
    8, 10, SigmoidTopK(2, True, 2.5, 4, 2, 0.01), "silu", gated=True, num_shared=2, load_balance_loss=0.1
)  # fmt: skip


@functools.cache
def split(config: Experts):
    """The module's structure and its parameters, all of them large."""
    module = config.build(WIDTH, rngs=nnx.Rngs(params=jax.random.key(0)))
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    return graphdef, params, rest


@functools.partial(jax.jit, static_argnums=0)
def _call(graphdef, params, rest, x, ctx):
    return nnx.merge(graphdef, params, rest)(x, ctx=ctx)


def call(config: Experts, x, params=None, **fields):
    graphdef, own, rest = split(config)
    return _call(graphdef, own if params is None else params, rest, x, context_of(**fields))


def inputs(rows: int = ROWS, length: int = LENGTH) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(rows, length, WIDTH)), jnp.float32)


def routing(config: Experts, x):
    graphdef, params, rest = split(config)
    found = nnx.merge(graphdef, params, rest).router(x, ctx=context_of())
    return np.asarray(found.experts), np.asarray(found.gates), np.asarray(found.probabilities)


def expert(config: Experts, params, i, x: np.ndarray) -> np.ndarray:
    """One expert of one token, in float64."""
    parts = {name: p for name, p in params["experts"].items() if p}
    w = {name: np.asarray(p["weight"][...], np.float64)[i] for name, p in parts.items()}
    b = {name: np.asarray(p["bias"][...])[i] if config.bias else 0.0 for name, p in parts.items()}
    act = {"relu": lambda a: np.maximum(a, 0), "silu": lambda a: a / (1 + np.exp(-a))}
    act["gelu_tanh"] = lambda a: 0.5 * a * (1 + np.tanh((2 / np.pi) ** 0.5 * (a + 0.044715 * a**3)))
    act["quick_gelu"] = lambda a: a / (1 + np.exp(-1.702 * a))
    f, up = act[config.activation], x @ w["up_proj"] + b["up_proj"]
    gate = x @ w["gate_proj"] + b["gate_proj"] if config.gated else None
    if config.limit is not None:
        gate, up = np.minimum(gate, config.limit), np.clip(up, -config.limit, config.limit) + 1
    return (f(up) if gate is None else f(gate) * up) @ w["down_proj"] + b["down_proj"]


def plain(config: Experts, x, limits=None) -> tuple[np.ndarray, np.ndarray]:
    """Token by token; and which assignments are kept where an expert takes `limits[row]` of a row."""
    params, (experts, weights, _) = split(config)[1], routing(config, x)
    y, kept = np.zeros(x.shape), np.zeros(experts.shape, bool)
    for row in range(x.shape[0]):
        taken = np.zeros(config.num_experts, int)
        for choice in range(experts.shape[-1]):
            for t in range(x.shape[1]):
                i = experts[row, t, choice]
                if limits is None or taken[i] < limits[row]:
                    kept[row, t, choice] = True
                    y[row, t] += weights[row, t, choice] * expert(config, params, i, np.asarray(x[row, t]))
                taken[i] += 1
    return y, kept


def assert_close(found, expected) -> None:
    """Within float32's rounding of the largest value: what is summed is as large where its sum is small."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def by(config: Experts, how: str) -> Experts:
    return dataclasses.replace(config, dispatch=how)


@pytest.mark.quick("mixtral-capacity", "switch-capacity", "gpt_oss-dropless")
@pytest.mark.parametrize("how", ["dropless", "capacity"])
@pytest.mark.parametrize("config", [MIXTRAL, SWITCH, GSHARD, GPT_OSS], ids=["mixtral", "switch", "gshard", "gpt_oss"])
def test_output_is_the_sum_over_the_kept_choices(config: Experts, how: str):
    """Dropped: what comes last to an expert, by choice and then by position. It adds nothing."""
    x = inputs()
    limits = {SWITCH: [3] * ROWS, GSHARD: [8] * ROWS}.get(config)
    expected, kept = plain(config, x, limits)
    y, aux = call(by(config, how), x)
    assert_close(y, expected)
    np.testing.assert_allclose(aux["dropped_share"], 1 - kept.mean(), atol=1e-6)
    if limits is not None:
        assert 0.05 < 1 - kept.mean() < 0.6
        assert (np.asarray(y)[~kept.any(-1)] == 0).all()
        assert config is GSHARD or not kept.any(-1).all(), "some tokens have to be dropped altogether"


@pytest.mark.quick("2")
@pytest.mark.parametrize("config", [QWEN2, V3, SWITCH, GSHARD, GPT_OSS], ids=range(5))
def test_dispatches_have_one_result_and_one_gradient(config: Experts):
    x, direction = inputs(), jnp.asarray(np.random.default_rng(2).normal(size=(ROWS, LENGTH, WIDTH)))
    segments = jnp.asarray(np.arange(LENGTH)[None] < np.array([[20], [13], [5]]), jnp.int32)

    def loss(params, x, how):
        y, aux = call(by(config, how), x, params, segment_ids=segments)
        return (y * direction).sum() + aux.get("loss.load_balance", 0.0)

    grad = jax.value_and_grad(loss, argnums=(0, 1))
    (expected, d_expected), (found, d_found) = (grad(split(config)[1], x, how) for how in ("capacity", "dropless"))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(d_found), jax.tree.leaves(d_expected), strict=True):
        assert np.abs(b).max() > 0.01
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_a_gated_expert_for_all_tokens():
    """Qwen1.5-MoE's: sigmoid(x g) times down(silu(gate(x)) * up(x)) of a width of its own, besides the chosen ones."""
    x, params = inputs(), split(QWEN2)[1]
    w = {name: np.asarray(p["weight"][...]) for name, p in params["shared"].items()}
    g = np.asarray(params["shared_gate"]["weight"][...])
    assert (w["up_proj"].shape, g.shape) == ((WIDTH, 7), (WIDTH, 1))
    gate = x @ w["gate_proj"]
    shared = (gate / (1 + np.exp(-gate)) * (x @ w["up_proj"])) @ w["down_proj"] / (1 + np.exp(-(x @ g)))
    assert_close(call(QWEN2, x)[0], plain(QWEN2, x)[0] + shared)


@pytest.mark.quick("switch")
@pytest.mark.parametrize("config", [MIXTRAL, SWITCH], ids=["mixtral", "switch"])
def test_gradients_are_those_of_every_expert_on_every_token(config: Experts):
    """Of all products, weighted: what no dispatch is needed for."""
    graphdef, params, rest = split(config)
    x, direction = inputs(), np.random.default_rng(2).normal(size=(ROWS, LENGTH, WIDTH))
    kept = plain(config, x, None if config is MIXTRAL else [3] * ROWS)[1]

    def dense(params, x):
        module = nnx.merge(graphdef, params, rest)
        found = module.router(x, ctx=context_of())
        w = {name: p[...] for name, p in module.experts.params().items()}
        up = jnp.einsum("btd,edf->btef", x, w["up"])
        inner = jax.nn.silu(jnp.einsum("btd,edf->btef", x, w["gate"])) * up if config.gated else jax.nn.relu(up)
        weight = (jax.nn.one_hot(found.experts, config.num_experts) * (found.gates * kept)[..., None]).sum(2)
        return (jnp.einsum("btef,efd,bte->btd", inner, w["down"], weight) * direction).sum()

    expected = jax.jit(jax.grad(dense, argnums=(0, 1)))(params, x)
    found = jax.grad(lambda params, x: (call(config, x, params)[0] * direction).sum(), argnums=(0, 1))(params, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(b).max() > 0.01
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


@pytest.mark.quick("4")
@pytest.mark.parametrize("block", [1, 4, 64])
def test_sorted_rows_of_any_block(block: int, monkeypatch):
    """Groups far smaller than a block, and larger."""
    monkeypatch.setitem(groups.BLOCKS, "cpu", block)
    config = dataclasses.replace(MIXTRAL, intermediate_size=9 + block, dispatch="dropless")
    x = jnp.concatenate([inputs(), jnp.repeat(inputs()[:, :1], 30, axis=1)], 1)  # one expert gets most
    assert_close(call(config, x)[0], plain(config, x)[0])


def test_ragged_dot_is_the_same(monkeypatch):
    """What accelerators multiply with."""
    x, direction = inputs(), np.random.default_rng(2).normal(size=(ROWS, LENGTH, WIDTH))

    def both(config):
        return jax.value_and_grad(lambda p: (call(config, x, p)[0] * direction).sum())(split(config)[1])

    config = dataclasses.replace(MIXTRAL, intermediate_size=7, dispatch="dropless")
    expected = both(config)
    monkeypatch.delitem(groups.BLOCKS, "cpu")
    found = both(dataclasses.replace(config, load_balance_loss=0.5))  # a program of its own
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.quick("1")
@pytest.mark.parametrize("config", [V3, SWITCH, GSHARD, dataclasses.replace(GSHARD, router_z_loss=0.3)], ids=range(4))
def test_padding_does_not_count(config: Experts):
    """Rows with padding anywhere give what the rows without it give, and tell it."""
    x, places = inputs(), np.sort(np.random.default_rng(3).permutation(LENGTH + 7)[:LENGTH])
    segments = jnp.zeros((ROWS, LENGTH + 7), jnp.int32).at[:, places].set(1)
    # Padding would take the places of the expert that most want.
    padded = jnp.broadcast_to(x[:, :1], (ROWS, LENGTH + 7, WIDTH)).at[:, places].set(x)
    expected, aux = call(config, x)
    y, padded_aux = call(config, padded, segment_ids=segments)
    np.testing.assert_allclose(y[:, places], expected, rtol=1e-5, atol=1e-5)
    for name, value in aux.items():
        np.testing.assert_allclose(padded_aux[name], value, atol=1e-5, err_msg=name)
    y, valid_aux = call(config, padded, is_token=segments > 0)
    np.testing.assert_allclose(y[:, places], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(valid_aux["experts_load"], aux["experts_load"], atol=1e-6)


ALL_LOSSES = [dataclasses.replace(config, load_balance_loss=0.1, router_z_loss=0.3) for config in (V3, SWITCH, GSHARD)]


@pytest.mark.quick("switch")
@pytest.mark.parametrize("config", ALL_LOSSES, ids=["v3", "switch", "gshard"])
def test_rows_of_padding_count_nothing(config: Experts):
    """Neither beside rows with tokens nor alone, where losses, gradients and shares are zeros."""
    graphdef, params, rest = split(config)
    x, rows = inputs(), jnp.ones((ROWS, LENGTH), jnp.int32)

    @jax.jit
    def found(params, x, segments):
        def loss(params, x):
            y, aux = nnx.merge(graphdef, params, rest)(x, ctx=context_of(segment_ids=segments))
            losses = [value for name, value in aux.items() if name.startswith("loss.")]
            return (y * (segments > 0)[..., None]).sum() + sum(losses), aux

        (_, aux), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        shares = {name: value for name, value in aux.items() if not name.startswith("statistic.")}
        return shares, *gradients

    expected, *gradients = found(params, x, rows.at[1].set(0))
    fewer, d_fewer, d_x_fewer = found(params, x[::2], rows[::2])
    for name, value in fewer.items():
        np.testing.assert_allclose(expected[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    assert float(fewer["loss.load_balance"]) > 0
    for one, other in zip(jax.tree.leaves(gradients[0]), jax.tree.leaves(d_fewer), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradients[1][::2], d_x_fewer, atol=1e-4)
    for value in jax.tree.leaves(found(params, x, jnp.zeros_like(rows))):
        np.testing.assert_array_equal(value, np.zeros(value.shape))


def test_a_row_does_not_see_its_neighbours():
    """Capacity is of a row; packed documents share one only where something can be dropped."""
    x = inputs()
    together = call(SWITCH, x)[0]
    for row in range(ROWS):
        np.testing.assert_allclose(call(SWITCH, x[row : row + 1])[0][0], together[row], atol=1e-6)
    packed = call(V3, x.reshape(1, ROWS * LENGTH, WIDTH), segment_ids=jnp.repeat(jnp.arange(1, 4), LENGTH)[None])[0]
    np.testing.assert_allclose(packed.reshape(x.shape), call(V3, x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [SWITCH, GSHARD], ids=["switch", "gshard"])
def test_a_lone_token_is_never_dropped(config: Experts):
    x = inputs(rows=5, length=1)
    tight = dataclasses.replace(config, capacity=None, capacity_factor=0.01)
    y, aux = call(tight, x, query_places=jnp.arange(5)[:, None])
    assert float(aux["dropped_share"]) == 0
    assert_close(y, plain(tight, x)[0])


def test_permuted_experts_change_nothing():
    config, x = dataclasses.replace(MIXTRAL, load_balance_loss=0.1), inputs()
    order = np.random.default_rng(4).permutation(config.num_experts)
    params = split(config)[1]
    permuted = jax.tree.map(lambda p: p[order] if p.ndim == 3 else p[:, order], params)
    y, aux = call(config, x)
    permuted_y, permuted_aux = call(config, x, permuted)
    np.testing.assert_allclose(permuted_y, y, atol=1e-5)
    np.testing.assert_allclose(permuted_aux["experts_load"], np.asarray(aux["experts_load"])[order], atol=1e-6)
    np.testing.assert_allclose(permuted_aux["loss.load_balance"], aux["loss.load_balance"], rtol=1e-5)


def test_losses_and_metrics_against_their_formulas():
    config = dataclasses.replace(GSHARD, load_balance_loss=0.1, router_z_loss=0.01)
    x = inputs()
    _, aux = call(config, x)
    experts, _, probabilities = routing(config, x)
    one_hot = np.eye(config.num_experts)
    first = one_hot[experts[..., 0]].mean(1)  # of GShard's two choices the first counts
    balance = config.num_experts * (first * probabilities.mean(1)).sum(-1).mean()
    np.testing.assert_allclose(aux["loss.load_balance"], 0.1 * balance, rtol=1e-5)
    logits = np.asarray(x) @ np.asarray(split(config)[1]["router"]["weight"][...])
    z = np.log(np.exp(logits).sum(-1)) ** 2
    np.testing.assert_allclose(aux["loss.router_z"], 0.01 * z.mean(), rtol=1e-5)
    np.testing.assert_allclose(aux["experts_load"], one_hot[experts].mean((0, 1, 2)), rtol=1e-5)
    both = dataclasses.replace(V3, router_z_loss=0.0)
    experts, _, probabilities = routing(both, x)
    _, aux = call(both, x)
    highest = np.eye(8)[np.argsort(-probabilities, -1)[..., :2]].mean((1, 2))  # whatever groups and bias choose
    expected = 0.1 * 8 * (highest * probabilities.mean(1)).sum(-1).mean()
    np.testing.assert_allclose(aux["loss.load_balance"], expected, rtol=1e-5)
    load = np.eye(8)[experts].mean((0, 1, 2))
    assert np.abs(load - highest.mean(0)).max() > 0.01
    np.testing.assert_allclose(aux["statistic.router.choice_bias"], 2 * LENGTH * load, rtol=1e-5)


def test_the_balance_loss_is_least_where_all_is_uniform():
    """E tokens, one for each expert, whose probabilities are equal but for a hair: 1 times the coefficient."""
    config = Experts(6, 4, SwitchRouter(0.0), "relu", gated=False, load_balance_loss=0.3)
    graphdef, params, rest = split(config)
    router = 1e-4 * jnp.eye(WIDTH)
    _, aux = _call(
        graphdef, params | {"router": {"weight": params["router"]["weight"].replace(router)}}, rest,
        jnp.eye(WIDTH)[None], context_of(),
    )  # fmt: skip
    np.testing.assert_allclose(aux["experts_load"], 1 / 6, rtol=1e-6)
    np.testing.assert_allclose(aux["loss.load_balance"], 0.3, rtol=1e-3)
    assert float(call(config, inputs())[1]["loss.load_balance"]) > 0.32


def test_a_model_with_dense_and_sparse_layers_names_them_apart():
    names = {
        ".".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path if getattr(k, "key", "") != "value")
        for path, _ in jax.tree_util.tree_leaves_with_path(split(V3)[1])
    }
    assert {name.removesuffix(".value") for name in names} >= {
        "experts.gate_proj.weight", "experts.up_proj.weight", "experts.down_proj.weight", "router.weight",
        "shared.gate_proj.weight", "shared.up_proj.weight", "shared.down_proj.weight",
    }  # fmt: skip


@pytest.mark.parametrize("config", [MIXTRAL, SWITCH, V3], ids=["mixtral", "switch", "v3"])
def test_idle_parameters(config: Experts):
    """Of the experts' matrices, all but those that a token meets."""
    sizes = [p.size // config.num_experts for p in jax.tree.leaves(split(config)[1]["experts"])]
    unused = config.num_experts - config.router.choices
    assert config.idle_parameters(WIDTH) == unused * sum(sizes)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_experts": 0}, "num_experts=0 must be at least 1"),
        ({"num_shared": -1}, "num_shared=-1 must be at least 0"),
        ({"shared_gate": True}, "shared_size=None and shared_gate=True are of shared experts, and num_shared=0"),
        ({"num_shared": 1, "shared_size": 0}, "shared_size=0 must be above 0"),
        ({"capacity": 3, "capacity_factor": 1.0}, "capacity=3 and capacity_factor=1.0: give one of them"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0 must be above 0, or none to drop nothing"),
        ({"router_z_loss": -1.0}, "router_z_loss=-1.0 must be at least 0"),
        ({"activation": "gelu"}, "activation='gelu' is not there for experts: take gelu_tanh"),
        ({"num_experts": 1}, "num_experts=1 must be at least the 2 that a token goes to"),
    ],
)
def test_impossible_experts(change: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(MIXTRAL, **change)
