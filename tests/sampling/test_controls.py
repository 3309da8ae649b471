"""What a model's files force and forbid, against transformers (goldens.json; make_goldens.py writes it)."""

import itertools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from own_controls import Bonus, only_odd

from llama_jax import load
from llama_jax.checkpoint import GenerationSettings, LanguageModel, read_generation, write_generation
from llama_jax.config import UserError
from llama_jax.parallel import make_mesh, shard
from llama_jax.sampling import SamplingConfig, complete, generate, loop
from llama_jax.sampling.sampler import Sampler, Written, controls_of

GOLDENS = json.loads(Path(__file__).with_name("goldens.json").read_text(encoding="utf-8"))
PARITY = Path(__file__).parents[1] / "parity" / "goldens"


def settings_of(folder: Path, generation: dict, config: dict | None = None) -> GenerationSettings:
    for name, data in (("generation_config.json", generation), ("config.json", config or {})):
        (folder / name).write_text(json.dumps(data))
    return read_generation(folder)


def test_logits_are_those_of_transformers(tmp_path: Path):
    for number, cases in itertools.groupby(GOLDENS["processed"], key=lambda case: case[0]):
        cases = list(cases)
        settings = settings_of(tmp_path, GOLDENS["settings"][number] | {"eos_token_id": GOLDENS["eos"]})
        sampler = Sampler(
            controls=controls_of(settings, GOLDENS["vocabulary"], [SamplingConfig(GOLDENS["max_new_tokens"])])
        )
        tokens = np.full((len(cases), 16), 3, np.int32)  # what stands behind a text is never looked at
        for row, case in zip(tokens, cases, strict=True):
            row[: len(case[2])] = case[2]
        lengths = np.array([len(case[2]) for case in cases], np.int32)
        text = Written(jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray([case[1] for case in cases]))
        logits = jnp.broadcast_to(jnp.asarray(GOLDENS["scores"][number], jnp.float32), (len(cases), 12))
        expected = np.array([[-np.inf if x is None else x for x in case[3]] for case in cases])
        np.testing.assert_allclose(sampler.controlled(logits, text), expected, rtol=1e-6, err_msg=f"{settings}")


def test_a_mesh_changes_no_logits(tmp_path: Path):
    """All of them at once, where the rows are split over devices."""
    settings = settings_of(tmp_path, GOLDENS["settings"][-1] | {"eos_token_id": 2, "begin_suppress_tokens": [4]})
    sampler = Sampler(controls=controls_of(settings, 12, [SamplingConfig(4)]))
    rng = np.random.default_rng(0)
    tokens, logits = rng.integers(0, 12, (8, 16)).astype(np.int32), rng.normal(size=(8, 12)).astype(np.float32)
    text = Written(jnp.asarray(tokens), jnp.arange(4, 12), jnp.full(8, 3, jnp.int32))
    expected = sampler.controlled(jnp.asarray(logits), text)
    assert np.isinf(expected).any()
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 4})):

        def split(logits: jax.Array, *text: jax.Array) -> jax.Array:
            rows = Written(*(shard(x, "batch", *([None] * (x.ndim - 1))) for x in text))
            return sampler.controlled(shard(logits, "batch", None), rows)

        found = jax.jit(split)(logits, *(np.asarray(x) for x in (text.tokens, text.lengths, text.prompts)))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.quick("3")
@pytest.mark.parametrize("number", range(4))
def test_greedy_tokens_are_those_of_transformers(number: int, tmp_path: Path):
    """The first has BART's forced start: [2, 0, ...]."""
    name, generation, expected = GOLDENS["generated"][number]
    folder = Path(shutil.copytree(PARITY / name, tmp_path / name))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    lm, new = load(folder), GOLDENS["new"]
    stops = lm.generation.eos_ids
    assert stops == tuple(np.atleast_1d(generation["eos_token_id"]))
    found = generate(lm, GOLDENS["prompts"], max_new_tokens=new, eos_id=stops)
    for row, ids in zip(found.tolist(), expected, strict=True):
        assert row == ids + [stops[0]] * (len(row) - len(ids))
    free = generate(lm.model, GOLDENS["prompts"], max_new_tokens=new, eos_id=stops)
    assert free.tolist() != found.tolist(), "settings that change nothing prove nothing"


def test_the_generation_config_decides_where_both_speak(tmp_path: Path):
    config = {"eos_token_id": 1, "bos_token_id": 4, "min_length": 7, "bad_words_ids": [[9]], "model_type": "x"}
    found = settings_of(tmp_path, {"eos_token_id": [1, 2, 3], "min_length": None, "top_p": 0.9}, config)
    assert found.eos_ids == (1, 2, 3)
    # Of config.json, transformers reads what forces and forbids tokens only where the other file says nothing.
    assert (found.bos_id, found.min_length, found.bad_words_ids) == (4, 0, ())
    found = settings_of(tmp_path, {}, config)
    assert (found.bos_id, found.min_length, found.bad_words_ids) == (4, 7, ((9,),))
    assert settings_of(tmp_path, {}, {"eos_token_id": [292, 299, 301]}).eos_ids == (292, 299, 301)
    assert settings_of(tmp_path, {}, {"pad_token_id": -1}) == GenerationSettings()
    assert settings_of(tmp_path, {}, {"force_bos_token_to_be_generated": True, "bos_token_id": 3}).forced_bos_id == 3
    assert read_generation(tmp_path, ["force_bos_token_to_be_generated"]).forced_bos_id is None
    assert read_generation(tmp_path / "absent") == GenerationSettings()


def test_what_is_written_says_the_same(tmp_path: Path):
    for given in [
        *GOLDENS["settings"],
        {"eos_token_id": [3, 1], "temperature": 0.6, "do_sample": True, "num_beams": 4},
    ]:
        found = settings_of(tmp_path, given)
        assert found.to_hf() == given
        write_generation(tmp_path, found)
        assert read_generation(tmp_path) == found


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"eos_token_id": "</s>"}, r'has eos_token_id="</s>", .* --ignore-config-keys eos_token_id'),
        ({"bos_token_id": 1.5}, "has bos_token_id=1.5"),
        ({"bad_words_ids": 3}, "has bad_words_ids=3"),
        ({"bad_words_ids": [["a"]]}, r'has bad_words_ids=\["a"\]'),
        ({"min_length": -1}, "has min_length=-1"),
        ({"repetition_penalty": 0}, "has repetition_penalty=0"),
        ([1], "is no JSON object"),
    ],
)
def test_entries_that_are_none(data, sentence: str, tmp_path: Path):
    with pytest.raises(UserError, match=sentence):
        settings_of(tmp_path, data)


def test_settings_that_cannot_be_followed_are_named_when_sampling(tmp_path: Path):
    for data, sentence in (
        ({"sequence_bias": [[[1], 2.0]]}, "have sequence_bias, which sampling cannot follow"),
        ({"encoder_no_repeat_ngram_size": 3}, "have encoder_no_repeat_ngram_size"),
        ({"forced_bos_token_id": 12}, "have forced_bos_token_id with the token 12, and the vocabulary has 12"),
    ):
        settings = settings_of(tmp_path, data)
        with pytest.raises(UserError, match=f"{sentence}.*--ignore-config-keys"):
            controls_of(settings, 12, [SamplingConfig(4)])
    harmless = {"encoder_no_repeat_ngram_size": 0, "guidance_scale": 1.0, "num_beams": 4, "watermarking_config": None}
    assert controls_of(settings_of(tmp_path, harmless), 12, [SamplingConfig(4)]) == ()


def test_a_text_ends_at_every_stop_of_the_files_and_at_no_other(lm: LanguageModel):
    """Where the files speak, what the tokenizer calls EOS does not end a text, nor does BOS."""
    (free,) = complete(lm, ["one fish"], SamplingConfig(20, 0.0))
    ids = list(dict.fromkeys(free.token_ids))
    assert lm.tokenizer is not None
    for stops in ((ids[3], 275), (275, ids[6], ids[2])):
        told = LanguageModel(lm.config, lm.model, lm.tokenizer, None, GenerationSettings(eos_ids=stops))
        (found,) = complete(told, ["one fish"], SamplingConfig(20, 0.0))
        end = min(free.token_ids.index(i) for i in stops if i in free.token_ids)
        assert (found.token_ids, found.finish_reason) == (free.token_ids[: end + 1], "stop")
    own = LanguageModel(lm.config, lm.model, lm.tokenizer, None, GenerationSettings(suppress_tokens=(*range(3, 276),)))
    (found,) = complete(own, ["one fish"], SamplingConfig(20, 0.0))
    assert found.token_ids[-1] in (1, 2)  # of our own models BOS ends a text as well
    told = LanguageModel(
        lm.config, lm.model, lm.tokenizer, None, GenerationSettings(eos_ids=(0,), suppress_tokens=(0, *range(3, 276)))
    )
    (found,) = complete(told, ["one fish"], SamplingConfig(20, 0.0))
    assert found.finish_reason == "length"


@pytest.mark.slow
def test_controls_of_ones_own(tmp_path: Path):
    """A function and a pytree change which token is chosen, greedy and drawn, after those of the files."""
    lm, prompts = load(PARITY / "llama_gqa"), [[1, 4, 9], [3, 2, 7]]
    drawn = {"temperature": 1.0, "top_p": 0.9}
    for settings in ({}, drawn):
        free = generate(lm, prompts, **settings)[:, 3:]
        assert (generate(lm, prompts, **settings, controls=[only_odd])[:, 3:] % 2 == 1).all()
        assert not (free % 2 == 1).all()
    np.testing.assert_array_equal(generate(lm, prompts, **drawn, controls=[Bonus(0.0)])[:, 3:], free)
    before = loop._advance._cache_size()
    assert (generate(lm, prompts, **drawn, controls=[Bonus(1e6)])[:, 3:] == 5).all()
    assert loop._advance._cache_size() == before, "another number needs no other program"
    with pytest.raises(UserError, match="every token is forbidden at new token 1 of prompt 0"):
        generate(lm, prompts, controls=[lambda logits, written: jnp.full_like(logits, -jnp.inf)])
    with pytest.raises(UserError, match=r"return the same shape and type"):
        generate(lm, prompts, controls=[lambda logits, written: logits[:, :3]])
