"""Which tokens top-k and top-p leave, and how often a token is drawn."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, strategies as st

from llama_jax.config import UserError
from llama_jax.parallel import make_mesh, shard
from llama_jax.sampling import Sampler, SamplingConfig, Written
from llama_jax.sampling.config import number
from llama_jax.sampling.sampler import logprobs, top_k, top_p

# Small whole weights: many ties, and sums that no rounding moves across a target that lies between them.
WEIGHTS = st.lists(st.integers(1, 6), min_size=12, max_size=12).filter(lambda w: sum(w) > 0)


compiled_top_p = jax.jit(top_p)


def kept(logits: jax.Array) -> np.ndarray:
    return np.isfinite(np.asarray(logits))


def highest(weights: np.ndarray, enough) -> np.ndarray:
    """The plain way: go through the tokens from the highest on until `enough(count, weight so far)`."""
    keep = np.zeros(len(weights), bool)
    for token in np.argsort(-weights, kind="stable"):
        if keep.any() and enough(keep.sum(), weights[keep].sum()):
            break
        keep[token] = True
    return keep


@given(st.lists(WEIGHTS, min_size=2, max_size=2), st.integers(1, 14))
def test_top_k_keeps_the_k_highest_and_the_first_of_equals(rows: list[list[int]], k: int):
    weights = np.array(rows)
    logits = jnp.asarray(np.log(weights), jnp.float32)
    np.testing.assert_array_equal(
        kept(jax.jit(top_k)(logits, k)), [highest(row, lambda n, _: n >= k) for row in weights]
    )


@given(st.lists(WEIGHTS, min_size=2, max_size=2), st.integers(0, 80))
def test_top_p_keeps_the_smallest_set_that_reaches_p(rows: list[list[int]], reach: int):
    weights = np.array(rows)
    logits = jnp.asarray(np.log(weights) - 3, jnp.float32)
    for row, total in zip(weights, weights.sum(1), strict=True):
        p = min((reach + 0.5) / total, 1.0)
        expected = highest(row, lambda _, weight, p=p, total=total: weight >= p * total)
        i = int(np.flatnonzero((weights == row).all(1))[0])
        np.testing.assert_array_equal(kept(compiled_top_p(logits, p))[i], expected)


def test_kept_logits_are_unchanged_and_negative_ones_are_ordered():
    logits = jnp.array([[-5.0, -0.5, 0.0, 2.0, -jnp.inf, -2.0]])
    np.testing.assert_array_equal(top_k(logits, 4), [[-jnp.inf, -0.5, 0.0, 2.0, -jnp.inf, -2.0]])


def test_top_p_of_one_keeps_all():
    assert kept(top_p(jax.random.normal(jax.random.key(0), (2, 500)), 1.0)).all()


def sampler(temperature: float, top_k: int | None = None, top_p: float | None = None) -> Sampler:
    return Sampler.of(SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p))


def draws(sampler: Sampler, logits: jax.Array, count: int = 4000) -> np.ndarray:
    keys = jax.random.split(jax.random.key(1), count)
    chosen = jax.jit(sampler.choose)(jnp.broadcast_to(logits, (count, logits.size)), keys)
    return np.bincount(np.asarray(chosen), minlength=logits.size) / count


def test_tokens_are_drawn_as_often_as_their_probability_says():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
    np.testing.assert_allclose(draws(Sampler(1.0), logits), [0.1, 0.4, 0.2, 0.3], atol=0.03)
    sharper = np.array([0.1, 0.4, 0.2, 0.3]) ** 2
    np.testing.assert_allclose(draws(Sampler(0.5), logits), sharper / sharper.sum(), atol=0.03)
    np.testing.assert_allclose(draws(Sampler(1.0, top_k=2), logits), [0, 4 / 7, 0, 3 / 7], atol=0.03)


def test_top_p_counts_after_temperature():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))
    # At temperature 0.5 the highest two hold 0.83 of the probability, at 1 only 0.7.
    assert (draws(Sampler(0.5, top_p=0.8), logits[0]) > 0).tolist() == [False, True, False, True]
    assert (draws(Sampler(1.0, top_p=0.8), logits[0]) > 0).tolist() == [False, True, True, True]


def test_greedy_takes_the_first_of_the_highest():
    keys = jax.random.split(jax.random.key(0), 2)
    assert Sampler().choose(jnp.array([[0.0, 3.0, 3.0], [-1.0, -2.0, -3.0]]), keys).tolist() == [1, 0]


@pytest.mark.parametrize("settings", [(0.7, 1, None), (0.7, None, 1e-6)])
def test_a_set_of_one_is_greedy(settings: tuple):
    logits = jax.random.normal(jax.random.key(0), (8, 300))
    keys = jax.random.split(jax.random.key(0), 8)
    np.testing.assert_array_equal(
        sampler(*settings).choose(logits, keys),
        logits.argmax(-1),
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ((-0.1, None, None), r"temperature=-0.1 must be 0 \(greedy\) or above"),
        ((float("nan"), None, None), "temperature=nan must be"),
        ((1.0, 0, None), "top_k=0 must be at least 1"),
        ((1.0, None, 0.0), "top_p=0.0 must be above 0 and at most 1"),
        ((1.0, None, 1.5), "top_p=1.5 must be"),
    ],
)
def test_impossible_settings(settings: tuple, sentence: str):
    with pytest.raises(UserError, match=sentence):
        sampler(*settings)


def test_numbers_of_any_library():
    for value in ("0", None, [1], True, np.array([1, 2]), np.bool_(True), 1.5):
        with pytest.raises(UserError, match=r"seed=.* must be a whole number"):
            number("seed", value, whole=True)
    for value in (np.uint64(2**63), jnp.int32(3), np.array(3), 2**70):
        assert number("seed", value, whole=True) == int(value)
        assert type(number("seed", value, whole=True)) is int
    assert number("temperature", np.float32(0.5)) == 0.5
    with pytest.raises(UserError, match="temperature='0' must be a number"):
        number("temperature", "0")


def test_extreme_settings_stay_numbers():
    """As float32, 1e300 would be infinite and 1e-300 zero."""
    logits = jax.random.normal(jax.random.key(0), (8, 300))
    keys = jax.random.split(jax.random.key(1), 8)
    hot = sampler(1e300)
    assert len({*np.asarray(hot.choose(logits, keys)).tolist()}) > 4
    np.testing.assert_array_equal(sampler(1.0, top_p=1e-300).choose(logits, keys), logits.argmax(-1))


PROBABILITIES = np.array([0.30, 0.22, 0.16, 0.12, 0.09, 0.06, 0.03, 0.02])
# Settings, and what is left of the probabilities (of the text [6, 1 | 1, 0, 1]), by hand from the papers.
EXPECTED = [
    ({"temperature": 1.0}, PROBABILITIES),
    ({"temperature": 0.5}, PROBABILITIES**2),
    ({"temperature": 1.0, "top_k": 3}, PROBABILITIES * (PROBABILITIES > 0.15)),
    ({"temperature": 1.0, "top_p": 0.6}, PROBABILITIES * (PROBABILITIES > 0.15)),  # 0.52 is not enough, 0.68 is
    ({"temperature": 1.0, "min_p": 0.35}, PROBABILITIES * (PROBABILITIES >= 0.35 * 0.30)),
    # Entropy 1.83: information 1.83 (0.16), 1.51 (0.22), 2.12 (0.12) are the nearest, together 0.5; then 1.20 (0.30).
    ({"temperature": 1.0, "typical_p": 0.45}, PROBABILITIES * [0, 1, 1, 1, 0, 0, 0, 0]),
    ({"temperature": 1.0, "typical_p": 0.55}, PROBABILITIES * [0, 1, 1, 1, 1, 0, 0, 0]),  # 2.41 (0.09) before 1.20
    ({"temperature": 1.0, "repetition_penalty": 1.5}, PROBABILITIES ** np.array([1.5, 1.5, 1, 1, 1, 1, 1.5, 1])),
    ({"temperature": 1.0, "frequency_penalty": 0.4}, PROBABILITIES * np.exp([-0.4, -0.8, 0, 0, 0, 0, 0, 0])),
    ({"temperature": 1.0, "presence_penalty": 0.4}, PROBABILITIES * np.exp([-0.4, -0.4, 0, 0, 0, 0, 0, 0])),
    ({"temperature": 1.0, "no_repeat_ngram_size": 2}, PROBABILITIES * [0, 0, 1, 1, 1, 1, 1, 1]),
    ({"temperature": 1.0, "logit_bias": {7: 2.0, 0: -1.0}}, PROBABILITIES * np.exp([-1, 0, 0, 0, 0, 0, 0, 2])),
    ({"temperature": 1.0, "banned_ids": [0, 4]}, PROBABILITIES * [0, 1, 1, 1, 0, 1, 1, 1]),
    ({"temperature": 1.0, "min_new_tokens": 4, "stop_ids": [2]}, PROBABILITIES * [1, 1, 0, 1, 1, 1, 1, 1]),
    ({"temperature": 1.0, "forced_ids": [1, 0, 1, 5]}, np.eye(8)[5]),
    ({"temperature": 0.5, "top_k": 4, "min_p": 0.3}, PROBABILITIES**2 * [1, 1, 0, 0, 0, 0, 0, 0]),  # of 2nd powers
]


def test_draws_have_exactly_the_probabilities_of_the_settings():
    """All settings are rows of one batch, each thousands of times."""
    count = 1000
    settings = [SamplingConfig.of(**options) for options, _ in EXPECTED]
    configs = [config for config in settings for _ in range(count)]
    size = len(configs)
    text = [jnp.broadcast_to(jnp.array(x), (size, *np.shape(x))) for x in ([6, 1, 1, 0, 1], 5, 2)]
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(PROBABILITIES, jnp.float32)), (size, 8))
    keys = jax.random.split(jax.random.key(3), size)
    sampler = Sampler.rows(configs, vocab_size=8)
    chosen = jax.jit(lambda s, x, w, k: s.choose(s.controlled(x, w), k))(sampler, logits, Written(*text), keys)
    for (options, expected), row in zip(EXPECTED, np.asarray(chosen).reshape(-1, count), strict=True):
        found, expected = np.bincount(row, minlength=8), np.asarray(expected) / np.sum(expected)
        assert (found[expected == 0] == 0).all(), options
        kept = expected > 0
        assert scipy.stats.chisquare(found[kept], count * expected[kept]).pvalue > 1e-4 or kept.sum() == 1, options


def test_log_probabilities_are_those_of_the_model():
    logits = np.random.default_rng(0).normal(0, 3, (8, 50)).astype(np.float32)
    chosen = np.array([1, 3, 49, 0, 7, 7, 20, 33])
    expected = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    order = np.argsort(-expected, axis=-1)[:, :5]
    for mesh in (None, make_mesh({"data": 2, "fsdp": 4})):
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            found = jax.jit(lambda x, c: logprobs(shard(x, "batch", None), shard(c, "batch"), 5))(logits, chosen)
        own, ids, values = map(np.asarray, found)
        np.testing.assert_allclose(own, expected[np.arange(8), chosen], rtol=1e-5)
        np.testing.assert_array_equal(ids, order)
        np.testing.assert_allclose(values, np.take_along_axis(expected, order, -1), rtol=1e-5)
    assert logprobs(jnp.asarray(logits), jnp.asarray(chosen), 0)[1].shape == (8, 0)
