"""Texts that obey a JSON schema or a regular expression, with tokenizers of every kind."""

import dataclasses
import functools
import json
import re
import sys

import numpy as np
import pytest

from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError
from llama_jax.sampling import SamplingConfig
from llama_jax.sampling.constraints import constraint_of
from llama_jax.tokenizers import KINDS, Tokenizer, train_tokenizer

TEXTS = ['{"name": "one fish", "count": 12, "tags": ["a", "b"]}', "yes no maybe 0 1 2 3 4 5 6 7 8 9 - : é"] * 4
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "count": {"type": "integer", "minimum": -5, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "count"],
    "additionalProperties": False,
}
SIZES = {"bpe": 300, "unigram": 296, "byte_bpe": 300, "wordpiece": 60, "whitespace": 24}


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    return train_tokenizer(TEXTS, kind=kind, vocab_size=SIZES[kind])


def with_tokenizer(lm: LanguageModel, tokenizer: Tokenizer, padding: int = 7) -> LanguageModel:
    config = dataclasses.replace(lm.config, vocab_size=tokenizer.vocab_size + padding)
    return dataclasses.replace(lm, config=config, tokenizer=tokenizer)


def ends(lm: LanguageModel) -> tuple[int, ...]:
    return getattr(lm.tokenizer, "eos_ids", ()) or (0,)


def written(lm: LanguageModel, config: SamplingConfig, stops: tuple[int, ...], seed: int) -> tuple[list[int], str]:
    """A text whose tokens are drawn at random from all that are allowed; no end before it must be there."""
    rng, constraint = np.random.default_rng(seed), constraint_of(lm, config, stops)
    assert constraint is not None
    assert lm.tokenizer is not None
    ids = []
    while not constraint.done:
        allowed = np.flatnonzero(constraint.mask())
        assert len(allowed), "something is allowed until the end"
        assert len(ids) < 2000
        ids.append(int(rng.choice(allowed)))
        constraint.consume(ids[-1])
    text = [i for i in ids if i not in stops]
    return ids, b"".join([lm.tokenizer.token_bytes[i] for i in text]).decode()


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_tokens_are_their_text(kind: str):
    tokenizer = tokenizer_of(kind)
    texts = (
        [TEXTS[0], " é one  fish 日本\n", "yes 7"] if kind in ("bpe", "unigram", "byte_bpe") else ["yes no 7", "one"]
    )
    for text in texts:
        ids = tokenizer.encode(text)
        found = b"".join([tokenizer.token_bytes[i] for i in ids]).decode()
        assert found in (tokenizer.decode(ids), " " + tokenizer.decode(ids))
    silent = {*tokenizer.special_tokens.values()} - {tokenizer.unk_id}
    assert not any(tokenizer.token_bytes[i] for i in silent)
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size


@pytest.mark.parametrize("kind", ["bpe", "unigram", "byte_bpe"])
def test_random_tokens_under_a_schema_are_an_object_of_it(kind: str, lm: LanguageModel):
    own = with_tokenizer(lm, tokenizer_of(kind))
    for seed in range(12):
        found = json.loads(written(own, SamplingConfig.of(json_schema=SCHEMA), ends(own), seed)[1])
        assert {"name", "count"} <= found.keys() <= SCHEMA["properties"].keys()
        assert len(found["name"]) <= 6
        assert "\u2047" not in found["name"], "no unknown token"
        assert isinstance(found["count"], int)
        assert -5 <= found["count"] <= 120
        assert 1 <= len(found.get("tags", ["a"])) <= 3
        assert {*found.get("tags", [])} <= {"a", "b", None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("regex", ["(yes|no)", r"^[a-f0-9]{2}(no|maybe)*7?$", r"(1|2)\$"])
def test_random_tokens_under_a_regex_match_it(kind: str, regex: str, lm: LanguageModel):
    if kind in ("wordpiece", "whitespace"):  # their words have spaces before them
        regex = "( ?(yes|no))+"
    own = with_tokenizer(lm, tokenizer_of(kind))
    config = SamplingConfig(regex=regex)
    for seed in range(5):
        ids, text = written(own, config, ends(own), seed)
        assert re.fullmatch(regex, text), (ids, text)


def test_where_a_text_may_end_and_where_it_must(lm: LanguageModel):
    own = with_tokenizer(lm, tokenizer_of("byte_bpe"))
    assert own.tokenizer is not None
    (one,) = own.tokenizer.encode("1")
    for stops in ((0,), (0, 5), ()):
        constraint = constraint_of(own, SamplingConfig(regex="1{2,3}"), stops)
        assert constraint is not None
        assert constraint.mask().shape == (own.config.vocab_size,)
        assert not constraint.mask()[[*stops]].any(), "not before it matches"
        for _ in range(2):
            assert constraint.mask()[one]
            constraint.consume(one)
        assert constraint.mask()[[*stops]].all()
        assert not constraint.done
        constraint.consume(one)
        assert constraint.done, "nothing may follow: no token is spent on its end"
    ending = constraint_of(own, SamplingConfig(regex="1*"), (0, 5))
    assert ending is not None
    ending.consume(5)
    assert ending.done


def test_an_empty_schema_is_any_object(lm: LanguageModel):
    own = with_tokenizer(lm, tokenizer_of("byte_bpe"))
    assert own.tokenizer is not None
    constraint = constraint_of(own, SamplingConfig.of(json_schema={}), (0,))
    assert constraint is not None
    first = {own.tokenizer.token_bytes[i].lstrip()[:1] for i in np.flatnonzero(constraint.mask())}
    assert first == {b"{"}
    constraint.consume(own.tokenizer.encode("{")[0])
    space, count = own.tokenizer.encode(" ")[0], 0
    constraint.consume(own.tokenizer.encode("\n")[0])
    while constraint.mask()[space]:
        constraint.consume(space)
        count += 1
    assert count == 16, "a model cannot go on with spaces"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"regex": "(("}, r"regex=\(\( cannot be followed: unclosed group$"),
        ({"regex": "a(?=b)"}, "look-around, .* is not supported$"),
        ({"json_schema": {"type": "thing"}}, 'json_schema={"type": "thing"} cannot be followed: Invalid type: thing'),
        ({"json_schema": {"$ref": "#/no"}}, "Pointer '/no' does not exist"),
    ],
)
def test_constraints_that_cannot_be_followed(options: dict, sentence: str, lm: LanguageModel):
    with pytest.raises(UserError, match=sentence):
        constraint_of(lm, SamplingConfig.of(**options))


def test_what_is_missing_is_named(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    assert constraint_of(lm, SamplingConfig()) is None
    with pytest.raises(UserError, match="regex needs a tokenizer"):
        constraint_of(dataclasses.replace(lm, tokenizer=None), SamplingConfig(regex="a"))
    with pytest.raises(UserError, match="json_schema and regex both"):
        SamplingConfig(regex="a", json_schema="{}")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"regex needs llguidance: pip install 'llama_jax\[constraints\]'"):
        constraint_of(lm, SamplingConfig(regex="a"))
