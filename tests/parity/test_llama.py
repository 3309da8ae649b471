"""Llama against Hugging Face's own code, layer by layer, so that a failure names its layer.

The goldens are from `make_goldens.py` beside this file.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.checkpoint import load, load_params, open_source
from llama_jax.models import Compute, abstract_params, assemble
from llama_jax.nn import ForwardContext
from llama_jax.sampling import generate

GOLDENS = Path(__file__).parent / "goldens"
CASES = sorted(folder.name for pattern in ("llama_*", "meta_*") for folder in GOLDENS.glob(pattern))
TOLERANCE = 2e-5


def _model(name: str, *, scan: bool):
    source = open_source(GOLDENS / name)
    params = load_params(source, abstract_params(source.config))
    return assemble(source.config, params, Compute(dtype="float32"), scan=scan)


@pytest.mark.quick("llama_gqa", "llama_mqa_biases", "llama_rope_yarn", "meta_llama2_2_shards")
@pytest.mark.parametrize("name", CASES)
def test_layer_by_layer(name):
    expected = np.load(GOLDENS / name / "expected.npz")
    model, tokens = _model(name, scan=False), jnp.asarray(expected["ids"])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    @jax.jit
    def results():
        found = [model.embedding(tokens, jnp.dtype(jnp.float32))]
        for layer in range(len(model.layers)):
            found.append(model.layers[layer](found[-1], positions=positions, ctx=ForwardContext())[0])
        return found[1:], model.head(model.norm(found[-1]), model.head_weight()), model(tokens)

    layers, *logits = results()
    for layer, x in enumerate(layers):
        np.testing.assert_allclose(x, expected[f"layer_{layer}"], atol=TOLERANCE, err_msg=f"layer {layer}")
    assert 0.9 < expected["logits"].std() < 1.1
    for found, of in zip(logits, ("norm and head", "the whole model"), strict=True):
        np.testing.assert_allclose(found, expected["logits"], atol=TOLERANCE, err_msg=of)


@pytest.mark.quick("llama_gqa", "llama_mqa_biases", "llama_rope_yarn", "meta_llama3_4_shards")
@pytest.mark.parametrize("name", CASES)
def test_logits_of_a_scan_over_layers(name):
    expected = np.load(GOLDENS / name / "expected.npz")
    logits = jax.jit(_model(name, scan=True).__call__)(jnp.asarray(expected["ids"]))
    np.testing.assert_allclose(logits, expected["logits"], atol=TOLERANCE)


@pytest.mark.quick("llama_gqa", "llama_rope_yarn")
@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens(name):
    """With the cache; the goldens' own margins are far above the error."""
    expected = np.load(GOLDENS / name / "expected.npz")
    generated, prompt_length = expected["generated"], 5
    num_new = generated.shape[1] - prompt_length
    assert num_new >= 16
    assert expected["margin"] > 10 * TOLERANCE
    assert all(len(set(row[prompt_length:].tolist())) > 5 for row in generated)
    tokens = generate(load(GOLDENS / name), generated[:, :prompt_length], max_new_tokens=num_new)
    np.testing.assert_array_equal(tokens, generated)
