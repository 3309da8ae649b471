"""GPT-2, GLM and ChatGLM2 against the original code, layer by layer, so that a failure names its layer; and back.

The goldens are from `make_goldens.py` beside this file.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.checkpoint.convert import load_params, open_source
from llama_jax.checkpoint.formats.huggingface import read_directory
from llama_jax.checkpoint.language_model import LanguageModel, convert, load
from llama_jax.models import Compute, Model, abstract_params, assemble
from llama_jax.sampling.generate import generate

GOLDENS = Path(__file__).parent / "goldens"
CASES = ("gpt2", "gpt2_released_names", "glm", "chatglm2")
TOLERANCE = 5e-5


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def expected(case: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDENS / case / "expected.npz"))


@pytest.fixture(scope="module")
def lm(case: str) -> LanguageModel:
    return load(GOLDENS / case)


def test_layer_by_layer(lm: LanguageModel, expected: dict[str, np.ndarray]):
    layers = lm.model.hidden_states(jnp.asarray(expected["ids"]))["layers"]
    for i, found in enumerate(layers):
        np.testing.assert_allclose(found, expected[f"layer_{i}"], atol=TOLERANCE, err_msg=f"layer {i}")
    assert f"layer_{len(layers)}" not in expected


def test_logits(case: str, lm: LanguageModel, expected: dict[str, np.ndarray]):
    assert 0.9 < expected["logits"].std() < 1.1
    tokens = jnp.asarray(expected["ids"])
    np.testing.assert_allclose(lm.model(tokens), expected["logits"], atol=TOLERANCE)
    source = open_source(GOLDENS / case)
    params = load_params(source, abstract_params(source.config))
    scanned = Model(assemble(source.config, params, Compute(), scan=True))
    np.testing.assert_allclose(scanned(tokens), expected["logits"], atol=TOLERANCE)


def test_greedy_tokens(lm: LanguageModel, expected: dict[str, np.ndarray]):
    """With the cache; the goldens' own margins are far above the error."""
    generated, prompt_length = expected["generated"], 5
    num_new = generated.shape[1] - prompt_length
    assert num_new >= 16
    assert expected["margin"] > 10 * TOLERANCE
    assert all(len(set(row[prompt_length:].tolist())) > 5 for row in generated)
    tokens = generate(lm, generated[:, :prompt_length], max_new_tokens=num_new)
    np.testing.assert_array_equal(tokens, generated)


def test_export_gives_the_same_tensors(case: str, tmp_path: Path):
    convert(GOLDENS / case, tmp_path / "out", to="hf")
    original, written = read_directory(GOLDENS / case), read_directory(tmp_path / "out")
    computed = (".attn.bias", ".attn.masked_bias", ".inv_freq")
    trained = {name: tensor for name, tensor in original.items() if not name.endswith(computed)}
    prefix = "transformer." if case == "gpt2_released_names" else ""
    assert {prefix + name for name in trained} == set(written)
    for name, tensor in trained.items():
        np.testing.assert_array_equal(written[prefix + name].read(), tensor.read(), err_msg=name)
    assert open_source(tmp_path / "out").config == open_source(GOLDENS / case).config
