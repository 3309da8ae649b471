"""Speculative decoding: the tokens of plain decoding, whoever guesses them, and guesses that are worth it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llama_jax.checkpoint import LanguageModel, load
from llama_jax.config import UserError
from llama_jax.models import DecoderConfig, Model
from llama_jax.nn import LSTM, LearnedPositions
from llama_jax.parallel import make_mesh
from llama_jax.sampling import Speculation, generate, generate_text

PARITY = Path(__file__).parents[1] / "parity" / "goldens"
PROMPTS = [[5, 9, 3, 20, 7], [11, 30, 3], [1], [4, 4, 4, 4, 4, 4, 4, 8, 6], [2, 1]]


@pytest.fixture(scope="module")
def draft(two_layers: DecoderConfig, make_model) -> Model:
    return make_model(dataclasses.replace(two_layers, num_layers=1))


@pytest.fixture(scope="module")
def mtp() -> LanguageModel:
    return load(PARITY / "deepseek_v3_mtp")


DRAWN: dict[str, Any] = {"max_new_tokens": 14, "eos_id": [2, 17, 40], "temperature": 0.9, "top_p": 0.9, "seed": 3}


@pytest.mark.quick("prompt")
@pytest.mark.parametrize("kind", ["prompt", "model", "mtp"])
def test_tokens_are_those_without_guesses(kind: str, model: Model, draft: Model, mtp: LanguageModel):
    lm, guess = (mtp, "mtp") if kind == "mtp" else (model, draft if kind == "model" else "prompt")
    plain = generate(lm, PROMPTS, **DRAWN)
    # Few rows: they are refilled, and what the draft knows of them is made up for.
    speculation = Speculation(guess, 1 if kind == "mtp" else 3)
    np.testing.assert_array_equal(generate(lm, PROMPTS, draft=speculation, rows=2, **DRAWN), plain)
    assert speculation.proposed > speculation.accepted


@pytest.mark.slow
def test_a_model_guesses_itself(model: Model):
    """The same model with the same keys draws the same tokens: all of its guesses are right."""
    speculation = Speculation(model)
    generate(model, PROMPTS, max_new_tokens=15, draft=speculation, rows=2, temperature=1.0)
    assert speculation.accepted == speculation.proposed == 3 * 4 * len(PROMPTS)
    assert (speculation.acceptance_rate, speculation.tokens_per_pass) == (1, 5)
    assert str(speculation) == "60 of 60 drafted tokens accepted (100%), 5.00 tokens per forward pass"


@pytest.mark.slow
def test_further_blocks_guess_what_they_were_trained_to(mtp: LanguageModel):
    speculation = Speculation("mtp")
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, mtp.config.vocab_size, (8, 6))
    found = generate(mtp, prompts, max_new_tokens=16, draft=speculation)
    guesses = np.asarray(mtp.model.run(lambda m, x: m.mtp_logits(x), jnp.asarray(found))).argmax(-1)
    right, proposed = 0, 0
    for text, guess in zip(found, guesses, strict=True):
        length = prompts.shape[1]
        while length < len(text):
            hit = guess[length - 2] == text[length]
            right, proposed, length = right + hit, proposed + 1, length + 1 + hit
    assert (speculation.accepted, speculation.proposed) == (right, proposed)
    assert right > 0


@pytest.mark.slow
def test_the_distribution_is_that_of_the_sampler(two_layers: DecoderConfig, make_model):
    size, count = 8, 20_000
    small = dataclasses.replace(two_layers, vocab_size=size, num_layers=1)
    model, draft = make_model(small), make_model(dataclasses.replace(small, num_layers=2))
    speculation = Speculation(draft, 2)
    found = generate(
        model, [[1, 5, 3]] * count, max_new_tokens=3, temperature=1.5, top_k=5, draft=speculation, rows=4096
    )
    assert 0.1 < speculation.acceptance_rate < 0.9  # some guesses are right and some wrong
    pairs = np.array([[1, 5, 3, i, j] for i in range(size) for j in range(size)])
    logits = np.asarray(model(jnp.asarray(pairs))) / 1.5
    kept = np.where(logits >= np.sort(logits)[..., -5:-4], logits, -np.inf)
    p = np.asarray(jax.nn.softmax(kept, -1), np.float64)
    expected = p[:, 2][np.arange(len(pairs)), pairs[:, 3]] * p[:, 3][np.arange(len(pairs)), pairs[:, 4]]
    observed = np.bincount(found[:, 3] * size + found[:, 4], minlength=len(pairs))
    assert observed[expected == 0].sum() == 0
    real = expected > 0
    assert stats.chisquare(observed[real], expected[real] / expected[real].sum() * count).pvalue > 0.001


@pytest.mark.slow
def test_the_end_of_the_positions(two_layers: DecoderConfig, make_model):
    """Guesses behind the last position are no reason to stop before it."""
    model = make_model(dataclasses.replace(two_layers, positions=LearnedPositions(16, offset=0), max_positions=16))
    plain = generate(model, [[3, 4], [7]], max_new_tokens=14)
    np.testing.assert_array_equal(generate(model, [[3, 4], [7]], max_new_tokens=14, draft=model), plain)


@pytest.mark.slow
def test_a_mesh_changes_nothing(two_layers: DecoderConfig, make_model, model: Model):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    sharded, draft = (make_model(dataclasses.replace(two_layers, num_layers=n), mesh) for n in (2, 1))
    plain = generate(model, PROMPTS[:3], max_new_tokens=6, temperature=1, top_k=9)
    for guess in ("prompt", draft):
        found = generate(sharded, PROMPTS[:3], max_new_tokens=6, temperature=1, top_k=9, draft=guess)
        np.testing.assert_array_equal(found, plain)
    with pytest.raises(UserError, match="the draft is on another mesh"):
        generate(sharded, PROMPTS, draft=model)


@pytest.mark.slow
def test_an_encoder_decoder_looks_its_answer_up():
    lm, speculation = load(PARITY / "t5_v1_0"), Speculation("prompt", 3)
    plain = generate(lm, PROMPTS[:2], max_new_tokens=14)
    np.testing.assert_array_equal(generate(lm, PROMPTS[:2], max_new_tokens=14, draft=speculation), plain)
    assert speculation.accepted > 0


@pytest.mark.slow
def test_texts_take_a_draft(lm: LanguageModel):
    options: dict[str, Any] = {"max_new_tokens": 8, "seed": 4}
    (plain,) = generate_text(lm, "one fish", **options)
    speculation = Speculation(lm, 3)
    assert generate_text(lm, ["one fish"], draft=speculation, **options) == [plain]
    assert "".join(generate_text(lm, "one fish", stream=True, draft="prompt", draft_tokens=2, **options)) == plain
    assert speculation.accepted == speculation.proposed


def test_what_cannot_guess(two_layers: DecoderConfig, make_model, model: Model):
    other = make_model(dataclasses.replace(two_layers, num_layers=1, vocab_size=41))
    recurrent = make_model(dataclasses.replace(two_layers, num_layers=1, attention=LSTM(16), positions=None))
    for options, sentence in [
        ({"draft": "mpt"}, "draft='mpt' must be a model that load returns, 'prompt' or 'mtp'"),
        ({"draft": "mtp"}, "draft='mtp' needs a model with num_mtp_layers"),
        ({"draft_tokens": 3}, "draft_tokens=3 needs a draft"),
        ({"draft": "prompt", "draft_tokens": 0}, "draft_tokens=0 must be at least 1"),
        ({"draft": other}, "the draft's vocab_size=41 must be the model's"),
        ({"draft": recurrent}, "the draft has layers whose state cannot be taken back"),
        ({"draft": load(PARITY / "t5_v1_0")}, "draft must be a decoder for a decoder"),
    ]:
        with pytest.raises(UserError, match=sentence):
            generate(model, PROMPTS, **options)
    with pytest.raises(UserError, match="the model has layers whose state cannot be taken back"):
        generate(recurrent, PROMPTS, draft="prompt")
