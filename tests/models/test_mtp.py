"""Multi-token prediction: what its further blocks see, what they are to say, and that they stay out of all else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import UserError
from llama_jax.models import (
    Compute,
    DecoderConfig,
    MTPDecoderConfig,
    abstract_params,
    assemble,
    buffers,
    initialize,
    num_parameters,
)
from llama_jax.nn import Experts, LayerNorm, SigmoidTopK
from llama_jax.parallel import make_mesh, shard
from llama_jax.training import AdamW, init_state, make_train_step
from llama_jax.training.step import losses

ROWS, LENGTH = 8, 16
BIAS = "feed_forward.router.choice_bias"
COMPUTE = Compute(dtype="float32", scan_layers=False, loss_chunk=8)


@pytest.fixture(scope="module")
def config(tiny_config: DecoderConfig) -> MTPDecoderConfig:
    """Two further blocks."""
    shared = {f.name: getattr(tiny_config, f.name) for f in dataclasses.fields(DecoderConfig)}
    return MTPDecoderConfig(**shared, num_mtp_layers=2, mtp_weight=0.5)


@pytest.fixture(scope="module")
def balanced(config: MTPDecoderConfig) -> MTPDecoderConfig:
    """One further block, and experts that a bias balances."""
    experts = Experts(
        num_experts=4,
        intermediate_size=8,
        router=SigmoidTopK(top_k=2, normalize=True, scaling=1.0, num_groups=1, top_groups=1, bias_update_rate=0.1),
        activation="silu",
        gated=True,
    )
    return dataclasses.replace(config, feed_forward=experts, num_mtp_layers=1)


def batch_of(vocab_size: int, segments: list[int] | None = None) -> dict[str, jax.Array]:
    """Rows of documents of these lengths."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(vocab_size, size=(ROWS, LENGTH + 1)).astype(np.int32)
    lengths = segments or [LENGTH]
    numbers = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    positions = np.concatenate([np.arange(length) for length in lengths])
    same_next = np.append(numbers[1:] == numbers[:-1], False)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.broadcast_to(same_next, (ROWS, LENGTH)).astype(np.float32),
        "segment_ids": np.broadcast_to(numbers, (ROWS, LENGTH)).astype(np.int32),
        "positions": np.broadcast_to(positions, (ROWS, LENGTH)).astype(np.int32),
    }
    return {name: jnp.asarray(x) for name, x in batch.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def means(config: MTPDecoderConfig, compute: Compute, params, batch):
    found, aux = losses(params, batch, config, compute)
    return {p.name: (ce / p.weights.sum(), p.weights, p.targets, p.coefficient) for p, _, ce in found}, aux


@functools.partial(jax.jit, static_argnums=0)
def further_logits(config: MTPDecoderConfig, params, tokens, segment_ids=None):
    return assemble(config, params, COMPUTE).mtp_logits(tokens, segment_ids=segment_ids)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config: MTPDecoderConfig, params, tokens):
    return assemble(config, params, COMPUTE)(tokens)


@pytest.mark.slow
def test_each_further_block_is_to_say_one_token_further(config, random_params):
    params, batch = random_params(config), batch_of(config.vocab_size, [9, 7])
    found, _ = means(config, COMPUTE, params, batch)
    assert list(found) == ["loss", "mtp_1_loss", "mtp_2_loss"]
    for depth in (1, 2):
        _, weights, targets, coefficient = found[f"mtp_{depth}_loss"]
        assert coefficient == 0.25  # of two, half
        # Within its document the token that is so much further, and nothing where that would be beyond its end.
        for begin, end in ((0, 9), (9, 16)):
            told = slice(begin, end - 1 - depth)
            np.testing.assert_array_equal(targets[:, told], batch["tokens"][:, begin + 1 + depth : end])
            assert (weights[:, told] == 1).all()
            assert (weights[:, end - 1 - depth : end] == 0).all()


def test_the_first_further_logits_are_those_of_its_loss(config, random_params):
    params, batch = random_params(config), batch_of(config.vocab_size)
    log_probabilities = jax.nn.log_softmax(further_logits(config, params, batch["tokens"]))
    own = jnp.take_along_axis(log_probabilities[:, :-1], batch["tokens"][:, 2:, None], axis=-1)
    found, _ = means(config, COMPUTE, params, batch)
    np.testing.assert_allclose(found["mtp_1_loss"][0], -own.mean(), rtol=1e-5)


def test_a_further_block_sees_the_token_that_it_joins_and_none_after(config, random_params):
    params, tokens = random_params(config), batch_of(config.vocab_size)["tokens"]
    changed = tokens.at[:, 8].set((tokens[:, 8] + 1) % config.vocab_size)
    before, after = (further_logits(config, params, x) for x in (tokens, changed))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (jnp.abs(before[:, 7] - after[:, 7]).max(-1) > 1e-3).all()


def test_packed_is_separate(config, random_params):
    params, batch = random_params(config), batch_of(config.vocab_size, [8, 8])
    # Rotary scores know distances alone, so the second document may count on.
    packed = further_logits(config, params, batch["tokens"], batch["segment_ids"])
    for begin in (0, 8):
        alone = further_logits(config, params, batch["tokens"][:, begin : begin + 8])
        np.testing.assert_allclose(packed[:, begin : begin + 7], alone, atol=2e-5)


def test_the_model_itself_is_that_of_no_further_blocks(config, random_params):
    params, tokens = random_params(config), batch_of(config.vocab_size)["tokens"]
    plain = dataclasses.replace(config, num_mtp_layers=0)
    own = {name: value for name, value in params.items() if not name.startswith("mtp_layers.")}
    assert own.keys() == abstract_params(plain).keys()
    assert num_parameters(plain) < num_parameters(config)
    with_blocks, without = (logits_of(c, p, tokens) for c, p in ((config, params), (plain, own)))
    np.testing.assert_array_equal(with_blocks, without)
    assert list(means(plain, COMPUTE, own, batch_of(config.vocab_size))[0]) == ["loss"]
    with pytest.raises(UserError, match="num_mtp_layers=0 predicts nothing but the next token"):
        further_logits(plain, own, tokens)


def test_scanned_and_recomputed_are_the_same(config, random_params):
    params, batch = random_params(config), batch_of(config.vocab_size, [9, 7])
    found, _ = means(config, Compute(dtype="float32", remat="full"), params, batch)
    for name, (mean, *_) in means(config, COMPUTE, params, batch)[0].items():
        np.testing.assert_allclose(found[name][0], mean, rtol=1e-5)


@pytest.mark.slow
def test_a_step_trains_all_blocks_and_balances_their_experts(balanced):
    """Biases of both stacks move, each by the load of its own layers."""
    hyper = AdamW(learning_rate=2e-2, warmup_steps=1).hyper(80)
    state = init_state(initialize(balanced, 0), hyper, frozenset(buffers(balanced)))
    step, batch = make_train_step(balanced, COMPUTE), batch_of(balanced.vocab_size)
    _, aux = means(balanced, COMPUTE, state.params | state.buffers, batch)
    first, metrics = {name: np.asarray(value) for name, value in state.params.items()}, []
    for _ in range(80):
        state, found = step(state, batch, hyper)
        metrics.append({name: float(found[name]) for name in ("loss", "mtp_1_loss")})
        if len(metrics) > 1:
            continue
        for stack in ("layers", "mtp_layers"):
            load = aux[f"statistic.{stack}.{BIAS}"]
            assert load.shape == (1, 4)
            wanted = 0.1 * np.sign(load.mean(-1, keepdims=True) - load)
            np.testing.assert_allclose(state.buffers[f"{stack}.{BIAS}"], wanted, atol=1e-6)
    for name, value in state.params.items():
        assert np.abs(value - first[name]).max() > 1e-4, name
    for name, value in metrics[0].items():
        assert metrics[-1][name] < 0.3 * value, name


@pytest.mark.slow
def test_a_stack_of_one_layer_has_the_loss_of_the_batch_times_top_k(balanced, random_params):
    """Which is what transformers' loss of all layers is for one; that of further blocks has another name."""
    found, hyper = {}, AdamW(learning_rate=0.01, warmup_steps=1).hyper(5)
    for over in ("batch", "layers"):
        experts = dataclasses.replace(balanced.feed_forward, load_balance_loss=0.1, balance_over=over)
        own = dataclasses.replace(balanced, feed_forward=experts, num_layers=1)
        state = jax.jit(init_state)(random_params(own), hyper)
        found[over] = make_train_step(own, COMPUTE)(state, batch_of(own.vocab_size), hyper)[1]
    for name in ("load_balance_loss", "mtp_load_balance_loss"):
        assert float(found["batch"][name]) > 0.09
        np.testing.assert_allclose(found["layers"][name], 2 * found["batch"][name], rtol=1e-5)


@pytest.mark.slow
def test_eight_devices_compute_what_one_computes(config, random_params):
    params, batch = random_params(config), batch_of(config.vocab_size, [9, 7])
    expected, _ = means(config, COMPUTE, params, batch)
    with jax.set_mesh(make_mesh({"fsdp": 2, "tensor": 2, "context": 2})):
        placed = {name: jax.device_put(params[name], a.sharding) for name, a in abstract_params(config).items()}
        found, _ = means(config, COMPUTE, placed, {k: shard(x, "batch", "sequence") for k, x in batch.items()})
    for name, (mean, *_) in expected.items():
        np.testing.assert_allclose(np.asarray(found[name][0]), mean, rtol=2e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_mtp_layers": -1}, "num_mtp_layers=-1 must be at least 0"),
        ({"mtp_weight": -0.1}, "mtp_weight=-0.1 must be at least 0"),
        ({"norm": None}, "num_mtp_layers=2 needs a norm"),
    ],
)
def test_what_makes_no_sense_is_refused(config, change: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(config, **change)


def test_any_norm_will_do(config, random_params):
    other = dataclasses.replace(config, norm=LayerNorm(eps=1e-5, bias=True), num_mtp_layers=1)
    logits = further_logits(other, random_params(other), batch_of(other.vocab_size)["tokens"])
    assert jnp.isfinite(logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2])
def test_rows_shorter_than_what_is_predicted(config, random_params, length: int):
    """There is nothing further to say, and no gradient of it."""
    params = random_params(config)
    batch = {name: x[:, :length] for name, x in batch_of(config.vocab_size).items()}
    batch["weights"] = jnp.ones((ROWS, length))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def further(params):
        (_, *rest), _ = losses(params, batch, config, COMPUTE)
        return sum(loss for _, loss, _ in rest), [p.weights for p, *_ in rest]

    (loss, weights), gradient = further(params)
    assert [float(w.sum()) for w in weights] == [ROWS * max(0, length - depth) for depth in (1, 2)]
    assert (float(loss) > 0) == (length > 1)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
