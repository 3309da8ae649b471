"""The balance loss of experts and its gradient against the formulas of the papers, written out from them."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of
from flax import nnx

from llama_jax.nn import Experts, GShardRouter, SigmoidTopK, SoftmaxTopK, SwitchRouter

E, WIDTH, ALPHA = 6, 5, 0.3
LENGTHS = (9, 4, 7)  # rows have different numbers of tokens before their padding
ROWS = jnp.asarray(np.random.default_rng(0).normal(size=(3, 9, WIDTH)), jnp.float32)
SEGMENTS = jnp.asarray(np.arange(9) < np.array(LENGTHS)[:, None], jnp.int32)
BIAS = jnp.asarray([0.9, -0.9, 0.5, 0.0, -0.4, 0.2], jnp.float32)  # DeepSeek-V3's: it changes what is chosen


def texts(x: jax.Array) -> list[jax.Array]:
    return [row[:length] for row, length in zip(x, LENGTHS, strict=True)]


def highest(scores: jax.Array, k: int) -> jax.Array:
    """1 at the k highest of each row, else 0."""
    return (scores >= jnp.sort(scores, -1)[:, -k][:, None]).astype(jnp.float32)


def switch(w: jax.Array) -> jax.Array:
    """Fedus et al. 2021, eq. 4 to 6: a batch of T tokens."""
    p = jax.nn.softmax(jnp.concatenate(texts(ROWS)) @ w)
    f = highest(p, 1).sum(0) / len(p)
    return ALPHA * E * (f * p.sum(0) / len(p)).sum()


def gshard(w: jax.Array) -> jax.Array:
    """Lepikhin et al. 2020, algorithm 1: groups of S tokens; c counts first choices."""
    losses = []
    for group in texts(ROWS):
        gates = jax.nn.softmax(group @ w)
        c, m = highest(gates, 1).sum(0), gates.mean(0)
        losses.append((c / len(group) * m).sum() / E)
    return ALPHA * sum(losses) / len(losses)


def deepseek(w: jax.Array, scores: Callable[[jax.Array], jax.Array], choice: Callable[[jax.Array], jax.Array]):
    """DeepSeek-V2, eq. 23 to 25, and -V3, eq. 17 to 20: sequences of T tokens, K of N experts for each."""
    losses = []
    for text in texts(ROWS):
        s = scores(text @ w)
        chosen = choice(s)
        f = E / (2 * len(text)) * chosen.sum(0)
        losses.append((f * (s / s.sum(-1, keepdims=True)).mean(0)).sum())
    return ALPHA * sum(losses) / len(losses)


def in_groups(s: jax.Array) -> jax.Array:
    """The 2 of the group of 2 whose highest is highest."""
    best = highest(s.reshape(-1, 3, 2).max(-1), 1)
    return highest(jnp.where(best.repeat(2, -1) > 0, s, -1.0), 2)


def transformers(*ws: jax.Array) -> jax.Array:
    """`load_balancing_loss_func` of Mixtral: tokens of the batch in all layers, K assignments of each."""
    p = jnp.concatenate([jax.nn.softmax(text @ w) for w in ws for text in texts(ROWS)])
    return ALPHA * E * (highest(p, 2).mean(0) * p.mean(0)).sum()


SOFTMAX = SoftmaxTopK(2, normalize=True)
V2, V3 = SoftmaxTopK(2, False, 1.0, 3, 1), SigmoidTopK(2, True, 2.5, 3, 2, 0.01)
CASES = {
    "switch": (SwitchRouter(jitter=0.0), "batch", ALPHA, switch),
    # Its formula has 1/E where ours has E.
    "gshard": (GShardRouter(), "row", ALPHA / E**2, gshard),
    "deepseek v2": (V2, "row", ALPHA, lambda w: deepseek(w, jax.nn.softmax, in_groups)),
    "deepseek v3": (V3, "row", ALPHA, lambda w: deepseek(w, jax.nn.sigmoid, lambda s: highest(s, 2))),
    "transformers, of one layer": (SOFTMAX, "layers", ALPHA, transformers),
}


@functools.cache
def weight(seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(WIDTH, E)), jnp.float32)


def auxiliary(config: Experts, w: jax.Array) -> dict[str, jax.Array]:
    module = config.build(WIDTH, rngs=nnx.Rngs(params=jax.random.key(0)))
    module.router.weight = module.router.weight.replace(w)
    if isinstance(config.router, SigmoidTopK):
        module.router.choice_bias = module.router.choice_bias.replace(BIAS)
    return module(ROWS, ctx=context_of(segment_ids=SEGMENTS))[1]


def loss(config: Experts, *ws: jax.Array) -> jax.Array:
    found = [auxiliary(config, w) for w in ws]
    if config.balance_over != "layers":
        return sum(aux["loss.load_balance"] for aux in found)
    one, other = sum(aux["product.load_balance"] for aux in found) / len(found)
    return (one * other).sum()


@pytest.mark.quick("switch", "deepseek v3")
@pytest.mark.parametrize("name", CASES)
def test_the_loss_and_its_gradient_are_the_papers(name: str):
    router, over, coefficient, formula = CASES[name]
    config = Experts(E, 4, router, "relu", gated=False, load_balance_loss=coefficient, balance_over=over)
    both = [jax.jit(jax.value_and_grad(f))(weight(1)) for f in (functools.partial(loss, config), formula)]
    (found, d_found), (expected, d_expected) = both
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.abs(d_expected).max() > 1e-4
    np.testing.assert_allclose(d_found, d_expected, atol=1e-5 * np.abs(d_expected).max())


@pytest.mark.slow
def test_over_which_tokens_is_seen():
    """Rows of different texts, and layers, are no sums of each other."""
    config = Experts(E, 4, SOFTMAX, "relu", gated=False, load_balance_loss=ALPHA)
    by = {over: dataclasses.replace(config, balance_over=over) for over in ("row", "batch", "layers")}
    ws = [weight(1), weight(2), weight(3)]
    row, batch, layers = (float(jax.jit(functools.partial(loss, by[over]))(*ws)) for over in by)
    assert layers == pytest.approx(float(transformers(*ws)), rel=1e-5)
    assert batch == pytest.approx(sum(float(transformers(w)) for w in ws) / 2, rel=1e-5)
    assert row > batch * 1.01
    assert abs(layers / 2 - batch / 3) > 0.01 * batch
