"""Routers against their papers' formulas, written out token by token in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of
from flax import nnx

from llama_jax.config import UserError, from_json, override, to_json
from llama_jax.nn import Experts, GShardRouter, Router, SigmoidTopK, SoftmaxTopK, SwitchRouter

EXPERTS, WIDTH, ROWS, LENGTH = 8, 6, 2, 50


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def highest(scores: np.ndarray, k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:k]


def switch(logits: np.ndarray, bias: np.ndarray) -> dict[int, float]:
    p = softmax(logits)
    return {i: p[i] for i in highest(p, 1)}


def gshard(logits: np.ndarray, bias: np.ndarray) -> dict[int, float]:
    p = softmax(logits)
    first, second = highest(p, 2)
    return {first: p[first] / (p[first] + p[second]), second: p[second] / (p[first] + p[second])}


def mixtral(logits: np.ndarray, bias: np.ndarray) -> dict[int, float]:
    p = softmax(logits)
    chosen = highest(p, 3)
    return {i: p[i] / sum(p[j] for j in chosen) for i in chosen}


def deepseek_v2(logits: np.ndarray, bias: np.ndarray) -> dict[int, float]:
    p = softmax(logits)
    groups = highest(p.reshape(4, 2).max(1), 2)
    masked = np.where(np.isin(np.arange(8) // 2, groups), p, 0)
    return {i: 16 * p[i] for i in highest(masked, 3)}


def deepseek_v3(logits: np.ndarray, bias: np.ndarray) -> dict[int, float]:
    s = 1 / (1 + np.exp(-logits))
    groups = highest(np.sort((s + bias).reshape(2, 4), 1)[:, -2:].sum(1), 1)
    masked = np.where(np.isin(np.arange(8) // 4, groups), s + bias, -np.inf)
    chosen = highest(masked, 3)
    return {i: 2.5 * s[i] / (sum(s[j] for j in chosen) + 1e-20) for i in chosen}


V3 = SigmoidTopK(3, normalize=True, scaling=2.5, num_groups=2, top_groups=1, bias_update_rate=0.01)
FORMULAS = {
    "switch": (SwitchRouter(jitter=0.1, bias=True), switch),
    "gshard": (GShardRouter(), gshard),
    "mixtral": (SoftmaxTopK(3, normalize=True), mixtral),
    "deepseek_v2": (SoftmaxTopK(3, normalize=False, scaling=16.0, num_groups=4, top_groups=2), deepseek_v2),
    "deepseek_v3": (V3, deepseek_v3),
}


def build(config: Router) -> nnx.Module:
    """A router with large logits, and biases where it has some."""
    module = config.build(WIDTH, EXPERTS, rngs=nnx.Rngs(params=jax.random.key(0)))
    rng = np.random.default_rng(0)
    module.weight[...] = jnp.asarray(rng.normal(size=(WIDTH, EXPERTS)), jnp.float32)
    if module.bias is not None:
        module.bias[...] = jnp.asarray(rng.normal(size=EXPERTS), jnp.float32)
    if isinstance(config, SigmoidTopK):
        # Such that sums with sigmoids are on both sides of zero.
        module.choice_bias[...] = jnp.asarray(rng.normal(size=EXPERTS) - 0.5, jnp.float32)
    return module


def inputs() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32)


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name: str):
    config, formula = FORMULAS[name]
    module, x = build(config), inputs()
    found = module(x, ctx=context_of())
    logits = np.asarray(x, np.float64) @ np.asarray(module.weight[...], np.float64)
    if module.bias is not None:
        logits += np.asarray(module.bias[...])
    np.testing.assert_allclose(found.logits, logits, atol=1e-5)
    bias = np.asarray(module.choice_bias[...]) if isinstance(config, SigmoidTopK) else np.zeros(EXPERTS)
    assert found.sent is None
    for row, t in np.ndindex(ROWS, LENGTH):
        expected = formula(logits[row, t], bias)
        chosen = np.asarray(found.experts[row, t]).tolist()
        assert chosen == list(expected), "the best first"
        np.testing.assert_allclose(found.gates[row, t], list(expected.values()), rtol=1e-5)
    np.testing.assert_allclose(found.probabilities.sum(-1), 1, rtol=1e-5)


def test_the_choice_bias_is_for_the_choice_alone():
    """It changes who is chosen, and no weight of those that stay chosen apart from their sum."""
    config = dataclasses.replace(V3, normalize=False, num_groups=1, scaling=1.0)
    module, x = build(config), inputs()
    with_bias = module(x, ctx=context_of())
    sigmoids = np.asarray(jax.nn.sigmoid(with_bias.logits))
    np.testing.assert_allclose(with_bias.gates, np.take_along_axis(sigmoids, np.asarray(with_bias.experts), -1))
    module.choice_bias[...] = jnp.zeros(EXPERTS)
    assert (np.sort(module(x, ctx=context_of()).experts) != np.sort(with_bias.experts)).any()


@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_reach_the_router(name: str):
    """Through the weights; the choice itself has none."""
    graphdef, params, rest = nnx.split(build(FORMULAS[name][0]), nnx.Param, ...)
    direction = np.random.default_rng(2).normal(size=(ROWS, LENGTH, FORMULAS[name][0].choices))

    def scalar(params):
        return (nnx.merge(graphdef, params, rest)(inputs(), ctx=context_of()).gates * direction).sum()

    gradient = jax.grad(scalar)(params)
    size = jax.tree.map(lambda g: float(jnp.abs(g).max()), gradient)
    assert min(jax.tree.leaves(size)) > 1e-3


def test_routing_is_float32_whatever_the_activations_are():
    module, x = build(SoftmaxTopK(2, normalize=True)), inputs()
    half = module(x.astype(jnp.bfloat16), ctx=context_of())
    assert half.logits.dtype == half.gates.dtype == jnp.float32
    again = module(x.astype(jnp.bfloat16).astype(jnp.float32), ctx=context_of())
    np.testing.assert_array_equal(half.logits, again.logits)


def test_jitter_is_of_training_alone():
    module, x = build(SwitchRouter(jitter=0.1)), jnp.ones((4, 100, WIDTH))
    calm = module(x, ctx=context_of()).logits
    np.testing.assert_array_equal(calm, jnp.broadcast_to(calm[0, 0], calm.shape))
    trained = module(x, ctx=context_of(dropout_key=jax.random.key(0))).logits
    noise = np.linalg.lstsq(np.asarray(module.weight[...]).T, np.asarray(trained).reshape(-1, EXPERTS).T)[0]
    assert 0.9 - 1e-4 < noise.min() < 0.902
    assert 1.098 < noise.max() < 1.1 + 1e-4
    again = module(x, ctx=context_of(dropout_key=jax.random.key(0))).logits
    np.testing.assert_array_equal(trained, again)
    other = module(x, ctx=context_of(dropout_key=jax.random.key(1))).logits
    assert (trained != other).all()


def test_the_second_choice_is_sent_as_often_as_its_weight_says():
    module = build(GShardRouter())
    x = jnp.broadcast_to(inputs()[0, :3, None], (3, 4000, WIDTH)) * jnp.array([0.3, 1.0, 3.0])[:, None, None]
    found = module(x, ctx=context_of(dropout_key=jax.random.key(0)))
    assert found.sent is not None
    assert found.sent[..., 0].all()
    chance = 2 * np.asarray(found.gates[:, 0, 1])
    assert np.ptp(chance) > 0.3, "the tokens have to differ"
    np.testing.assert_allclose(found.sent[..., 1].mean(1), chance, atol=4 * 0.5 / 4000**0.5)


def test_the_bias_moves_the_load_toward_uniform():
    """A router whose experts are very unequal, and the update alone."""
    module = build(dataclasses.replace(V3, num_groups=1))
    module.choice_bias[...] = jnp.linspace(0, 2, EXPERTS)
    update = module.choice_bias.get_metadata("update")
    x, spread = inputs(), []
    for _ in range(150):
        experts = module(x, ctx=context_of()).experts
        counts = jnp.bincount(experts.reshape(-1), length=EXPERTS) / ROWS
        spread.append(float(counts.max() / counts.mean()))
        before = module.choice_bias[...]
        (name, statistic), *others = module.statistics(counts).items()
        assert (name, others) == ("choice_bias", [])
        module.choice_bias[...] = update(before[None], statistic[None])[0]
        moved = np.asarray(module.choice_bias[...] - before)
        np.testing.assert_allclose(moved, 0.01 * np.sign(counts.mean() - counts), atol=1e-6)
    assert spread[0] > 2
    assert spread[-1] < 1.2


def test_equal_configs_make_equal_modules():
    """Also of what updates the buffer: programs are kept by it."""
    first, second = (nnx.split(build(V3))[0] for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)


def test_saved_and_switched_by_name():
    config = Experts(EXPERTS, 16, V3, "silu", gated=True)
    assert from_json(Experts, to_json(config)) == config
    switched = override(config, {"router": "SwitchRouter", "router.jitter": "0.5"})
    assert switched.router == SwitchRouter(0.5)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SwitchRouter(jitter=1.0), "jitter=1.0 must be at least 0 and below 1"),
        (lambda: SoftmaxTopK(0, normalize=True), "top_k=0 must be at least 1"),
        (lambda: SoftmaxTopK(1, normalize=True, top_groups=2), "top_groups=2 is more than num_groups=1"),
        (lambda: dataclasses.replace(V3, bias_update_rate=-1.0), "bias_update_rate=-1.0 must be at least 0"),
        (lambda: GShardRouter().check(1), "num_experts=1 must be at least the 2 that a token goes to"),
        (lambda: V3.check(9), "num_experts=9 is not divisible by router.num_groups=2"),
        (lambda: V3.check(4), "router.top_k=3 is more than the 2 experts of router.top_groups=1"),
        (lambda: SigmoidTopK(1, True, 1.0, 8, 1, 0.0).check(8), "router.num_groups=8 leaves groups of 1"),
    ],
)
def test_impossible_routers(make, sentence: str):
    with pytest.raises(UserError, match=sentence):
        make()
