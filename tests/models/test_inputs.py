"""A model refuses what it has no answer to, in one sentence, and takes all integer types as one."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import UserError
from llama_jax.models import Compute, DecoderConfig, EncoderConfig, EncoderDecoderConfig, Model, from_params
from llama_jax.nn import MLP, CrossAttention, GroupedQuery, LayerNorm, LearnedPositions

OK = np.array([[3, 5, 7], [1, 0, 2]])
ONES = np.ones((2, 3), int)
LONG = np.zeros((2, 9), int)
SHARED: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 8, "num_layers": 1, "max_positions": 8, "tie_embeddings": True,
    "attention": GroupedQuery(2, 2, 4, None, False, False), "feed_forward": MLP(8, "relu", False),
    "norm": LayerNorm(1e-5, True), "positions": LearnedPositions(8, offset=2),
}  # fmt: skip
CONFIGS = {
    "decoder": DecoderConfig(**SHARED),
    "encoder": EncoderConfig(**SHARED, num_token_types=2),
    "encoder-decoder": EncoderDecoderConfig(
        **SHARED, num_encoder_layers=1, decoder_start_id=0, cross_attention=CrossAttention(2, 2, 4, False, False)
    ),
}


@pytest.fixture(scope="module")
def models(random_params: Callable) -> dict[str, Model]:
    return {name: from_params(config, random_params(config), Compute()) for name, config in CONFIGS.items()}


MISTAKES: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("decoder", (OK + 37,), {}, r"token id 40 is outside the model's vocabulary of 40, in tokens\[0, 0\]"),
    ("decoder", (jnp.asarray(OK - 1),), {}, r"token id -1 is outside .* in tokens\[1, 1\]"),
    ("decoder", (OK.astype(np.float32),), {}, r"tokens of shape \(2, 3\) and type float32 must be an integer array"),
    ("decoder", (OK > 2,), {}, "type bool must be an integer array"),
    ("decoder", (OK[0],), {}, r"tokens\[None\] is a batch of one row"),
    ("decoder", (OK[None],), {}, r"tokens of shape \(1, 2, 3\) .* \[batch, length\]"),
    ("decoder", ([[3, 5]],), {}, r"tokens is a list, .* give np.array\(...\)"),
    ("decoder", (3,), {}, "tokens is a int"),
    ("decoder", ("the cat",), {}, "tokens='the cat' is a text, .* tokenizer"),
    ("decoder", (OK[:, :0],), {}, r"tokens of shape \(2, 0\) is empty"),
    ("decoder", (OK[:0],), {}, r"tokens of shape \(0, 3\) is empty"),
    ("decoder", (LONG,), {}, "9 tokens are more than the model's 8 positions"),
    ("decoder", (OK,), {"positions": ONES + 7}, r"positions\[0, 0\]=8 must be from 0 to 7"),
    ("decoder", (OK,), {"positions": -ONES}, r"positions\[0, 0\]=-1 must be"),
    ("decoder", (OK,), {"positions": np.arange(3)}, r"positions\[None\] is a batch"),
    ("decoder", (OK,), {"segment_ids": ONES[:1]}, r"segment_ids of shape \(1, 3\) must have the shape \(2, 3\) of tok"),
    ("decoder", (OK,), {"segment_ids": ONES[:, :2]}, r"segment_ids of shape \(2, 2\) must have the shape"),
    ("decoder", (OK,), {"segment_ids": -ONES}, "must be the number of a document, or 0"),
    ("decoder", (OK,), {"prefix": 2 * ONES}, r"prefix\[0, 0\]=2 must be 0 or 1"),
    ("decoder", (OK,), {"attention_mask": ONES}, "attention_mask= is not an argument of Decoder, which takes tokens"),
    ("decoder", (OK, ONES), {}, "Decoder takes tokens by place, others by name: tokens, pos"),
    ("decoder", (), {}, "Decoder needs tokens, an int"),
    ("encoder", (LONG,), {}, "9 tokens are more than the model's 8 positions"),
    ("encoder", (LONG,), {"mask": 0 * LONG + 1}, "9 tokens are more"),
    ("encoder", (OK,), {"token_types": 2 * ONES}, "must be below num_token_types=2"),
    ("encoder", (OK,), {"mask": 3 * ONES}, "mask.* must be 0 or 1"),
    ("encoder-decoder", (OK,), {}, "EncoderDecoder needs target"),
    ("encoder-decoder", (OK, LONG), {}, "9 tokens are more"),
    ("encoder-decoder", (LONG, OK), {}, "9 tokens are more"),
    ("encoder-decoder", (OK, OK[:1]), {}, r"target of shape \(1, 3\) must have as many rows as source, 2"),
    ("encoder-decoder", (OK, OK[:, :2]), {"source_mask": ONES[:, :2]}, r"must have the shape \(2, 3\) of source"),
    ("encoder-decoder", (OK, OK + 40), {}, "in target"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "arguments", "named", "sentence"), MISTAKES)
def test_what_has_no_answer_is_refused(models: dict[str, Model], kind, arguments, named, sentence: str):
    for call in (models[kind], models[kind].hidden_states):
        with pytest.raises(UserError, match=sentence) as found:
            call(*arguments, **named)
        assert "\n" not in str(found.value)


def test_integer_types_and_arrays_of_host_and_device_are_one(models: dict[str, Model]):
    logits = models["decoder"](OK)
    for same in (OK.astype(np.uint16), jnp.asarray(OK), OK.astype(np.int32)):
        np.testing.assert_array_equal(models["decoder"](same), logits)
    masks = (ONES, ONES.astype(bool), jnp.asarray(ONES, bool), None)
    found = [models["encoder-decoder"](OK, OK, source_mask=mask) for mask in masks]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-6)


def test_several_short_texts_fit_a_row_that_is_longer_than_the_positions(models: dict[str, Model]):
    segments = np.repeat([[1, 2, 3]], 3, axis=1)[[0, 0]]
    assert np.isfinite(models["encoder"](LONG, segment_ids=segments)).all()


def test_traced_arrays_are_checked_by_their_shapes(models: dict[str, Model]):
    model = models["decoder"]
    np.testing.assert_allclose(jax.jit(lambda x: model(x))(OK), model(OK), atol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda row: model(row[None])[0])(jnp.asarray(OK)), model(OK), atol=1e-6)
    for wrong, sentence in ((LONG, "9 tokens are more"), (OK[0], r"tokens\[None\]"), (OK * 1.0, "type float32")):
        with pytest.raises(UserError, match=sentence):
            jax.jit(lambda x: model(x))(wrong)
        with pytest.raises(UserError, match="9 tokens are more"):  # the module alone has the table, too
            jax.jit(lambda x: model.module(x))(jnp.asarray(LONG))


def test_positions_of_a_formula_go_on(tiny_config: DecoderConfig, random_params: Callable):
    config = dataclasses.replace(tiny_config, max_positions=8)
    model = from_params(config, random_params(config), Compute())
    assert np.isfinite(model(np.zeros((1, 12), int))).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: p.pop("norm.weight"), "lack 'norm.weight', which this DecoderConfig has: 1 are missing"),
        (lambda p: p.update({"more.weight": p["norm.weight"]}), "have 'more.weight', which this DecoderConfig has not"),
        (lambda p: p.update({"norm.weight": jnp.ones(3)}), r"'norm.weight' has shape \(3,\), .* needs \(8,\)"),
    ],
)
def test_parameters_are_those_of_the_config(models: dict[str, Model], change, sentence: str):
    params = dict(models["decoder"].params())
    from_params(CONFIGS["decoder"], params, Compute())
    change(params)
    with pytest.raises(UserError, match=sentence):
        from_params(CONFIGS["decoder"], params, Compute())


WRONG_TYPES = """
import llama_jax
from llama_jax.models import DecoderConfig
from llama_jax.nn import ElmanRNN
config = DecoderConfig(40, 8, 1, 8, ElmanRNN(8), None, None, True)
model = llama_jax.build(config)
lm = llama_jax.LanguageModel(config, model, None)
for call in (
    lambda: llama_jax.build("llama3_8b"),
    lambda: llama_jax.build(config, seed=1.5),
    lambda: llama_jax.generate("runs/mine", [[1]]),
    lambda: llama_jax.generate_text(model, ["a"]),
    lambda: llama_jax.generate_text(lm, [[1, 2]]),
):
    try:
        call()
    except llama_jax.UserError as error:
        print(error)
"""


@pytest.mark.slow
def test_arguments_of_other_types_are_refused():
    """In a process without the run-time checks of types that tests have."""
    done = subprocess.run([sys.executable, "-c", WRONG_TYPES], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "config='llama3_8b' must be a ModelConfig: a DecoderConfig, or one of llama_jax.presets()",
        "seed=1.5 must be at least 0 and below 2**64, a whole number",
        "lm is a str, and must be what load or build returns",
        "lm is a Model, and must be a LanguageModel with a tokenizer: what load returns",
        "prompts=[[1, 2]] must be a text or a list of texts; token ids are for generate",
    ]
