"""A tiny BART and its own objective: one batch by heart, packed rows, eight devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.data.objectives import Denoising, Document, Example, Vocabulary
from llama_jax.data.rows.packing import pack
from llama_jax.models import Compute, EncoderDecoderConfig, Model, abstract_params, assemble, buffers, init_params
from llama_jax.nn import LearnedPositions
from llama_jax.parallel import make_mesh, shard
from llama_jax.sampling import generate
from llama_jax.training import AdamW, Constant, init_state, make_train_step
from llama_jax.training.step import losses
from llama_jax.zoo.transformer import transformer

BOS, PAD, EOS, STOP, MASK, FIRST_WORD, SIZE = 0, 1, 2, 3, 4, 5, 40
VOCABULARY = Vocabulary(SIZE, BOS, EOS, PAD, special={"<mask>": MASK}, sentence_ends=(STOP,))
OBJECTIVE = Denoising(source_length=24)
LENGTH = SOURCE_LENGTH = 24


@pytest.fixture(scope="module")
def config() -> EncoderDecoderConfig:
    """An encoder of its own size, so that nothing is mistaken for the decoder's; no dropout."""
    return transformer(
        vocab_size=SIZE,
        hidden_size=16,
        num_encoder_layers=2,
        num_layers=1,
        encoder_heads=2,
        num_heads=4,
        encoder_intermediate_size=24,
        intermediate_size=32,
        max_positions=32,
        positions=LearnedPositions(32, offset=2),
        decoder_start_id=EOS,
        scale_embedding=False,
        activation="gelu",
        embedding_norm=True,
        head_bias="fixed",
        dropout=0.0,
    )


@pytest.fixture(scope="module")
def params(config: EncoderDecoderConfig) -> dict[str, jax.Array]:
    """All random and none small: norms, biases and the fixed bias of the logits too."""
    rng = np.random.default_rng(0)
    values = {name: jnp.asarray(rng.normal(size=a.shape), jnp.float32) for name, a in abstract_params(config).items()}
    assert "head_bias.bias" in values
    return {name: 1 + 0.3 * v if "norm" in name else 0.3 * v for name, v in values.items()}


def examples() -> list[Example]:
    """Of documents of different lengths, of two sentences each."""
    rng = np.random.default_rng(1)
    found = []
    for n in (9, 12, 7, 10, 11, 8, 12, 9):
        text = rng.integers(FIRST_WORD, SIZE, n).astype(np.int32)
        text[[n // 2, n - 1]] = STOP
        found.append(OBJECTIVE.example(Document(text), rng, VOCABULARY))
    return found


def batch_of(*rows: list[Example]) -> dict[str, jax.Array]:
    """Always eight rows, of padding where there are no more: one program for all."""
    packed = [pack(row, LENGTH, SOURCE_LENGTH) for row in rows]
    missing = ((0, 8 - len(rows)), (0, 0))
    return {name: jnp.asarray(np.pad(np.stack([row[name] for row in packed]), missing)) for name in packed[0]}


def loss(config: EncoderDecoderConfig, params: Any, batch: Any) -> jax.Array:
    return losses(params, batch, config, Compute(), label_smoothing=0.1)[0][0][1]


@functools.cache
def value_and_grad(config: EncoderDecoderConfig) -> Any:
    return jax.jit(jax.value_and_grad(functools.partial(loss, config)))


def assert_same(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    np.testing.assert_allclose(found[0], expected[0], rtol=rtol)
    for name, want in expected[1].items():
        limit = 1e-4 * max(float(jnp.abs(want).max()), 1e-2)
        np.testing.assert_allclose(found[1][name], want, atol=limit, err_msg=name)


@pytest.mark.slow
def test_packed_is_separate(config: EncoderDecoderConfig, params: dict[str, jax.Array]):
    """Loss, gradient and every document's own hidden values: learned positions begin anew, and no document reads
    another's source."""
    first, second, *_ = examples()
    together, apart = batch_of([first, second], [second, first]), batch_of([first], [second], [second], [first])
    gradient = value_and_grad(config)
    assert_same(gradient(params, together), gradient(params, apart))

    @jax.jit
    def hidden(params: Any, batch: Any) -> jax.Array:
        (prediction,), _ = assemble(config, params, Compute()).loss_terms(batch)
        return prediction.hidden

    packed, alone = hidden(params, together), hidden(params, apart)
    n, m = len(first["tokens"]), len(second["tokens"])
    np.testing.assert_allclose(packed[0, :n], alone[0, :n], atol=1e-5)
    np.testing.assert_allclose(packed[0, n : n + m], alone[1, :m], atol=1e-5)
    # What stands in one document's source changes its own target alone.
    other = together | {"source_tokens": together["source_tokens"].at[0, 0].add(1)}
    changed = np.abs(hidden(params, other) - packed).max(-1)
    assert (changed[0, :n] > 1e-4).all()
    assert changed[0, n : n + m].max() == 0


@pytest.mark.slow
def test_eight_devices_are_one(config: EncoderDecoderConfig, params: dict[str, jax.Array]):
    batch = batch_of(*[[example] for example in examples()])
    expected = value_and_grad(config)(params, batch)
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        placed = {
            name: jax.device_put(np.asarray(params[name]), a.sharding) for name, a in abstract_params(config).items()
        }
        rows = {name: shard(jax.device_put(np.asarray(x)), "batch", "sequence") for name, x in batch.items()}
        assert any(not a.sharding.is_fully_replicated for a in placed.values())
        found = value_and_grad(config)(placed, rows)
    assert_same(found, expected, rtol=1e-4)


@pytest.mark.slow
def test_a_batch_is_learned_by_heart(config: EncoderDecoderConfig):
    """And written again from its sources with holes. The bias of the logits, which is only loaded, stays."""
    learned = examples()[:4]
    batch, compute = batch_of(*[[example] for example in learned]), Compute()
    hyper = AdamW(learning_rate=2e-2, warmup_steps=5, weight_decay=0.0, schedule=Constant()).hyper(60)
    first = init_params(config, 0)
    state, step, found = init_state(first, hyper, frozenset(buffers(config))), make_train_step(config, compute), []
    assert set(state.buffers) == {"head_bias.bias"}
    for _ in range(60):
        state, metrics = step(state, batch, hyper)
        found.append(float(metrics["loss"]))
    assert found[0] > 3
    assert found[-1] < 0.02
    np.testing.assert_array_equal(state.buffers["head_bias.bias"], np.zeros(SIZE))
    model = Model(assemble(config, state.params | state.buffers, compute, scan=False), None)
    sources = np.asarray(batch["source_tokens"])[:4]
    lengths = np.array([len(example["source_tokens"]) for example in learned])
    answers = generate(model, sources, prompt_lengths=lengths, max_new_tokens=16, eos_id=EOS)
    for answer, example in zip(answers, learned, strict=True):
        n = len(example["targets"])
        assert answer[0] == EOS
        np.testing.assert_array_equal(answer[1 : 1 + n], example["targets"])
