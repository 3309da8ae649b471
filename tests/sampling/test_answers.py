"""Encoder-decoders answer: the same tokens as without a cache, whatever stands beside and behind the source."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.__main__ import main
from llama_jax.checkpoint import LanguageModel, save
from llama_jax.config import UserError
from llama_jax.models import EncoderDecoderConfig, Model
from llama_jax.nn import MLP, CrossAttention, GroupedQuery, LearnedPositions, RelativeBias, RMSNorm
from llama_jax.parallel import make_mesh
from llama_jax.sampling import SamplingConfig, complete, generate, generate_text, stream_text
from llama_jax.tokenizers import train_tokenizer, with_document_rule

START, NEW = 5, 8
# Padding behind, before and between.
MASK = np.array([[1] * 9, [1] * 4 + [0] * 5, [0] * 3 + [1] * 6, [1, 0, 1, 1, 0, 0, 1, 1, 0]])
PROMPTS = ["one <extra_id_0> fish", "", "blue fish, <extra_id_0> fish <extra_id_1>"]


def config_of(vocab_size: int, start: int) -> EncoderDecoderConfig:
    heads: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 8, "qkv_bias": False, "out_bias": False}
    return EncoderDecoderConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_encoder_layers=1,
        num_layers=2,
        max_positions=32,
        attention=GroupedQuery(rope=None, **heads),
        cross_attention=CrossAttention(**heads),
        feed_forward=MLP(24, "relu", bias=False),
        norm=RMSNorm(eps=1e-6),
        tie_embeddings=False,
        position_bias=RelativeBias(4, 8, 6, bidirectional=False),
        encoder_position_bias=RelativeBias(4, 8, 6, bidirectional=True),
        decoder_start_id=start,
    )


@pytest.fixture(scope="module")
def model(make_model) -> Model:
    return make_model(config_of(40, START))


@pytest.fixture(scope="module")
def source() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 40, MASK.shape).astype(np.int32)


@pytest.fixture(scope="module")
def answers(model: Model, source: np.ndarray) -> np.ndarray:
    return generate(model, source, source_mask=MASK, max_new_tokens=NEW)


@pytest.fixture(scope="module")
def answering(make_model) -> LanguageModel:
    special = ("<pad>", "<extra_id_0>", "<extra_id_1>")
    texts = ["one fish, two fish", "red fish, blue fish"] * 4
    tokenizer = with_document_rule(train_tokenizer(texts, vocab_size=280, special_tokens=special), of_sources=True)
    assert tokenizer.pad_id is not None
    config = config_of(tokenizer.vocab_size, tokenizer.pad_id)
    return LanguageModel(config, make_model(config), tokenizer)


def test_greedy_is_the_argmax_of_the_full_forward(model: Model, source: np.ndarray, answers: np.ndarray):
    assert answers.shape == (4, 1 + NEW)
    assert answers.dtype == np.int32
    target = np.full((4, 1 + NEW), START, np.int32)  # what stands behind is never looked at
    for at in range(NEW):
        logits = np.asarray(model(jnp.asarray(source), jnp.asarray(target), source_mask=jnp.asarray(MASK)))
        target[:, at + 1] = logits[:, at].argmax(-1)
    assert len({tuple(row) for row in target}) == 4, "a model that ignores the source proves nothing"
    np.testing.assert_array_equal(answers, target)


def test_what_is_no_source_has_no_effect(model: Model, source: np.ndarray, answers: np.ndarray):
    garbage = np.where(MASK, source, 10**6)
    np.testing.assert_array_equal(generate(model, garbage, source_mask=MASK > 0, max_new_tokens=NEW), answers)
    wide = np.concatenate([garbage[:2], np.full((2, 20), -7)], axis=1)
    by_length = generate(model, wide, prompt_lengths=[9, 4], max_new_tokens=NEW)
    np.testing.assert_array_equal(by_length, answers[:2])


@pytest.mark.slow
def test_rows_and_meshes_change_nothing(model: Model, make_model, source: np.ndarray, answers: np.ndarray):
    order = [2, 0]
    alone = generate(model, source[order], source_mask=MASK[order], max_new_tokens=NEW)
    np.testing.assert_array_equal(alone, answers[order])
    sharded = make_model(model.config, make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    eos_id = int(answers[0, 3])
    drawn: dict[str, Any] = {
        "source_mask": MASK,
        "max_new_tokens": NEW,
        "temperature": 1.0,
        "seed": 3,
        "eos_id": eos_id,
    }
    np.testing.assert_array_equal(generate(sharded, source, **drawn), generate(model, source, **drawn))


def test_an_answer_ends_at_eos(model: Model, source: np.ndarray, answers: np.ndarray):
    eos_id = int(answers[0, 3])
    stopped = generate(model, source, source_mask=MASK, max_new_tokens=NEW, eos_id=eos_id)
    for row, free in zip(stopped, answers, strict=True):
        count = free[1:].tolist().index(eos_id) + 2 if eos_id in free[1:] else 1 + NEW
        np.testing.assert_array_equal(row[:count], free[:count])
        assert (row[count:] == eos_id).all()


@pytest.mark.slow
def test_sentinels_of_prompts_and_answers_go_by_name(answering: LanguageModel):
    tokenizer = answering.tokenizer
    assert tokenizer is not None
    found = complete(answering, PROMPTS, SamplingConfig(12, 1e6))  # any token at all
    ids = [tokenizer.special_tokens[f"<extra_id_{i}>"] for i in (0, 1)]
    named = "".join(completion.completion for completion in found)
    drawn = [i for completion in found for i in completion.token_ids]
    assert sum(map(drawn.count, ids)) == named.count("<extra_id_") > 0
    for completion in found:
        pieces, text = [[]], ""
        for i in completion.token_ids:
            pieces = [*pieces, [i], []] if i in ids else [*pieces[:-1], [*pieces[-1], i]]
        for piece in pieces:
            text += f"<extra_id_{ids.index(piece[0])}>" if piece[:1] in [[i] for i in ids] else tokenizer.decode(piece)
        assert completion.completion == text
    source = [*tokenizer.encode("one "), ids[0], *tokenizer.encode(" fish"), *tokenizer.eos_ids]
    expected = generate(answering, [source], max_new_tokens=6)[0, 1:].tolist()
    (greedy,) = complete(answering, PROMPTS[:1], SamplingConfig(6, 0.0))
    assert greedy.token_ids == expected[: len(greedy.token_ids)]


@pytest.mark.slow
def test_only_the_answer_is_printed(answering: LanguageModel, tmp_path, capsys: pytest.CaptureFixture):
    texts = generate_text(answering, PROMPTS, max_new_tokens=10, temperature=0)
    assert len(set(texts)) == 3
    for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        assert "".join(stream_text(answering, prompt, max_new_tokens=10, temperature=0, row=row)) == text
    save(answering, tmp_path / "model")
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert main(["sample", str(tmp_path / "model"), *prompts, "--max-new-tokens", "10", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "\n".join(texts)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"source_mask": [[1, 1, 1]]}, r"source_mask of shape \(1, 3\) must have a 0 or 1 for each"),
        ({"source_mask": [[1, 2]]}, r"source_mask of shape \(1, 2\) must have a 0 or 1"),
        ({"source_mask": [[0, 0]]}, r"source_mask\[0\] leaves nothing of its source"),
        ({"source_mask": [[1, 1]], "prompt_lengths": [2]}, "prompt_lengths and source_mask both"),
        ({"tokens": [[1, 40]]}, "token id 40 is outside"),
    ],
)
def test_what_cannot_be_answered(change: dict, sentence: str, model: Model):
    with pytest.raises(UserError, match=sentence):
        generate(model, **{"tokens": [[1, 2]]} | change)


def test_the_positions_are_the_limit(make_model, model: Model):
    """Of relative ones there is none."""
    config = dataclasses.replace(model.config, position_bias=None, encoder_position_bias=None)
    limited = make_model(dataclasses.replace(config, positions=LearnedPositions(32, offset=0)))
    with pytest.raises(
        UserError, match="a source of 33 tokens is more than the model's 32 positions: shorten the prom"
    ):
        generate(limited, [[1] * 33])
    with pytest.raises(UserError, match=r"the start token and max_new_tokens=32 are more than .* take at most 31"):
        generate(limited, [[1, 2]], max_new_tokens=32)
    assert generate(model, [[1] * 33], max_new_tokens=2).shape == (1, 3)


def test_a_decoder_takes_no_source_mask(make_model, two_layers):
    with pytest.raises(UserError, match="source_mask is for encoder-decoders, and this is a DecoderConfig"):
        generate(make_model(dataclasses.replace(two_layers, num_layers=1)), [[1, 2]], source_mask=[[1, 1]])
