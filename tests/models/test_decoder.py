"""What a decoder must be, whatever its weights: causal, blind to its neighbours, the same however it is computed."""

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama_jax.config import UserError
from llama_jax.models import Compute, DecoderConfig, LayerOverride, assemble, build, from_params
from llama_jax.models.stack import REMAT_POLICIES
from llama_jax.nn import FeedForward, FeedForwardModule, ForwardContext, Projection, child
from llama_jax.nn.attention import blockwise


@dataclasses.dataclass(frozen=True)
class Relu(FeedForward):
    """A feed-forward of somebody else, with parameters of its own and a word to say in the loss."""

    size: int

    def build(self, width: int, *, rngs: nnx.Rngs) -> FeedForwardModule:
        return ReluModule(self, width, rngs=rngs)


class ReluModule(FeedForwardModule):
    def __init__(self, config: Relu, width: int, *, rngs: nnx.Rngs):
        self.into = Projection({"embed": width}, {"mlp": config.size}, bias=True, rngs=child(rngs, "into"))
        self.out = Projection({"mlp": config.size}, {"embed": width}, bias=False, rngs=child(rngs, "out"))

    def __call__(self, x: jax.Array, *, ctx: ForwardContext) -> tuple[jax.Array, dict[str, jax.Array]]:
        inner = jax.nn.relu(self.into(x))
        return self.out(inner), {"inner": inner.mean()}


@pytest.fixture(scope="module")
def pattern_config(two_layers: DecoderConfig) -> DecoderConfig:
    """Layer 0, then twice the pattern (1, 2)."""
    return dataclasses.replace(two_layers, num_layers=5, overrides=(LayerOverride((0, 2, 4), Relu(size=8)),))


def tokens_of(config: DecoderConfig, batch: int, length: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(config.vocab_size, size=(batch, length)), jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss_and_gradient(config: DecoderConfig, compute: Compute, params, tokens):
    """The mean loss with the layers' auxiliary scalars, and its gradient by parameter name."""

    def loss(params):
        model = assemble(config, params, compute)
        hidden, aux = model.trunk(tokens[:, :-1])
        log_p = jax.nn.log_softmax(model.logits(hidden))
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1).mean() + sum(a.sum() for a in aux.values())

    return jax.value_and_grad(loss)(params)


def assert_same(found, expected, **tolerance) -> None:
    (loss, gradient), (expected_loss, expected_gradient) = found, expected
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert gradient.keys() == expected_gradient.keys()
    for name, value in expected_gradient.items():
        assert np.abs(value).max() > 0, f"{name} has no gradient: the comparison would show nothing"
        np.testing.assert_allclose(gradient[name], value, err_msg=name, **{"atol": 1e-6, "rtol": 1e-4} | tolerance)


@pytest.mark.parametrize("kernel", ["reference", "blockwise"])
def test_no_gradient_from_later_tokens_or_other_documents(kernel: str, tiny_config, random_params, monkeypatch):
    monkeypatch.setattr(blockwise, "MIN_QUERY_BLOCK", 8)
    monkeypatch.setattr(blockwise, "KEY_BLOCK", 6)
    params, length = random_params(tiny_config), 20
    tokens = np.random.default_rng(1).permutation(tiny_config.vocab_size)[None, :length]  # each row of the table once
    segments = np.repeat([[0, 1]], [9, length - 9], axis=1)
    direction = np.random.default_rng(2).normal(size=tiny_config.vocab_size)

    @jax.jit
    def jacobian(table):
        def scalars(table):
            model = assemble(tiny_config, params | {"embedding.weight": table}, Compute(attention_kernel=kernel))
            return model(jnp.asarray(tokens), segment_ids=jnp.asarray(segments))[0] @ direction

        return jax.jacrev(scalars)(table)

    size = np.abs(np.asarray(jacobian(params["embedding.weight"])))[:, tokens[0]].max(-1)  # [to t, from s]
    allowed = np.tri(length, dtype=bool) & (segments == segments.T)
    np.testing.assert_array_equal(size > 0, allowed)


def test_packed_documents_are_separate_documents(two_layers, random_params):
    params, (first, second) = random_params(two_layers), (9, 14)
    tokens = tokens_of(two_layers, 2, first + second)
    lengths = np.array([first, second])
    packed = {
        "segment_ids": jnp.asarray(np.repeat([[1, 2]], lengths, axis=1).repeat(2, 0)),
        "positions": jnp.asarray(np.concatenate([np.arange(n) for n in lengths])[None].repeat(2, 0)),
    }
    model = from_params(two_layers, params, Compute())
    together = model(tokens, **packed)
    # One program for both: the first document followed by zeros, and the second one.
    alone = jnp.zeros((4, second), jnp.int32).at[:2, :first].set(tokens[:, :first]).at[2:].set(tokens[:, first:])
    apart = model(alone)
    np.testing.assert_allclose(together[:, :first], apart[:2, :first], atol=1e-5)
    np.testing.assert_allclose(together[:, first:], apart[2:], atol=1e-5)
    assert np.abs(together[:, first:] - model(tokens)[:, first:]).max() > 0.1, "packing has to matter"


def test_scanned_is_unrolled(pattern_config, random_params):
    params, tokens = random_params(pattern_config), tokens_of(pattern_config, 2, 12)
    scanned = assemble(pattern_config, params, Compute()).layers
    assert (len(scanned.leading), len(scanned.repeated)) == (1, 2)
    assert_same(
        loss_and_gradient(pattern_config, Compute(), params, tokens),
        loss_and_gradient(pattern_config, Compute(scan_layers=False), params, tokens),
    )


@pytest.mark.parametrize(
    "policies", [("none", "dots", "full"), pytest.param(tuple(REMAT_POLICIES), marks=pytest.mark.slow)]
)
def test_every_remat_policy_computes_the_same_in_its_own_memory(policies: tuple[str, ...], two_layers, random_params):
    config = dataclasses.replace(two_layers, num_layers=8)
    params, tokens = random_params(config), tokens_of(config, 4, 33)
    expected, memory = None, {}
    for policy in policies:
        compiled = loss_and_gradient.lower(config, Compute(remat=policy), params, tokens).compile()
        found = compiled(params, tokens)
        assert_same(found, expected := expected or found)
        memory[policy] = compiled.memory_analysis().temp_size_in_bytes
    assert memory["full"] == min(memory.values())
    assert memory["none"] == max(memory.values())
    assert len(set(memory.values())) == len(memory), memory
    assert set(REMAT_POLICIES) == set(get_args(Compute.__dataclass_fields__["remat"].type))


def test_tied_head_reads_the_embedding(two_layers, random_params):
    config = dataclasses.replace(two_layers, tie_embeddings=True)
    params, tokens = random_params(config), tokens_of(config, 1, 8)
    untied = params | {"lm_head.weight": params["embedding.weight"].T}
    tied_logits = from_params(config, params, Compute())(tokens)
    np.testing.assert_allclose(tied_logits, from_params(two_layers, untied, Compute())(tokens), atol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(two_layers, random_params):
    params, tokens = random_params(two_layers), tokens_of(two_layers, 1, 8)
    exact = from_params(two_layers, params, Compute())(tokens)
    half = from_params(two_layers, params, Compute(dtype="bfloat16"))
    assert jax.eval_shape(half.module.trunk, tokens)[0].dtype == jnp.bfloat16
    logits = half(tokens)
    assert logits.dtype == jnp.float32
    assert 1e-4 < np.abs(logits - exact).max() / np.abs(exact).max() < 0.05


def test_a_built_model_has_its_initial_parameters(two_layers):
    model, tokens = build(two_layers, seed=3), tokens_of(two_layers, 1, 8)
    logits = model(tokens)
    assert logits.shape == (1, 8, two_layers.vocab_size)
    assert np.abs(logits).max() < 1, "the first loss is near ln V"
    again = from_params(two_layers, model.params(), Compute())
    np.testing.assert_array_equal(again(tokens), logits)
    assert np.abs(build(two_layers, seed=4)(tokens) - logits).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"overrides": (LayerOverride((1, 2), Relu(3)),)}, "overrides name layer 2, and num_layers=2 ends at 1"),
        ({"overrides": (LayerOverride((-1,), Relu(3)),)}, "overrides name layer -1"),
    ],
)
def test_impossible_decoders(change: dict, sentence: str, two_layers):
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(two_layers, **change)
