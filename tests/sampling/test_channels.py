"""Answers in harmony's channels: the final one's text is shown, and all of an answer without channels."""

from pathlib import Path

import pytest

import llama_jax
from llama_jax.sampling.stops import TextStream

GOLDEN = Path(__file__).parents[1] / "directories" / "goldens" / "gpt_oss"
THOUGHT = "<|channel|>analysis<|message|>is é an hour?<|end|><|start|>assistant"
CALL = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"


@pytest.fixture(scope="module")
def lm() -> llama_jax.LanguageModel:
    return llama_jax.load(GOLDEN)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (f"{THOUGHT}<|channel|>final<|message|>so it was é.<|return|>", "so it was é."),
        ("<|channel|>final<|message|>the final<|return|>", "the final"),
        (f"<|channel|>final <|constrain|>json<|message|>{{}}<|end|><|start|>assistant{THOUGHT}", "{}"),
        (THOUGHT, ""),
        (CALL, ""),
        ("the river finds an hour<|end|>.", "the river finds an hour."),
    ],
)
def test_the_final_channel_is_shown(lm: llama_jax.LanguageModel, answer: str, text: str):
    assert lm.tokenizer is not None
    prompt = lm.tokenizer.encode_prompt("<|start|>user<|message|>so?<|end|><|start|>assistant", special=True)
    ids = lm.tokenizer.encode_prompt(answer, special=True, affixes=False)
    stream = TextStream(lm, prompt)
    assert "".join([stream.feed([i]) for i in ids]) + stream.flush() == stream.text == text
    assert stream.num_tokens == len(ids)


def test_a_hidden_text_ends_nothing(lm: llama_jax.LanguageModel):
    assert lm.tokenizer is not None
    answer = f"{THOUGHT}<|channel|>final<|message|>so an hour it was"
    stream = TextStream(lm, [], stop=("hour",))
    stream.feed(lm.tokenizer.encode_prompt(answer, special=True, affixes=False))
    assert (stream.stopped, stream.text) == (True, "so an ")
