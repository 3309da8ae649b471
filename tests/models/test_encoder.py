"""What an encoder must be: blind to padding and to its neighbours, and able to learn what it is asked."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from llama_jax.config import UserError, override
from llama_jax.data.objectives import Causal, Classification, MaskedLM
from llama_jax.models import Compute, EncoderConfig, Model, abstract_params, assemble, build, from_params
from llama_jax.parallel import make_mesh
from llama_jax.run import RunConfig
from llama_jax.sampling import generate
from llama_jax.training import AdamW, Constant, init_state, make_train_step, train_flops_per_token
from llama_jax.training.step import losses
from llama_jax.zoo.bert import encoder

HEADS = {"pooler": True, "pair_head": True, "head_transform": "gelu", "head_bias": "trained"}
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 4,
    "intermediate_size": 24,
    "max_positions": 32,
    "eps": 1e-12,
}


@pytest.fixture(scope="module")
def bert() -> EncoderConfig:
    """With the heads of pretraining and a classifier; without dropout, which the tests of it set."""
    return encoder(**SIZES, **HEADS, num_token_types=2, num_classes=3, dropout=0.0, attention_dropout=0.0)


@pytest.fixture(scope="module")
def roberta(bert: EncoderConfig) -> EncoderConfig:
    heads = {"head_transform": "gelu", "head_bias": "trained", "num_classes": 3, "classifier": "dense"}
    return encoder(**SIZES, **heads, num_token_types=1, offset=2, dropout=0.0, attention_dropout=0.0)


def texts(lengths: tuple[int, ...], seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 40, n).astype(np.int32) for n in lengths]


def everything(module: Any, tokens: jax.Array, others: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What a model says of texts that stand alone in their rows."""
    found = {name: getattr(module, name)(tokens, **others) for name in ("token_logits", "class_logits")}
    if module.part("pooler") is not None:
        found |= {name: getattr(module, name)(tokens, **others) for name in ("pooled", "pair_logits")}
    return found


@pytest.mark.quick("roberta")
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_padding_is_not_seen_on_either_side(kind: str, request, random_params):
    config = request.getfixturevalue(kind)
    model = from_params(config, random_params(config), Compute())
    (text,) = texts((9,))
    alone = model.run(everything, jnp.asarray(text[None]), {})
    rng = np.random.default_rng(2)
    tokens, mask = rng.integers(0, 40, (2, 14)).astype(np.int32), np.zeros((2, 14), np.int32)
    for row, places in enumerate((slice(0, 9), slice(5, 14))):
        tokens[row, places], mask[row, places] = text, 1
    padded = model.run(everything, jnp.asarray(tokens), {"mask": jnp.asarray(mask)})
    of_tokens = alone["token_logits"]
    np.testing.assert_allclose(padded["token_logits"][mask == 1].reshape(2, 9, -1), of_tokens.repeat(2, 0), atol=2e-5)
    for name in alone.keys() - {"token_logits"}:  # of the first token, which stands first where padding is behind
        np.testing.assert_allclose(padded[name][:1], alone[name], atol=2e-5, err_msg=name)
    unmasked = model.run(everything, jnp.asarray(tokens), {"mask": jnp.ones_like(mask)})["token_logits"]
    assert np.abs(unmasked[0, :9] - of_tokens[0]).max() > 0.1, "without a mask it is seen"


def batch_of(lengths: tuple[int, ...], *, rows: int = 4, length: int = 32, classes: bool = False) -> dict[str, Any]:
    """Rows of packed examples, as the data room makes them."""
    rng, width = np.random.default_rng(0), sum(lengths)
    batch = {name: np.zeros((rows, length), np.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    batch["weights"] = np.zeros((rows, length), np.float32)
    begins = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    batch["tokens"][:, :width] = rng.integers(1, 40, (rows, width))
    batch["positions"][:, :width] = np.concatenate([np.arange(n) for n in lengths])
    batch["segment_ids"][:, :width] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    if classes:
        del batch["targets"]
        batch["weights"][:, begins] = 1
        batch["class_targets"] = np.zeros((rows, length), np.int32)
        batch["class_targets"][:, begins] = rng.integers(0, 3, (rows, len(lengths)))
    else:
        batch["targets"][:, :width] = rng.integers(1, 40, (rows, width))
        batch["weights"][:, :width] = rng.random((rows, width)) < 0.3
        batch["token_types"] = (batch["positions"] > 4).astype(np.int32)
        batch["pair_weights"] = np.zeros((rows, length), np.float32)
        batch["pair_weights"][:, begins] = 1
        batch["pair_targets"] = np.zeros((rows, length), np.int32)
        batch["pair_targets"][:, begins] = rng.integers(0, 2, (rows, len(lengths)))
    return {name: jnp.asarray(x) for name, x in batch.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def mean_losses(config: EncoderConfig, compute: Compute, params: Any, batch: dict[str, jax.Array]) -> Any:
    found, _ = losses(params, batch, config, compute)
    return {p.name: loss / p.weights.sum() for p, loss, _ in found}


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss_and_gradient(config: EncoderConfig, compute: Compute, params: Any, batch: dict[str, jax.Array]) -> Any:
    def total(params: Any) -> Any:
        values = mean_losses(config, compute, params, batch)
        return sum(values.values()), values

    return jax.value_and_grad(total, has_aux=True)(params)


@pytest.mark.parametrize("classes", [False, True])
def test_packed_losses_are_the_means_over_the_texts(classes: bool, bert, random_params):
    """Every text of a row has its own first token, whose pair or class is read there."""
    params, lengths = random_params(bert), (9, 12)
    batch = batch_of(lengths, classes=classes)
    together = mean_losses(bert, Compute(), params, batch)
    model, batch = from_params(bert, params, Compute()), {name: np.asarray(x) for name, x in batch.items()}

    def nats(logits: jax.Array, targets: np.ndarray) -> np.ndarray:
        return -np.take_along_axis(log_softmax(np.asarray(logits), -1), targets[..., None], -1)[..., 0]

    # Each text in a row of its own.
    size = max(lengths)
    parts = {name: (np.pad(x[:, :9], ((0, 0), (0, size - 9))), x[:, 9 : 9 + size]) for name, x in batch.items()}
    of = {name: np.concatenate(part) for name, part in parts.items()}
    mask = np.arange(size) < np.repeat(lengths, len(batch["tokens"]))[:, None]
    kinds = of.get("token_types", np.zeros_like(of["tokens"]))
    found = model.run(everything, of["tokens"], {"mask": mask.astype(np.int32), "token_types": kinds})
    if classes:
        expected = {"loss": nats(found["class_logits"], of["class_targets"][:, 0])}
    else:
        expected = {"loss": nats(found["token_logits"], of["targets"]) * of["weights"]}
        # Entry 0 of the released heads says that the second text follows.
        expected["pair_loss"] = nats(found["pair_logits"], 1 - of["pair_targets"][:, 0])
    assert together.keys() == expected.keys()
    weights = {"loss": batch["weights"].sum(), "pair_loss": 2 * len(batch["tokens"])}
    for name, values in expected.items():
        np.testing.assert_allclose(together[name], float(values.sum()) / float(weights[name]), rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_sharded_is_one_device(bert, random_params):
    params, batch = random_params(bert), batch_of((9, 12))
    (loss, _), gradient = loss_and_gradient(bert, Compute(), params, batch)
    with jax.set_mesh(make_mesh({"context": 2, "fsdp": 2, "tensor": 2})):
        placed = {name: jax.device_put(params[name], a.sharding) for name, a in abstract_params(bert).items()}
        (sharded_loss, _), sharded = loss_and_gradient(bert, Compute(), placed, batch)
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-5)
    unused = {"classifier.weight", "classifier.bias"}
    for name, value in gradient.items():
        assert (np.abs(value).max() > 0) == (name not in unused), name
        np.testing.assert_allclose(sharded[name], value, atol=2e-5, rtol=1e-3, err_msg=name)


@pytest.mark.slow
def test_one_batch_is_learned_by_heart(bert):
    """With dropout, as trained; masked tokens and pairs together."""
    config = dataclasses.replace(bert, dropout=0.05, num_classes=0)
    batch = batch_of((9, 12))
    hyper = AdamW(learning_rate=2e-2, warmup_steps=3, weight_decay=0.0, schedule=Constant()).hyper(60)
    step = make_train_step(config, Compute())
    state = init_state(build(config).params(), hyper)
    first = None
    for _ in range(60):
        state, metrics = step(state, batch, hyper)
        first = first or dict(metrics)
    for name in ("loss", "pair_loss"):
        assert float(metrics[name]) < 0.2 * float(first[name]), (name, first[name], metrics[name])


def test_dropout_is_training_s_alone(bert, random_params):
    """The classifier has its own, and where it names no rate the model's."""
    params, batch = random_params(bert), batch_of((9, 12), classes=True)

    @functools.partial(jax.jit, static_argnums=0)
    def hidden(config: EncoderConfig, key: jax.Array | None) -> jax.Array:
        model = assemble(config, params, Compute())
        return model.loss_terms(batch, key=key)[0][0].hidden

    key = jax.random.key(0)
    plain = hidden(bert, None)
    np.testing.assert_array_equal(hidden(dataclasses.replace(bert, dropout=0.5), None), plain)
    own = hidden(dataclasses.replace(bert, classifier_dropout=0.5), key)
    kept = np.asarray(own) != 0
    assert 0.4 < kept.mean() < 0.6
    np.testing.assert_allclose(own, np.where(kept, 2 * plain, 0), rtol=1e-5)
    everywhere = hidden(dataclasses.replace(bert, dropout=0.5), key)
    assert np.abs(np.asarray(everywhere)[kept] - np.asarray(own)[kept]).max() > 0.01
    assert not bert.needs_rng
    assert dataclasses.replace(bert, classifier_dropout=0.5).needs_rng


def test_flops_are_those_of_every_token_seeing_every_other(bert):
    length, width, inner, layers = 16, 16, 24, 2
    matrices = layers * (4 * width**2 + 2 * width * inner) + width**2 + 40 * width  # blocks, transform, head
    of_first_token = width**2 + 2 * width + 3 * width
    scores = layers * 2 * 2 * width * length  # every token's, forward
    expected = 6 * (matrices + of_first_token / length) + 3 * scores
    config = dataclasses.replace(bert, num_layers=layers)
    assert train_flops_per_token(config, length) == pytest.approx(expected)


def test_what_a_model_lacks_is_named(bert, random_params):
    tokens = jnp.ones((1, 4), jnp.int32)
    config = dataclasses.replace(bert, pooler=False, pair_head=False, num_classes=0, num_token_types=0)
    bare = from_params(config, random_params(config), Compute())
    for ask, named in (
        (lambda m: m.class_logits(tokens), "no classifier.*num_classes"),
        (lambda m: m.pair_logits(tokens), "no pair_head.*pair_head=true"),
        (lambda m: m.pooled(tokens), "no pooler.*pooler=true"),
        (lambda m: m(tokens, token_types=tokens), "num_token_types=0"),
    ):
        with pytest.raises(UserError, match=named):
            jax.eval_shape(lambda ask=ask: ask(bare.module))
    with pytest.raises(UserError, match="EncoderConfig continues no texts"):
        generate(bare, np.ones((1, 4), np.int32))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pooler": False}, "pair_head=True needs pooler=true"),
        ({"pooler": False, "pair_head": False}, "num_classes=3 needs pooler=true"),
        ({"num_classes": -1}, "num_classes=-1 must be at least 0"),
        ({"classifier_dropout": 1.0}, "classifier_dropout=1.0 must be at least 0 and below 1"),
        ({"norm": None, "norm_placement": "pre"}, "head_transform='gelu' needs a norm"),
    ],
)
def test_impossible_encoders(change: dict[str, Any], sentence: str, bert):
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(bert, **change)


@pytest.mark.parametrize(
    ("change", "objective", "sentence"),
    [
        ({}, Causal(), "data.objective=Causal asks for tokens that EncoderConfig"),
        ({"pair_head": False}, MaskedLM(), "gives pair_targets, pair_weights, which EncoderConfig does not take"),
        ({"num_token_types": 1}, MaskedLM(), "gives token_types, which"),
        ({"num_classes": 0}, Classification(("a", "b")), "gives class_targets, which"),
        ({}, Classification(("a", "b")), "data.objective.labels has 2 labels and model.num_classes=3"),
    ],
)
def test_an_objective_that_is_not_the_model_s_is_refused(change, objective, sentence: str, bert, run_config: RunConfig):
    data = dataclasses.replace(run_config.data, objective=objective)
    logging = dataclasses.replace(run_config.logging, sample_prompts=())
    model = dataclasses.replace(bert, vocab_size=304, **change)
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(run_config, model=model, data=data, logging=logging)
    with pytest.raises(UserError, match="class_targets, which DecoderConfig does not take"):
        override(run_config, {"data.objective": Classification(("a", "b"))})


def test_model_is_called_through_its_public_interface(bert, random_params):
    config = dataclasses.replace(bert, num_layers=2)
    model: Model = from_params(config, random_params(config), Compute())
    tokens = jnp.ones((2, 6), jnp.int32)
    found = model.run(everything, tokens, {"mask": tokens})["class_logits"]
    assert found.shape == (2, 3)
    np.testing.assert_array_equal(model(tokens, mask=tokens), found)
    assert [x.shape for x in model.hidden_states(tokens, mask=tokens)["layers"]] == [(2, 6, 16)] * 2
