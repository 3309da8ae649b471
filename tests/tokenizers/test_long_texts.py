"""A long text has the ids that it has in one piece, wherever it is cut."""

import random
import string
from pathlib import Path

import numpy as np
import pytest

from llama_jax.tokenizers import Tokenizer, base, load_tokenizer

GOLDENS = Path(__file__).parents[1] / "directories" / "goldens"
# Everything that the ways to split a text tell apart, and what tokenizers add.
PARTS = (
    *"abcxyz ABC 0189 .,!?'\"()- \n\n\r\t  _#$<>/é中文ßﬁΩ☃🙂",
    *["the cat", " sat on", "a b"] * 8,
    " sat", "'s", "'ll", "...", "e\u0301", "<s>", "</s>", "[SEP]", "<|endoftext|>", "\u2581", "\r\n", "a\nb", ".\nc",
    *string.ascii_letters,
)  # fmt: skip


def text_of(rng: random.Random, size: int) -> str:
    return "".join(rng.choices(PARTS, k=size))


@pytest.mark.parametrize("name", ["gpt2", "llama2", "llama3", "llama_yi", "bert", "glm"])
def test_cut_anywhere(name, monkeypatch):
    tokenizer = load_tokenizer(GOLDENS / name)
    assert tokenizer.border is not None
    monkeypatch.setattr(base, "PIECES", 2)
    rng, num_cut = random.Random(name), 0
    for _ in range(60):
        monkeypatch.setattr(base, "PIECE_CHARS", rng.randint(1, 8))
        text = text_of(rng, 150)
        whole = tokenizer.encode(text)
        np.testing.assert_array_equal(tokenizer.encode_batch([text])[0], whole, err_msg=repr(text))
        num_cut += len(list(base._pieces(text, tokenizer.border))) > 3
    assert num_cut > 40


@pytest.mark.parametrize("name", ["t5_v1_0", "t5_v1_1", "marian", "llama_slow", "llama_smollm2", "roberta"])
def test_what_is_not_known_is_not_cut(name):
    assert load_tokenizer(GOLDENS / name).border is None


def test_nothing_is_lost_between_pieces(monkeypatch):
    tokenizer: Tokenizer = load_tokenizer(GOLDENS / "gpt2")
    monkeypatch.setattr(base, "PIECE_CHARS", 10)
    text = "one two three four five six seven\nand eight " * 50
    assert tokenizer.decode(tokenizer.encode_batch([text, "", "a"])[0].tolist()) == text
