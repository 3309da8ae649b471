"""Batches whose rows have different settings: as transformers has them, and as each row alone."""

import contextlib
import dataclasses
import json
from pathlib import Path

import control_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from own_controls import Bonus, only_odd

from llama_jax.checkpoint import GenerationSettings, read_generation
from llama_jax.config import UserError
from llama_jax.parallel import make_mesh, shard
from llama_jax.sampling import Sampler, SamplingConfig, Written

GOLDENS = np.load(Path(__file__).parent / "control_goldens.npz")["logits"]


def settings_of(folder: Path, group: int) -> GenerationSettings:
    data = cases.files(group) | {"eos_token_id": list(cases.EOS)}
    (folder / "generation_config.json").write_text(json.dumps(data))
    return read_generation(folder)


def batch(group: int) -> tuple[list[SamplingConfig], Written]:
    texts = [cases.text(group, row) for row in range(cases.ROWS)]
    tokens = np.full((cases.ROWS, 16), 3, np.int32)  # what is behind a text is never looked at
    for row, (ids, _) in zip(tokens, texts, strict=True):
        row[: len(ids)] = ids
    lengths, prompts = (np.array(x, np.int32) for x in ([len(ids) for ids, _ in texts], [n for _, n in texts]))
    configs = [SamplingConfig.of(**cases.user(group, row)) for row in range(cases.ROWS)]
    return configs, Written(*map(jnp.asarray, (tokens, lengths, prompts)))


def processed(sampler: Sampler, logits: jax.Array, written: Written) -> jax.Array:
    """Logits after all that changes them; of a greedy row after the controls."""
    logits = sampler.controlled(logits, written)
    if sampler.temperature is None:
        return logits
    warped = sampler.warped(logits)
    return jnp.where(jnp.reshape(sampler.temperature, (-1, 1)) > 0, warped, logits)


def test_a_thousand_cases_are_as_in_transformers(tmp_path: Path):
    """Equal masks; of what is left, values to 1e-6 (after sampling's warpers up to a constant of the row)."""
    different = 0
    for group in range(cases.GROUPS):
        configs, written = batch(group)
        sampler = Sampler.rows(configs, settings_of(tmp_path, group), cases.VOCABULARY, [cases.EOS] * cases.ROWS)
        found = np.array(processed(sampler, jnp.asarray(cases.logits(group)), written))
        for row, (got, expected) in enumerate(zip(found, GOLDENS[group], strict=True)):
            got, expected = (np.where(np.isnan(x), -np.inf, x) for x in (got, expected))  # where nothing is left
            message = f"group {group} row {row}: {cases.files(group)} {cases.user(group, row)}"
            np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected), message)
            if np.isfinite(got).any() and configs[row].temperature:
                got, expected = got - got.max(), expected - expected.max()
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=2e-6, err_msg=message)
            different += (expected != cases.logits(group)[row]).any()
    assert GOLDENS.shape[0] * GOLDENS.shape[1] == 1000
    assert different > 900, "settings that change nothing prove nothing"


OPTIONS = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 3, "banned_ids": 4, "seed": 1},
    {"temperature": 0.0, "logit_bias": {3: 9.0}, "no_repeat_ngram_size": 2},
    {"temperature": 0.9, "top_p": 0.6, "repetition_penalty": 1.4, "frequency_penalty": 0.7, "controls": [only_odd]},
    {"temperature": 1.1, "min_p": 0.2, "typical_p": 0.8, "presence_penalty": -0.6, "forced_ids": [7, 5, 1]},
    {"temperature": 0.5, "min_new_tokens": 3, "stop_ids": [5], "forced_ids": 2, "controls": [only_odd, Bonus(2.0)]},
    {"temperature": 1.0, "no_repeat_ngram_size": 3, "banned_ids": [1, 2, 3], "logit_bias": {5: -np.inf}},
]


def test_a_row_is_the_same_in_any_company_and_on_a_mesh(tmp_path: Path):
    """Bit for bit: the controlled logits and the token drawn, beside other settings and split over 8 devices."""
    configs, settings = [SamplingConfig.of(**options) for options in OPTIONS], settings_of(tmp_path, 1)
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (8, cases.VOCABULARY)).astype(np.float32)
    lengths = np.array([3, 9, 4, 16, 6, 5, 7, 16], np.int32)
    parts = rng.integers(0, cases.VOCABULARY, (8, 16)).astype(np.int32), lengths, np.full(8, 4, np.int32)
    keys = jax.random.split(jax.random.key(0), 8)

    @jax.jit
    def both(sampler: Sampler, keys: jax.Array, logits: jax.Array, *text: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = Written(*(shard(x, "batch", *([None] * (x.ndim - 1))) for x in text))
        controlled = sampler.controlled(shard(logits, "batch", None), rows)
        return controlled, sampler.choose(controlled, shard(keys, "batch"))

    alone = []
    for i, config in enumerate(configs):
        sampler = Sampler.of(config, settings, cases.VOCABULARY)
        assert all(np.ndim(x) == 0 for x in (sampler.temperature, sampler.top_k, sampler.min_p) if x is not None)
        row, token = both(sampler, *(x[i : i + 1] for x in (keys, logits, *parts)))
        alone.append((np.asarray(row[0]), int(token[0])))
    sampler = Sampler.rows(configs, settings, cases.VOCABULARY)
    for mesh in (None, make_mesh({"data": 2, "fsdp": 4})):
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            found, chosen = both(sampler, keys, logits, *parts)
        for i, (row, token) in enumerate(alone):
            np.testing.assert_array_equal(np.asarray(found)[i], row, f"row {i}, {OPTIONS[i]}")
            assert int(np.asarray(chosen)[i]) == token, OPTIONS[i]
    free = Sampler.rows([SamplingConfig(temperature=0)] * 8, GenerationSettings(), cases.VOCABULARY)
    assert jax.tree.leaves(free) == [], "what no row uses costs nothing"


def test_other_numbers_need_no_other_program():
    """Of requests that use the same controls."""
    logits = jnp.asarray(cases.logits(0)[:2])
    written = Written(jnp.zeros((2, 16), jnp.int32), jnp.full(2, 3), jnp.full(2, 2))
    choose = jax.jit(lambda s, x, w, k: s.choose(s.controlled(x, w), k))
    keys = jax.random.split(jax.random.key(0), 2)
    for a, b in ((2, 0.5), (5, 0.7), (9, 0.1)):
        first = SamplingConfig.of(top_k=a, min_p=b, repetition_penalty=1 + b, logit_bias={a: b}, forced_ids=[a])
        second = SamplingConfig.of(typical_p=b, top_p=b, banned_ids=[a, a + 1], min_new_tokens=a, temperature=b)
        choose(Sampler.rows([first, second], vocab_size=cases.VOCABULARY), logits, written, keys)
    assert choose._cache_size() == 1


def test_penalties_of_counts_are_those_of_openai():
    """Each time a token was generated counts for the frequency, the first for presence; the prompt does not."""
    tokens = jnp.array([[3, 3, 5, 5, 5, 7, 1, 1]])
    written = Written(tokens, jnp.array([6]), jnp.array([2]))
    config = SamplingConfig(temperature=0, frequency_penalty=0.5, presence_penalty=-0.25)
    found = Sampler.of(config).controlled(jnp.zeros((1, 9)), written)
    expected = np.zeros(9)
    expected[5], expected[7] = -3 * 0.5 + 0.25, -0.5 + 0.25
    np.testing.assert_allclose(found[0], expected)


def test_what_a_user_gives_replaces_what_the_files_say(tmp_path: Path):
    settings = GenerationSettings(
        repetition_penalty=2.0, no_repeat_ngram_size=1, min_new_tokens=5, eos_ids=(2,), forced_bos_id=4
    )
    written = Written(jnp.array([[3, 0]]), jnp.array([1]), jnp.array([1]))
    logits = jnp.arange(1.0, 7)[None]

    def left(**options) -> list[float]:
        config = SamplingConfig.of(temperature=0, **options)
        return Sampler.of(config, settings, 6).controlled(logits, written)[0].tolist()

    inf = np.inf
    assert left() == [-inf, -inf, -inf, -inf, 0, -inf], "forced_bos_token_id"
    assert left(forced_ids=[5]) == [-inf] * 5 + [0]
    settings = dataclasses.replace(settings, forced_bos_id=None)
    assert left() == [1, 2, -inf, -inf, 5, 6]
    assert left(no_repeat_ngram_size=0) == [1, 2, -inf, 2, 5, 6]
    assert left(no_repeat_ngram_size=0, repetition_penalty=1.0) == [1, 2, -inf, 4, 5, 6]
    assert left(no_repeat_ngram_size=0, repetition_penalty=4) == [1, 2, -inf, 1, 5, 6]
    assert left(no_repeat_ngram_size=0, repetition_penalty=1, min_new_tokens=0) == [1, 2, 3, 4, 5, 6]
    own = {"no_repeat_ngram_size": 0, "repetition_penalty": 1, "min_new_tokens": 2}
    assert left(**own, stop_ids=[0]) == [-inf, 2, -inf, 4, 5, 6], "no end of any kind"


def test_two_controls_together_come_in_the_stated_order():
    """Bias before the penalty, which multiplies it; a ban after what is forced; temperature before top-p."""
    written = Written(jnp.array([[1]]), jnp.array([1]), jnp.array([0]))
    config = SamplingConfig.of(temperature=0, logit_bias={1: 1.0}, repetition_penalty=2.0)
    assert Sampler.of(config, None, 3).controlled(jnp.array([[1.0, 3.0, 2.0]]), written).tolist() == [[1, 2, 2]]
    settings = GenerationSettings(bad_words_ids=((1,),), forced_bos_id=1)
    forced = Sampler.of(SamplingConfig(temperature=0), settings, 3).controlled(jnp.zeros((1, 3)), written)
    assert forced.tolist() == [[-np.inf, 0, -np.inf]], "forced after bad words"
    last = Sampler.of(SamplingConfig.of(temperature=0, controls=[lambda x, w: x + 1]), settings, 3)
    assert last.controlled(jnp.zeros((1, 3)), written).tolist() == [[-np.inf, 1, -np.inf]], "one's own last"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"logit_bias": {12: 1.0}}, "logit_bias has the token 12: give ids of the model's vocabulary, 0 to 11"),
        ({"banned_ids": -1}, "banned_ids has the token -1"),
        ({"forced_ids": [3, 99]}, "forced_ids has the token 99"),
        ({"controls": [3]}, "controls has 3: give functions"),
    ],
)
def test_ids_outside_the_vocabulary(options: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        Sampler.of(SamplingConfig.of(**options), None, 12)
