"""The logit lens ends with the model's own predictions."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import llama_jax
from llama_jax import UserError, inspect
from llama_jax.models import Compute, DecoderConfig, from_params

GOLDENS = Path(__file__).parent.parent / "parity" / "goldens"
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 12))


@pytest.mark.parametrize(
    "mesh",
    [pytest.param(None, id="one device"), pytest.param({"fsdp": 2, "tensor": 4}, id="mesh", marks=pytest.mark.slow)],
)
def test_last_row_is_the_models_own(mesh: Any, two_layers: DecoderConfig, random_params: Any):
    jax_mesh = mesh and llama_jax.parallel.make_mesh(mesh)
    model = from_params(two_layers, random_params(two_layers), Compute(dtype="float32"), jax_mesh)
    lens = inspect.logit_lens(model, TOKENS, top_k=40)
    assert lens.token_ids.shape == (3, 2, 12, 40)
    logits = np.asarray(model(TOKENS))
    np.testing.assert_array_equal(np.log(lens.probabilities[-1]).argmax(-1), 0)
    chances = np.asarray(jax.nn.softmax(logits))
    np.testing.assert_array_equal(lens.probabilities[-1], -np.sort(-chances, axis=-1))
    following = np.take_along_axis(chances[:, :-1], TOKENS[:, 1:, None], 2)
    np.testing.assert_array_equal(lens.target_probabilities[-1], following[..., 0])
    np.testing.assert_array_equal(lens.target_ranks[-1], (chances[:, :-1] > following).sum(-1))
    # The rows before it: the final norm and head on the hidden states of each layer.
    hidden = model.hidden_states(TOKENS)["layers"][0]
    early = model.run(lambda module, x: jax.nn.softmax(module.logits(module.norm(x))), hidden)
    np.testing.assert_allclose(lens.probabilities[1].max(-1), np.asarray(early).max(-1), rtol=1e-4)


@pytest.mark.slow
def test_reads_the_target_of_an_encoder_decoder():
    lm = llama_jax.load(GOLDENS / "t5_v1_1", dtype="float32")
    source, target = TOKENS + 4, TOKENS[:, :7] + 4
    lens = inspect.logit_lens(lm, {"source": source, "target": target})
    assert lens.token_ids.shape == (4, 2, 7, 5)
    best = np.asarray(lm.model(source, target)).argmax(-1)
    np.testing.assert_array_equal(lens.token_ids[-1, :, :, 0], best)


def test_refuses_what_predicts_no_next_token():
    lm = llama_jax.load(GOLDENS / "bert_mlm", dtype="float32")
    with pytest.raises(UserError, match="EncoderConfig does not predict the next token"):
        inspect.logit_lens(lm, [5, 6, 7])
