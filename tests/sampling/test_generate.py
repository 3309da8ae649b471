"""Token ids continued: the same tokens as without a cache, a padding, a batch or a mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import UserError
from llama_jax.models import Compute, DecoderConfig, Model, build, from_params
from llama_jax.parallel import make_mesh
from llama_jax.sampling import generate, loop
from llama_jax.sampling.loop import bucket

LENGTHS = np.array([5, 1, 9, 3])


@pytest.fixture(scope="module")
def prompts(two_layers: DecoderConfig) -> np.ndarray:
    return np.random.default_rng(0).integers(0, two_layers.vocab_size, (4, 9)).astype(np.int32)


def greedy_by_full_forwards(model: Model, prompt: np.ndarray, count: int) -> list[int]:
    """The plain way: the whole text again for every token. One shape only; what stands behind is never looked at."""
    tokens = np.zeros((1, 32), np.int32)
    tokens[0, : len(prompt)] = prompt
    for position in range(len(prompt), len(prompt) + count):
        tokens[0, position] = np.asarray(model(jnp.asarray(tokens)))[0, position - 1].argmax()
    return tokens[0, : len(prompt) + count].tolist()


def test_cached_logits_are_those_of_the_full_forward(model: Model, prompts: np.ndarray):
    """Rows of different lengths: prefill of the padded batch, then one token after another at each row's own end."""
    full = np.asarray(model(jnp.asarray(prompts)))
    first = np.array([2, 1, 5, 3])

    def prefill(module, tokens):
        hidden, cache = module.extend(tokens, cache=module.init_cache(4, 12), lengths=jnp.zeros(4, jnp.int32))
        return module.logits(hidden), cache

    def extend(module, tokens, cache, lengths):
        hidden, cache = module.extend(tokens, cache=cache, lengths=lengths)
        return module.logits(hidden), cache

    logits, cache = model.run(prefill, prompts[:, :5])
    for row, length in enumerate(first):
        np.testing.assert_allclose(logits[row, :length], full[row, :length], atol=1e-4)
    for i in range(4):
        at = first + i
        logits, cache = model.run(extend, prompts[np.arange(4), at][:, None], cache, jnp.asarray(at))
        np.testing.assert_allclose(logits[:, 0], full[np.arange(4), at], atol=1e-4)


def test_copies_for_decoding_change_no_logits(
    two_layers: DecoderConfig, make_model: Callable[..., Model], prompts: np.ndarray
):
    attention = dataclasses.replace(two_layers.attention, qkv_bias=True)
    model = make_model(dataclasses.replace(two_layers, attention=attention))
    copy = model.for_decoding
    block = copy.module.layers.leading[1]
    assert [block.attention.q_proj.joined.shape, block.feed_forward.gate_proj.joined.shape] == [(16, 64), (16, 48)]
    tokens = jnp.asarray(prompts)
    np.testing.assert_allclose(copy(tokens), model(tokens), atol=1e-4)


def test_greedy_is_the_argmax_of_the_full_forward(model: Model, prompts: np.ndarray):
    out = generate(model, prompts, max_new_tokens=12, prompt_lengths=LENGTHS)
    assert out.shape == (4, 21)
    assert out.dtype == np.int32
    for row, length, prompt in zip(out, LENGTHS, prompts, strict=True):
        expected = greedy_by_full_forwards(model, prompt[:length], 12)
        assert len(set(expected[length:])) > 3, "a model that repeats itself proves nothing"
        assert row[: length + 12].tolist() == expected
        assert not row[length + 12 :].any()


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_what_stands_behind_a_prompt_has_no_effect(model: Model, prompts: np.ndarray, temperature: float):
    garbage = np.where(np.arange(9) < LENGTHS[:, None], prompts, -7)
    wide = np.concatenate([garbage, np.full((4, 30), 10**6)], axis=1)
    settings = {"max_new_tokens": 8, "temperature": temperature, "prompt_lengths": LENGTHS}
    expected = generate(model, prompts, **settings)
    np.testing.assert_array_equal(generate(model, garbage, **settings), expected)
    np.testing.assert_array_equal(generate(model, wide, **settings)[:, :17], expected)


def test_rows_of_one_prompt_differ(model: Model, prompts: np.ndarray):
    same = generate(model, np.repeat(prompts[:1], 4, axis=0), temperature=1.5)
    assert len({row.tobytes() for row in same}) == 4


def test_every_position_draws_anew(model: Model, prompts: np.ndarray):
    new = generate(model, prompts, temperature=1e6)[0, 9:]  # all tokens alike: only the draw decides
    assert len(set(new.tolist())) > 6


def test_settings_change_what_is_drawn(model: Model, prompts: np.ndarray):
    def draw(**settings) -> bytes:
        return generate(model, prompts, **{"temperature": 2.0} | settings).tobytes()

    assert len({draw(), draw(temperature=1.0), draw(top_k=3), draw(top_p=0.3)}) == 4
    assert draw(top_k=1) == draw(temperature=0.0)


def test_a_row_ends_at_eos_and_is_filled_with_it(model: Model, prompts: np.ndarray):
    settings = {"max_new_tokens": 12, "prompt_lengths": LENGTHS}
    out = generate(model, prompts, **settings)
    eos_id = int(out[0, LENGTHS[0] + 4])
    stopped = generate(model, prompts, **settings, eos_id=eos_id)
    for row, free, length in zip(stopped, out, LENGTHS, strict=True):
        new = free[length : length + 12].tolist()
        count = new.index(eos_id) + 1 if eos_id in new else 12
        assert row[: length + count].tolist() == free[: length + count].tolist()
        assert (row[length + count :] == eos_id).all()
    assert (stopped[0, -8:] == eos_id).all()


def test_one_compilation_serves_many_lengths():
    assert [bucket(n, 300) for n in (1, 16, 17, 64, 65, 200, 300)] == [16, 16, 32, 64, 128, 256, 300]


def test_one_compilation_serves_many_batches(model: Model, prompts: np.ndarray):
    """Rows up to a power of two, stops up to a few and every setting's value share it, and no row notices."""

    def compiled() -> tuple[int, int]:
        return loop._prefill._cache_size(), loop._advance._cache_size()

    many = np.concatenate([prompts, prompts[::-1, ::-1]])
    settings = {"max_new_tokens": 6, "temperature": 1.5, "top_k": 9}
    whole = generate(model, many, **settings, eos_id=3)
    before = compiled()
    for count in (5, 6, 7):
        stops = {5: None, 6: [5, 3], 7: [3]}[count]
        found = generate(model, many[:count], **settings | {"temperature": 1.5 + 0.1 * (count == 5)}, eos_id=stops)
        if count == 7:
            np.testing.assert_array_equal(found, whole[:7])
    assert compiled() == before


@pytest.mark.parametrize(
    ("axes", "num_rows"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, 4),
        pytest.param({"fsdp": 2, "tensor": 4}, 3, marks=pytest.mark.slow),
        pytest.param({"fsdp": 8}, 1, marks=pytest.mark.slow),
    ],
)
def test_a_mesh_changes_nothing(
    axes: dict, num_rows: int, model: Model, make_model, two_layers: DecoderConfig, prompts
):
    sharded = make_model(two_layers, make_mesh(axes))
    settings: dict[str, Any] = {"prompt_lengths": LENGTHS[:num_rows], "eos_id": 7}
    settings |= {"temperature": 1.0, "top_k": 30, "top_p": 0.9, "seed": 3}
    out = generate(sharded, prompts[:num_rows], **settings)
    np.testing.assert_array_equal(out, generate(model, prompts[:num_rows], **settings))


def test_the_context_is_the_limit(model: Model, prompts: np.ndarray):
    longest = generate(model, prompts, max_new_tokens=55)
    assert longest.shape == (4, 64)
    with pytest.raises(UserError, match=r"9 tokens and max_new_tokens=56 .* 64 positions: take at most 55"):
        generate(model, prompts, max_new_tokens=56)
    with pytest.raises(UserError, match=r"64 tokens .* shorten the prompt"):
        generate(model, longest, max_new_tokens=1)
    # It is the longest prompt that counts, not the padding.
    assert generate(model, longest, max_new_tokens=4, prompt_lengths=LENGTHS).shape == (4, 68)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokens": [[1, 40]]}, "token id 40 is outside the model's vocabulary of 40"),
        ({"tokens": [[-1, 2]]}, "token id -1 is outside"),
        ({"tokens": [[1, 2]], "prompt_lengths": [0]}, r"prompt_lengths\[0\]=0 must be from 1 to the tokens' length 2"),
        ({"tokens": [[1, 2]], "prompt_lengths": [3]}, r"prompt_lengths\[0\]=3 must be"),
        ({"tokens": [[1, 2]], "prompt_lengths": [1, 1]}, r"shape \(2,\) must have one number for each of 1 rows"),
        ({"tokens": [1, 2]}, r"tokens of shape \(2,\)"),
        ({"tokens": [[1.5]]}, "type float64 must be integers"),
        ({"tokens": [[1]], "max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"tokens": [[1]], "temperature": -1.0}, "temperature=-1.0 must be"),
        ({"tokens": [[1], []]}, r"prompt_lengths\[1\]=0 must be"),
        ({"tokens": [[1], [2, 3]], "prompt_lengths": [1, 2]}, "rows of different lengths: pad them, or leave"),
        ({"tokens": [[1], [[2], [3]]]}, "must be integers"),
        ({"tokens": [[1, None]]}, "type object must be integers"),
        ({"tokens": [[2**70]]}, "must be integers"),
        ({"tokens": "ab"}, "must be integers"),
        ({"tokens": [[1]], "eos_id": "a"}, "eos_id='a' must be a token id or a list of them"),
        ({"tokens": [[1]], "eos_id": [2, 2**31]}, "must be a token id or a list"),
        ({"tokens": [[1]], "seed": -1}, r"seed=-1 must be from 0 to 2\*\*64 - 1"),
        ({"tokens": [[1]], "seed": 2**64}, "seed=18446744073709551616 must be"),
    ],
)
def test_what_cannot_be_continued(change: dict, sentence: str, model: Model):
    with pytest.raises(UserError, match=sentence):
        generate(model, **change)


def test_rows_of_different_lengths_are_padded(model: Model, prompts: np.ndarray):
    rows = [prompt[:length].tolist() for prompt, length in zip(prompts, LENGTHS, strict=True)]
    expected = generate(model, prompts, max_new_tokens=8, prompt_lengths=LENGTHS)
    np.testing.assert_array_equal(generate(model, rows, max_new_tokens=8), expected)
    np.testing.assert_array_equal(generate(model, [np.array(row) for row in rows], max_new_tokens=8), expected)


def test_a_row_ends_at_any_of_several_stops(model: Model, prompts: np.ndarray):
    settings = {"max_new_tokens": 12, "prompt_lengths": LENGTHS}
    out = generate(model, prompts, **settings)
    stops = [int(out[1, LENGTHS[1] + 5]), int(out[0, LENGTHS[0] + 4])]
    stopped = generate(model, prompts, **settings, eos_id=stops)
    for row, free, length in zip(stopped, out, LENGTHS, strict=True):
        new = free[length : length + 12].tolist()
        count = min([new.index(i) + 1 for i in stops if i in new], default=12)
        assert row[: length + count].tolist() == free[: length + count].tolist()
        assert (row[length + count :] == stops[0]).all()
    np.testing.assert_array_equal(generate(model, prompts, **settings, eos_id=[]), out)


def test_numbers_of_any_size(model: Model, prompts: np.ndarray):
    """Seeds of 64 bits are all different, and what is beyond a float or an integer of 32 bits is as large as that."""

    def draw(**settings) -> bytes:
        return generate(model, prompts, **{"temperature": 1.5} | settings).tobytes()

    seeds = (0, 1, 2**31, 2**32, 2**32 + 1, 2**33, 2**63 + 5, 2**64 - 1)
    assert len({draw(seed=seed) for seed in seeds}) == len(seeds)
    assert draw(seed=1) == draw(seed=1)
    assert draw(top_k=2**31) == draw(top_k=2**70) == draw(top_k=40)
    for temperature in (1e-38, 1e-45, 1e-300):
        assert draw(temperature=temperature) == draw(temperature=0)
    assert draw(temperature=2e-37) == draw(temperature=0)  # one token has all the probability


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_numbers_end_sampling(model: Model, prompts: np.ndarray, value: float):
    params = dict(model.params())
    params["lm_head.weight"] = params["lm_head.weight"].at[:, 7].set(value)
    broken = from_params(model.config, params, Compute(dtype="float32"))
    for settings in ({}, {"temperature": 1.0, "top_p": 0.9}):
        with pytest.raises(UserError, match=r"the logits are not numbers .* at new token 1 of prompt 0"):
            generate(broken, prompts, **settings)


def test_tied_heads_too(make_model, two_layers: DecoderConfig, prompts: np.ndarray):
    tied = make_model(dataclasses.replace(two_layers, tie_embeddings=True))
    out = generate(tied, prompts[:1], max_new_tokens=6)
    assert out[0].tolist() == greedy_by_full_forwards(tied, prompts[0], 6)


@pytest.mark.slow
def test_a_context_axis_changes_no_token(tiny_config: DecoderConfig):
    prompts = np.arange(32).reshape(2, 16)
    expected = generate(build(tiny_config), prompts, max_new_tokens=4)
    with jax.set_mesh(make_mesh({"fsdp": 2, "tensor": 2, "context": 2})):
        np.testing.assert_array_equal(generate(build(tiny_config), prompts, max_new_tokens=4), expected)
