"""Pieces of one family in another: they train alike on every mesh and decode as they were trained, or are refused."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from first_values import first_values
from flax import nnx

from llama_jax.config import UserError
from llama_jax.models import Compute, DecoderConfig, LayerOverride, from_params, initialize
from llama_jax.nn import (
    MLP,
    Alibi,
    Experts,
    GroupedQuery,
    LayerNorm,
    LearnedPositions,
    LongRopeScaling,
    Mixer,
    MixerModule,
    RelativeBias,
    RMSNorm,
    Rope,
    SinusoidalPositions,
    SoftmaxTopK,
    SwiGLU,
)
from llama_jax.parallel import make_mesh
from llama_jax.run.training import to_devices
from llama_jax.training import AdamW, init_state, make_train_step
from llama_jax.zoo.gpt2 import gpt

ROWS, LENGTH, VOCAB = 8, 12, 40
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
ROPE = Rope(theta=10000.0, scaling=None)
GPT2 = gpt(num_layers=2, hidden_size=16, num_heads=4, max_positions=32, vocab_size=VOCAB)
LLAMA = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    num_layers=2,
    max_positions=32,
    attention=GroupedQuery(num_heads=4, num_kv_heads=2, head_dim=4, rope=ROPE, qkv_bias=False, out_bias=False),
    feed_forward=SwiGLU(intermediate_size=24, bias=False),
    norm=RMSNorm(eps=1e-5),
    tie_embeddings=False,
)


def crossed(config: DecoderConfig, *, attention: dict[str, Any] | None = None, **changes: Any) -> DecoderConfig:
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, **attention or {}), **changes)


# Two crosses that do not touch each other share a model, and its compilations.
CROSSES = {
    "a GPT-2 with rotary positions": crossed(GPT2, positions=None, attention={"rope": ROPE}),
    "a Llama with ALiBi and sandwich norms": crossed(
        LLAMA, position_bias=Alibi(num_heads=4), norm_placement="sandwich", attention={"rope": None}
    ),
    "a Llama with normed heads, soft caps of scores and logits, squared ReLU": crossed(
        LLAMA,
        attention={"qk_norm": RMSNorm(eps=1e-6), "softcap": 2.0},
        logit_softcap=3.0,
        feed_forward=MLP(intermediate_size=24, activation="relu_squared", bias=False),
    ),
    "a Llama with results normed, all queries at once, and LongRoPE beyond its old context": crossed(
        LLAMA,
        norm_placement="output",
        attention={
            "qk_norm": RMSNorm(eps=1e-6, zero_centered=True),
            "qk_norm_over": "width",
            "rope": Rope(10000.0, LongRopeScaling((1.0, 1.5), (2.0, 3.0), 2, 1.1)),
        },
    ),
    "a Llama in parallel blocks, with heads normed by their own weights": crossed(
        LLAMA,
        parallel="own_norms",
        residual_scale=0.5,
        attention={"qk_norm": LayerNorm(1e-6, bias=True, zero_centered=True), "qk_norm_over": "own_weights"},
    ),
    "a Llama with experts, sandwich norms, and a gated expert for all tokens": crossed(
        LLAMA,
        norm_placement="sandwich",
        feed_forward=Experts(
            4, 8, SoftmaxTopK(2, False), "silu", gated=True, num_shared=1, shared_size=12, shared_gate=True
        ),
    ),
    "a Llama with a sliding window, learned positions, and no norm before attention but one of embeddings": crossed(
        LLAMA,
        attention={"window": 3, "rope": None, "pre_norm": False},
        positions=LearnedPositions(32),
        embedding_norm=RMSNorm(eps=1e-5),
    ),
    "a Llama with sinks, a window and experts with biases": crossed(
        LLAMA,
        attention={"sinks": True, "window": 3},
        feed_forward=Experts(4, 24, SoftmaxTopK(2, True, bias=True), "silu", gated=True, bias=True, limit=1.0),
    ),
}


def batch_of() -> dict[str, np.ndarray]:
    """Rows of two documents each."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, (ROWS, LENGTH + 1), dtype=np.int32)
    starts, columns = rng.integers(1, LENGTH, (ROWS, 1)), np.arange(LENGTH)
    second = columns >= starts
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": np.ones((ROWS, LENGTH), np.float32),
        "segment_ids": (1 + second).astype(np.int32),
        "positions": np.where(second, columns - starts, columns).astype(np.int32),
    }


def step(config: DecoderConfig, mesh: dict[str, int]) -> tuple[float, dict[str, np.ndarray]]:
    """Loss of a step on the mesh, and the first moments that it leaves: the gradient, clipped, times a constant."""
    hyper = AdamW(learning_rate=1e-2, warmup_steps=0).hyper(10)
    with jax.set_mesh(make_mesh(mesh, jax.devices()[: 8 if mesh else 1])):
        state = jax.jit(init_state)(first_values(config), hyper)
        batch = to_devices(batch_of(), range(ROWS), ROWS)
        state, metrics = make_train_step(config, Compute(loss_chunk=4))(state, batch, hyper)
        return float(metrics["loss"]), {name: np.asarray(value) for name, value in state.opt_state[1].mu.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", CROSSES)
def test_a_step_on_eight_devices_is_that_of_one(name: str):
    (loss, gradient), (expected_loss, expected) = step(CROSSES[name], MESH), step(CROSSES[name], {})
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert loss == pytest.approx(np.log(VOCAB), rel=0.2)
    for parameter, value in expected.items():
        assert np.isfinite(value).all(), parameter
        # What is added to all keys alike does not change who is seen.
        assert np.abs(value).max() > 0 or parameter.endswith("k_proj.bias"), f"{parameter} has no gradient"
        np.testing.assert_allclose(gradient[parameter], value, atol=1e-6, rtol=1e-3, err_msg=parameter)


def decoded(module: Any, tokens: jax.Array) -> jax.Array:
    """Logits at every position: of a prompt of five tokens at once, then of one token after the other."""

    def extend(cache: Any, tokens: jax.Array, begin: Any) -> tuple[Any, jax.Array]:
        lengths = jnp.full(tokens.shape[0], begin, jnp.int32)
        hidden, cache = module.extend(tokens, cache=cache, lengths=lengths)
        return cache, module.logits(hidden)

    cache, prompt = extend(module.init_cache(tokens.shape[0], tokens.shape[1] + 3), tokens[:, :5], 0)

    def one(cache: Any, t: jax.Array) -> tuple[Any, jax.Array]:
        return extend(cache, jax.lax.dynamic_slice_in_dim(tokens, t, 1, 1), t)

    _, rest = jax.lax.scan(one, cache, jnp.arange(5, tokens.shape[1]))
    return jnp.concatenate([prompt, rest[:, :, 0].swapaxes(0, 1)], axis=1)


@pytest.mark.quick("a GPT-2 with rotary positions", "a Llama with ALiBi and sandwich norms")
@pytest.mark.parametrize("name", CROSSES)
def test_cached_decoding_is_the_full_forward(name: str, random_params: Callable[[DecoderConfig], Any]):
    config = CROSSES[name]
    model = from_params(config, random_params(config), Compute(dtype="float32"))
    tokens = jnp.asarray(batch_of()["tokens"][:3])
    full = np.asarray(model(tokens))
    assert full.std() > 0.1
    np.testing.assert_allclose(model.run(decoded, tokens), full, atol=2e-5)


@pytest.mark.slow
def test_each_cross_is_another_model(random_params: Callable[[DecoderConfig], Any]):
    """Of those that have the parameters of what they are made of, none computes the same."""
    tokens = jnp.asarray(batch_of()["tokens"][:2])
    for change in (
        {"position_bias": Alibi(num_heads=4)},
        {"logit_softcap": 3.0},
        {"attention": {"softcap": 2.0}},
        {"parallel": "own_norms"},
        {"residual_scale": 0.5},
        {"norm": RMSNorm(eps=1e-5, zero_centered=True)},
        {"attention": {"window": 3}},
        {"attention": {"rope": None}},
        {"positions": SinusoidalPositions()},
    ):
        plain, other = (
            from_params(config, random_params(config), Compute())(tokens)
            for config in (LLAMA, crossed(LLAMA, **change))
        )
        assert np.abs(plain - other).max() > 1e-2, change


# -- what cannot be


@dataclasses.dataclass(frozen=True)
class Average(Mixer):
    """Something without scores."""

    def build(self, width: int, *, rngs: nnx.Rngs) -> MixerModule:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda: crossed(LLAMA, position_bias=Alibi(8)), r"position_bias\.num_heads=8 .*attention's num_heads=4"),
        (
            lambda: dataclasses.replace(LLAMA, position_bias=Alibi(4), attention=Average()),
            "position_bias is for the scores of attention, and Average has none",
        ),
        (
            lambda: crossed(LLAMA, position_bias=Alibi(4), overrides=(LayerOverride((1,), Average()),)),
            "position_bias .* Average has none",
        ),
        (
            lambda: crossed(LLAMA, position_bias=RelativeBias(2, 8, 16, bidirectional=False)),
            r"position_bias\.num_heads=2",
        ),
        (lambda: crossed(LLAMA, positions=LearnedPositions(16)), "max_positions=32 is more than the 16"),
        (lambda: crossed(LLAMA, norm=None, norm_placement="sandwich"), "norm_placement='sandwich' needs a norm"),
        (lambda: crossed(LLAMA, parallel="one_norm", norm_placement="post"), "parallel='one_norm' needs"),
        (lambda: crossed(GPT2, attention={"rope": Rope(1e4, None, 6)}), "rotary_dim=6 must be at most head_dim=4"),
        (lambda: crossed(GPT2, attention={"rope": ROPE, "head_dim": 5}), "head_dim=5 must be .*even"),
        (lambda: crossed(GPT2, attention={"num_kv_heads": 3}), "num_kv_heads=3 does not divide num_heads=4"),
    ],
)  # fmt: skip
def test_impossible_crosses_are_refused(change: Callable[[], DecoderConfig], sentence: str):
    with pytest.raises(UserError, match=sentence):
        change()


@pytest.mark.slow
def test_a_kernel_refuses_what_it_cannot_do():
    tokens = jnp.zeros((1, 4), jnp.int32)
    for name, reason in (
        ("a Llama with ALiBi and sandwich norms", "a bias of the scores"),
        ("a Llama with normed heads, soft caps of scores and logits, squared ReLU", "a soft cap of the scores"),
    ):
        model = from_params(CROSSES[name], initialize(CROSSES[name], 0), Compute(attention_kernel="blockwise"))
        with pytest.raises(UserError, match=f"'blockwise' cannot do {reason}: take reference"):
            model(tokens)
