"""Small models of GPT-2, GPT-3 and ChatGLM2: packed documents are separate ones. Their runs: run/test_families_run."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.data.objectives import BlankFilling, Causal, Document, Vocabulary
from llama_jax.data.rows.packing import pack
from llama_jax.models import Compute, DecoderConfig, Model, from_params
from llama_jax.nn import RMSNorm
from llama_jax.zoo.glm import glm
from llama_jax.zoo.gpt2 import gpt, gpt3

VOCAB = 304
MODELS = {
    "gpt2": gpt(
        num_layers=2, hidden_size=32, num_heads=4, max_positions=64, vocab_size=VOCAB, dropout=0.1,
        attention_dropout=0.1,
    ),
    "gpt3_125m": gpt3(2, 32, 8, window=4, max_positions=64, vocab_size=VOCAB),
    "chatglm2_6b": glm(
        vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48,
        max_positions=64, norm=RMSNorm(eps=1e-5, cast_last=True),
    ),
}  # fmt: skip


def rows_of(name: str) -> dict[str, np.ndarray]:
    """Eight rows of two documents each, as the objective of the config has them."""
    rng = np.random.default_rng(0)
    vocabulary = Vocabulary(VOCAB, 1, 2, None, special={"[MASK]": 3, "<sop>": 4, "<eop>": 5}, start_ids=(1,))
    objective = BlankFilling(two_dimensional=False) if name == "chatglm2_6b" else Causal()
    texts = [[rng.integers(6, VOCAB, size=n) for n in (9, 14)] for _ in range(8)]
    examples = [[objective.example(Document(text), rng, vocabulary) for text in row] for row in texts]
    rows = [pack(row, 40, None) for row in examples]
    return {field: np.stack([row[field] for row in rows]) for field in rows[0]}


@pytest.mark.quick("gpt2")
@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_are_separate_documents(name: str, random_params: Any):
    config: DecoderConfig = MODELS[name]
    model = from_params(config, random_params(config), Compute())
    fields = ("tokens", "positions", "segment_ids", "prefix")
    rows = {field: values[:2] for field, values in rows_of(name).items() if field in fields}
    together = logits(model, rows)
    segments = rows["segment_ids"]
    first, second = (int((segments[0] == number).sum()) for number in (1, 2))
    # One program for both: the second documents, and before them the first ones, followed by nothing.
    alone = {
        field: np.concatenate([
            np.where(segments == 1, values, 0)[:, :second],
            values[:, first : first + second],
        ])
        for field, values in rows.items()
    }  # fmt: skip
    apart = logits(model, alone)
    np.testing.assert_allclose(together[:, :first], apart[:2, :first], atol=1e-4)
    np.testing.assert_allclose(together[:, first : first + second], apart[2:], atol=1e-4)
    joined = logits(model, rows | {"segment_ids": np.ones_like(segments)})
    assert np.abs(together - joined)[:, first : first + second].max() > 0.1, "packing has to matter"


def logits(model: Model, rows: dict[str, np.ndarray]) -> np.ndarray:
    named = {field: jnp.asarray(values) for field, values in rows.items() if field != "tokens"}
    return np.asarray(model(jnp.asarray(rows["tokens"]), **named))
