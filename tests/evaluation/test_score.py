"""`llama_jax.score`: log-probabilities of given continuations."""

import numpy as np
import pytest

import llama_jax
from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError
from llama_jax.run import Run


@pytest.fixture(scope="module")
def lm(finished_run: Run) -> LanguageModel:
    return finished_run.load()


def logprobs_of(lm: LanguageModel, ids: list[int]) -> np.ndarray:
    """Those of all ids but the first, by one forward pass; one program serves texts of all lengths."""
    padded = np.array([[*ids[:-1], *[0] * (16 - len(ids))]])
    logits = np.asarray(lm.model(padded)[0], np.float64)[: len(ids) - 1]
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(ids) - 1), ids[1:]]


def test_tokens_of_continuations_are_those_of_one_forward_pass(lm: LanguageModel):
    tokenizer = lm.tokenizer
    assert tokenizer is not None
    prompts, continuations = ["the cat", "old red", "the cat sat on"], [" sat on a mat.", " barn", " a"]
    found = llama_jax.score(lm, prompts, continuations)
    for prompt, continuation, row in zip(prompts, continuations, found, strict=True):
        ids = [*tokenizer.prefix_ids, *tokenizer.encode(prompt + continuation)]
        np.testing.assert_allclose(row, logprobs_of(lm, ids)[-len(row) :], rtol=1e-4)
        assert tokenizer.decode(ids[-len(row) :]).strip() == continuation.strip()
    ids = [[5, 9, 7], np.array([4])], [[3, 8], np.array([6, 6, 2])]
    for prompt, continuation, row in zip(*ids, llama_jax.score(lm, *ids), strict=True):
        np.testing.assert_allclose(row, logprobs_of(lm, [*prompt, *continuation])[-len(continuation) :], rtol=1e-4)
    assert llama_jax.score(lm, [], []) == []


def test_the_score_of_greedy_text_is_its_logprobs(lm: LanguageModel):
    out = llama_jax.generate(lm, [[5, 9, 7]], max_new_tokens=4)[0].tolist()
    (row,) = llama_jax.score(lm, [out[:3]], [out[3:]])
    for place in range(4):
        others = llama_jax.score(lm, [out[: 3 + place]] * 6, [[i] for i in range(6)])
        assert max(x[0] for x in others) <= row[place] + 1e-5


@pytest.mark.parametrize(
    ("prompts", "continuations", "sentence"),
    [
        ("a", "b", "must be two lists"),
        (["a"], [], "must be two lists"),
        ([[1, 2]], [[]], r"prompts\[0\] has an empty continuation"),
        ([[3], []], [[3], [1]], r"prompts\[1\] has an empty prompt"),
        (["a"], [[1]], "must be two texts or two lists of ids"),
        ([[1.5]], [[1]], "must be two texts or two lists of ids"),
        ([[1] * 5000], [[1]], "5001 tokens: the model reads"),
        ([[1]], [[10**6]], "1000000"),
    ],
)
def test_impossible_ones(prompts, continuations, sentence: str, lm: LanguageModel):
    with pytest.raises(UserError, match=sentence):
        llama_jax.score(lm, prompts, continuations)
