"""`SamplingConfig`: what a user may say, from Python, JSON and the command line."""

import dataclasses
import typing

import numpy as np
import pytest

from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError
from llama_jax.sampling import SamplingConfig, SamplingOptions, complete


def test_keyword_form_and_help_have_every_field():
    names = [field.name for field in dataclasses.fields(SamplingConfig)]
    assert names == list(typing.get_type_hints(SamplingOptions, localns={"Control": object}))
    text = SamplingConfig.__doc__ or ""
    assert [line.split(":")[0].strip() for line in text.splitlines() if line.strip().split(":")[0] in names] == names


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("logit_bias", {"3": -100, 4: np.float32(0.5)}, ((3, -100), (4, 0.5))),  # OpenAI's keys are texts
        ("logit_bias", '{"3": -1.5}', ((3, -1.5),)),
        ("logit_bias", None, ()),
        ("stop", "a", ("a",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", None, ()),
        ("json_schema", {"type": "object"}, '{"type": "object"}'),
        ("banned_ids", np.array([3, 4]), (3, 4)),
        ("forced_ids", 3, (3,)),
        ("min_p", np.float64(0.5), 0.5),
        ("early_stopping", "never", "never"),
        ("top_k", None, None),
    ],
)
def test_values_of_every_kind_are_kept_plain(name: str, given, kept):
    found = SamplingConfig.of(**{name: given})  # type: ignore[misc]
    assert getattr(found, name) == kept
    assert hash(found) == hash(SamplingConfig.of(**{name: given}))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"min_p": -0.1}, "min_p=-0.1 must be from 0 to 1"),
        ({"typical_p": 0.0}, "typical_p=0.0 must be above 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be above 0"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty=nan must be a finite number"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1 must be at least 0"),
        ({"logprobs": 1.5}, "logprobs=1.5 must be a whole number"),
        ({"temperature": None}, "temperature=None must be a number"),
        ({"logit_bias": {"a": 1}}, "must be a mapping of token ids to numbers"),
        ({"logit_bias": '{"3"'}, "must be a mapping of token ids to numbers"),
        ({"logit_bias": {3: float("nan")}}, "must be numbers below infinity"),
        ({"stop": [""]}, "must be texts of at least 1 character"),
        ({"json_schema": "[]"}, "must be a JSON object, as text or a dict"),
        ({"forced_ids": [1, 2], "max_new_tokens": 1}, "must be at most max_new_tokens ids"),
        ({"forced_ids": [1, 2], "banned_ids": [2]}, "must be other ids than forced_ids"),
        ({"num_beams": 2, "temperature": 0, "num_samples": 3}, "num_samples=3 must be at most num_beams=2"),
        ({"num_beams": 2, "temperature": 0, "regex": "a"}, "regex=a does not go with num_beams"),
    ],
)
def test_impossible_values_are_one_sentence(options: dict, sentence: str):
    with pytest.raises(UserError, match=sentence) as error:
        SamplingConfig.of(**options)
    assert "\n" not in str(error.value)


def test_ignore_eos_leaves_the_user_s_own_stops(lm: LanguageModel):
    (free,) = complete(lm, ["one fish"], SamplingConfig(12, 0.0))
    end = free.token_ids[3]
    ending = dataclasses.replace(lm, generation=dataclasses.replace(lm.generation, eos_ids=(end,)))
    (stopped,) = complete(ending, ["one fish"], SamplingConfig(12, 0.0))
    assert len(stopped.token_ids) == free.token_ids.index(end) + 1
    (found,) = complete(ending, ["one fish"], SamplingConfig(12, 0.0, ignore_eos=True))
    assert found.token_ids == free.token_ids
    (found,) = complete(ending, ["one fish"], SamplingConfig(12, 0.0, ignore_eos=True, stop_ids=(end,)))
    assert found.token_ids == stopped.token_ids
