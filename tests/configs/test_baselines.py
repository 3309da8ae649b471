"""The models of the baselines generate from a state, and learn in both directions. Runs: run/test_families_run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import override
from llama_jax.models import Compute, DecoderConfig, EncoderConfig, abstract_params, from_params, initialize
from llama_jax.nn import LSTM, BidirectionalRNN
from llama_jax.run import load_config
from llama_jax.sampling import generate
from llama_jax.training import AdamW, init_state, make_train_step

NAMES = ("tiny_ngram", "tiny_rnn", "tiny_lstm", "tiny_gru")
WIDTH, VOCAB = 48, 40


def small(name: str) -> DecoderConfig:
    """The config's model, narrower."""
    model = load_config(name).model
    sizes = {"attention.hidden_size": 40} if name == "tiny_ngram" else {"attention.state_size": WIDTH}
    return override(model, sizes | {"vocab_size": VOCAB, "hidden_size": WIDTH, "max_positions": 64})


@pytest.mark.quick("tiny_ngram", "tiny_lstm")
@pytest.mark.parametrize("name", NAMES)
def test_greedy_is_the_argmax_of_the_full_forward(name: str):
    """Prompts of different lengths in one batch, each continued from its own state."""
    config, rng = small(name), np.random.default_rng(3)
    shapes = {key: a.shape for key, a in abstract_params(config).items()}
    # Embeddings that count for more than the state: otherwise greedy texts are one token again and again.
    values = {key: rng.normal(size=shape, scale=2 if "embedding" in key else 1) for key, shape in shapes.items()}
    params = {key: jnp.asarray(value, jnp.float32) for key, value in values.items()}
    model, lengths, count = from_params(config, params, Compute(dtype="float32")), np.array([5, 1, 9]), 12
    prompts = np.random.default_rng(0).integers(VOCAB, size=(3, 9)).astype(np.int32)
    out = generate(model, prompts, max_new_tokens=count, prompt_lengths=lengths)
    logits = np.asarray(model(jnp.asarray(out)))
    new = np.stack([row[length : length + count] for row, length in zip(out, lengths, strict=True)])
    assert len(set(new.ravel().tolist())) > 6, "a model that repeats itself proves nothing"
    for row, length, scores in zip(new, lengths, logits, strict=True):
        np.testing.assert_array_equal(scores[length - 1 : length + count - 1].argmax(-1), row)


@pytest.mark.slow
def test_a_bidirectional_encoder_learns_what_was_masked():
    """And sees neither padding nor the texts beside: where it stands in a row changes nothing."""
    config = EncoderConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_layers=1,
        max_positions=64,
        attention=BidirectionalRNN(LSTM(state_size=WIDTH // 2)),
        feed_forward=None,
        norm=None,
        residual=False,
        embedding_scale=16.0,
        tie_embeddings=True,
    )
    rng, masked = np.random.default_rng(0), (3, 8, 13, 19)
    targets = rng.integers(1, VOCAB, size=(8, 24)).astype(np.int32)
    tokens, weights = targets.copy(), np.zeros((8, 24), np.float32)
    tokens[:, masked], weights[:, masked] = 0, 1
    batch = {"tokens": tokens, "targets": targets, "weights": weights}
    batch |= {"segment_ids": np.ones_like(tokens), "positions": np.arange(24)[None].repeat(8, 0).astype(np.int32)}
    hyper = AdamW(learning_rate=4e-2, warmup_steps=5, weight_decay=0.0).hyper(40)
    step = make_train_step(config, Compute())
    state, losses = jax.jit(init_state)(initialize(config, 0), hyper), []
    for _ in range(40):
        state, metrics = step(state, batch, hyper)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 3
    assert losses[-1] < 0.1, losses[::5]
    model = from_params(config, state.params, Compute())
    alone = model.run(lambda module, tokens: module(tokens), tokens[:, :9])
    segments = np.repeat([[1, 2, 0]], [11, 9, 4], axis=1).repeat(8, 0).astype(np.int32)
    row = np.concatenate([targets[:, :11], tokens[:, :9], targets[:, :4]], axis=1)
    packed = model.run(lambda module, tokens, ids: module(tokens, segment_ids=ids), row, segments)
    np.testing.assert_allclose(packed[:, 11:20], alone, atol=1e-4)
