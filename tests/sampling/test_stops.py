"""Stop strings: found wherever tokens end, never shown in part."""

import dataclasses
import itertools
from pathlib import Path
from typing import cast

import pytest
import tokenizers
from hypothesis import example, given, settings, strategies as st

from llama_jax.checkpoint import LanguageModel
from llama_jax.sampling import TextStream
from llama_jax.tokenizers import Tokenizer, load_tokenizer, train_tokenizer

TEXTS = st.text("abé🐟 \n", max_size=24)
STOPS = st.lists(st.text("abé🐟 \n", min_size=1, max_size=4), max_size=3)


@pytest.fixture(scope="module")
def byte_level(lm: LanguageModel) -> LanguageModel:
    """A model whose tokens are bytes and few merges of them: any character may be cut."""
    kind = {"vocab_size": 260, "special_tokens": ("<end>",)}
    return dataclasses.replace(lm, tokenizer=train_tokenizer(["ab ab\n"] * 4, kind="byte_bpe", **kind))


def first_stop(text: str, stop: list[str]) -> str:
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]


def tokenizer_of(lm: LanguageModel) -> Tokenizer:
    return cast(Tokenizer, lm.tokenizer)


@settings(deadline=None, max_examples=150)
@given(text=TEXTS, stop=STOPS, cuts=st.lists(st.integers(0, 5), max_size=12), prompt=TEXTS)
@example(text="abab", stop=["bab", "a"], cuts=[1], prompt="")  # they overlap
@example(text="aab", stop=["aba", "ab", "b"], cuts=[1, 1, 1], prompt="a")
@example(text="ab", stop=["abb", "b"], cuts=[], prompt="")  # one that began before it, never completed
@example(text="a🐟b", stop=["🐟"], cuts=[2, 1, 1], prompt="🐟")
def test_the_stream_is_the_text_up_to_the_first_stop(
    byte_level: LanguageModel, text: str, stop: list[str], cuts: list[int], prompt: str
):
    tokenizer = tokenizer_of(byte_level)
    ids, rest = tokenizer.encode(text), list(cuts)
    stream, shown = TextStream(byte_level, tokenizer.encode(prompt), stop), ""
    expected = first_stop(text, stop)
    for count in itertools.chain(rest, itertools.repeat(1)):
        if not ids:
            break
        shown += stream.feed(ids[:count])
        ids = ids[count:]
        assert expected.startswith(shown), "a part of a stop string was shown"
    assert shown + stream.flush() == expected
    assert stream.stopped == (expected != text)
    ids, end = tokenizer.encode(text), len(text)
    if stream.stopped:
        end = len(expected) + min(len(s) for s in stop if text.startswith(s, len(expected)))
    needed = [n for n in range(len(ids) + 1) if tokenizer.decode(ids[:n]).startswith(text[:end])]
    assert stream.num_tokens == (needed[0] if stream.stopped else len(ids))


def test_a_special_token_is_met_by_its_name_and_does_not_part_a_string(byte_level: LanguageModel):
    tokenizer = tokenizer_of(byte_level)
    ids = [*tokenizer.encode("a"), tokenizer.special_tokens["<end>"], *tokenizer.encode("b ab")]
    stream = TextStream(byte_level, [], ["<end>"])
    assert (stream.feed(ids), stream.stopped, stream.num_tokens) == ("a", True, 2)
    stream = TextStream(byte_level, [], ["ab"])
    assert (stream.feed(ids), stream.stopped, stream.num_tokens) == ("", True, 3)
    assert (stream.feed(ids), stream.flush(), stream.num_tokens) == ("", "", 3)


def test_a_byte_that_the_decoder_holds_back_completes_a_string(lm: LanguageModel, tmp_path: Path):
    """The line feed of Llama 2's tokenizer.json: its decoder waits for the end of a run of bytes."""
    vocab = {"<unk>": 0, "<0x0A>": 1, "a": 2, "b": 3, "<0xF0>": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = dataclasses.replace(lm, tokenizer=load_tokenizer(tmp_path))
    for prompt in ([2], [2, 1]):  # the prompt's own is not a part of the text
        stream = TextStream(loaded, prompt, ["\n"])
        assert (stream.feed([3]), stream.stopped) == ("b", False)
        assert (stream.feed([1]), stream.stopped, stream.num_tokens) == ("", True, 2)
    stream = TextStream(loaded, [2], ["\n"])
    assert (stream.feed([4]), stream.stopped) == ("", False), "a part of a character is no text"
