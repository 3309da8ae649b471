"""Objectives in a decoder: what must not be seen has no gradient, and rows of several examples are the examples."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import objective_cases as cases
import pytest
from objective_cases import CASES, VOCABULARY

from llama_jax.data.objectives import Example, Objective
from llama_jax.data.rows.packing import pack
from llama_jax.models import Compute, DecoderConfig, assemble
from llama_jax.nn.attention import blockwise
from llama_jax.training.step import losses, model_batch

# Classes of whole texts are no task for a decoder: tests/models/test_encoder.py has them.
every_objective = pytest.mark.parametrize("name", [n for n, o in CASES.items() if "targets" in o.fields()])
LENGTH, SOURCE_LENGTH = 44, 32  # room for two examples and padding


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of which a row has several."""
    monkeypatch.setattr(blockwise, "MIN_QUERY_BLOCK", 20)
    monkeypatch.setattr(blockwise, "KEY_BLOCK", 16)


def two_examples(objective: Objective) -> list[Example]:
    """Of different sizes, in which something is predicted and something is not."""
    rng = np.random.default_rng(4)
    return [objective.example(cases.document_of(objective, n, rng), rng, VOCABULARY) for n in (13, 9)]


def rows_of(objective: Objective, *rows: list[Example]) -> dict[str, jax.Array]:
    source = None if objective.source_length is None else SOURCE_LENGTH
    # A decoder without a source gets rows of the same length as one with it, and the same program.
    length = LENGTH if source else LENGTH + SOURCE_LENGTH
    packed = [pack(row, length, source) for row in rows]
    return {name: jnp.asarray(np.stack([row[name] for row in packed])) for name in packed[0]}


def visible(objective: Objective, examples: list[Example]) -> np.ndarray:
    """[T, T]: what each position of the row may see, put together from what each example's may."""
    joined = objective.source_length is not None
    # Where each example's positions stand: its source in the first part of the row, its target in the second.
    places, at_source, at_target = [], 0, SOURCE_LENGTH if joined else 0
    for example in examples:
        m, n = len(example["source_tokens"]) if joined else 0, len(example["tokens"])
        places.append(np.concatenate([at_source + np.arange(m), at_target + np.arange(n)]).astype(int))
        at_source, at_target = at_source + m, at_target + n
    total = SOURCE_LENGTH + LENGTH
    seen = np.zeros((total, total), bool)
    for place, example in zip(places, examples, strict=True):
        seen[np.ix_(place, place)] = cases.seen_by(objective, example)
    padding = np.setdiff1d(np.arange(total), np.concatenate(places))
    seen[np.ix_(padding, padding)] = np.tri(len(padding), dtype=bool)
    return seen


@functools.cache
def jacobian(config: DecoderConfig, kernel: str):
    """d(a mix of position t's hidden values) / d(position s's embedding), for a row of positions' own embeddings."""

    @jax.jit
    def function(params, table, batch):
        def scalars(table):
            model = assemble(config, params | {"embedding.weight": table}, Compute(attention_kernel=kernel))
            own = jnp.arange(table.shape[0])[None]
            hidden, _ = model.trunk(**batch | {"tokens": own})
            return hidden[0] @ jnp.linspace(1.0, 2.0, hidden.shape[-1])

        return jax.jacrev(scalars)(table)

    return function


@every_objective
@pytest.mark.parametrize(("kernel", "layers"), [("reference", 2), ("blockwise", 1)])
def test_nothing_is_seen_that_must_not_be(name: str, kernel: str, layers: int, tiny_config, random_params):
    """Through two layers nothing comes by a detour; with one, nothing that ought to be seen has to."""
    objective = CASES[name]
    examples = two_examples(objective)
    batch = model_batch(rows_of(objective, examples), tiny_config)
    batch = {field: batch[field] for field in ("tokens", "positions", "segment_ids", "prefix") if field in batch}
    config = dataclasses.replace(tiny_config, num_layers=layers)
    params = random_params(config)
    tokens = np.asarray(batch["tokens"])[0]
    size = jacobian(config, kernel)(params, params["embedding.weight"][tokens], batch)
    np.testing.assert_array_equal(np.abs(size).max(-1) > 0, visible(objective, examples))


@functools.partial(jax.jit, static_argnums=0)
def loss_and_logits(config: DecoderConfig, params, batch):
    compute = Compute(attention_kernel="reference")
    ((prediction, loss, ce),), _ = losses(params, batch, config, compute)
    return loss, ce, prediction.head(prediction.hidden, prediction.head_weight)


@every_objective
def test_packed_examples_are_the_examples_alone(name: str, tiny_config, random_params):
    objective, params = CASES[name], random_params(tiny_config)
    examples = two_examples(objective)
    together, *alone = (
        loss_and_logits(tiny_config, params, rows_of(objective, row)) for row in (examples, examples[:1], examples[1:])
    )
    assert float(together[0]) == pytest.approx(sum(float(x[0]) for x in alone), rel=1e-5)
    assert float(together[0]) > 1
    starts = {"tokens": SOURCE_LENGTH if objective.source_length else 0, "source_tokens": 0}
    for stream in starts.keys() & examples[0].keys():
        begin, at = starts[stream], starts[stream]
        for example, single in zip(examples, alone, strict=True):
            n = len(example[stream])
            np.testing.assert_allclose(together[2][0, at : at + n], single[2][0, begin : begin + n], atol=1e-4)
            at += n


@every_objective
def test_only_weighted_targets_count(name: str, tiny_config, random_params):
    """Targets without weight may be anything; of those with weight none may."""
    objective, params = CASES[name], random_params(tiny_config)
    batch = rows_of(objective, two_examples(objective))
    loss = loss_and_logits(tiny_config, params, batch)[0]
    other = (batch["targets"] + 1) % cases.SIZE
    free = batch | {"targets": jnp.where(batch["weights"] > 0, batch["targets"], other)}
    assert loss_and_logits(tiny_config, params, free)[0] == loss
    weighted = np.flatnonzero(batch["weights"][0])
    for place in (weighted[0], weighted[-1]):
        changed = batch | {"targets": batch["targets"].at[0, place].set(other[0, place])}
        assert abs(float(loss_and_logits(tiny_config, params, changed)[0] - loss)) > 1e-3
