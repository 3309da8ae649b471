"""Rotary decay against rotated random vectors and the paper's bound; the table of caches; every figure drawn."""

import io
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from hypothesis import given, strategies as st

import llama_jax
from llama_jax import UserError, inspect
from llama_jax.inspect.recorded import texts_of
from llama_jax.models import DecoderConfig, cache_bytes
from llama_jax.nn import LinearScaling, Rope, YarnScaling
from llama_jax.run import Run
from llama_jax.tokenizers import load_tokenizer, train_tokenizer

ROPES = [Rope(10000.0, None), Rope(500.0, LinearScaling(4.0)), Rope(100.0, None, rotary_dim=8),
         Rope(10000.0, YarnScaling(4.0, 32, 8.0, 1.0, 0.0, 0.0))]  # fmt: skip
SIZE = 16
RUN = tiny_run.get_config()


@pytest.mark.parametrize("rope", ROPES, ids=["plain", "linear", "partial", "yarn"])
def test_decay_is_the_mean_of_rotated_vectors(rope: Rope):
    distances = np.arange(0, 60, 7)
    found = inspect.rope_decay(rope, distances, head_dim=SIZE)
    vectors = np.random.default_rng(0).normal(size=(1, 1, 4000, SIZE)).astype(np.float32)
    ones = np.ones((1, len(distances), 1, SIZE), np.float32)
    query = np.asarray(rope.rotate(jnp.asarray(vectors), jnp.array([[0]])))[0, 0]
    keys = rope.rotate(jnp.asarray(np.repeat(vectors, len(distances), 1)), jnp.asarray(distances)[None])
    scores = np.einsum("nh,tnh->tn", query, np.asarray(keys)[0]) / SIZE
    np.testing.assert_allclose(found.mean["model"], scores.mean(1), atol=0.03)
    np.testing.assert_allclose(found.spread["model"], scores.std(1), rtol=0.06)
    rotated = np.asarray(rope.rotate(jnp.asarray(ones), jnp.asarray(distances)[None]))[0, :, 0]
    first = np.asarray(rope.rotate(jnp.asarray(ones[:, :1]), jnp.array([[0]])))[0, 0, 0]
    np.testing.assert_allclose(found.mean["model"], rotated @ first / SIZE, atol=1e-4)


@given(st.integers(0, 2**31 - 1), st.integers(0, 5000))
def test_no_score_is_above_the_bound(seed: int, distance: int):
    """|q.k| <= max |h_(i+1) - h_i| sum |S_(i+1)|, with h the products of the pairs and 0 after the last."""
    query, key = np.random.default_rng(seed).normal(size=(2, SIZE // 2, 2)) @ [1, 1j]
    products = query * key.conj()
    found = inspect.rope_decay(ROPES[0], [distance], head_dim=SIZE)
    score = (products * np.exp(1j * distance * ROPES[0].frequencies(SIZE))).sum().real
    steps = np.abs(np.diff(np.append(products, 0))).max()
    assert abs(score) <= steps * found.bound["model"][0] * SIZE / 2 * (1 + 1e-9)


def test_rope_of_a_config(tiny_config: DecoderConfig):
    mine, plain = (inspect.rope_decay(x, 9, head_dim=8) for x in (tiny_config, tiny_config.attention.rope))
    np.testing.assert_array_equal(mine.mean["model"], plain.mean["model"])
    assert mine.mean["model"][0] == 1
    with pytest.raises(UserError, match="has no rotary positions"):
        inspect.rope_decay(llama_jax.presets()["gpt2"])
    with pytest.raises(UserError, match="needs head_dim="):
        inspect.rope_decay(ROPES[0])


def test_cache_table(tiny_config: DecoderConfig):
    lstm = llama_jax.presets()["lstm_ptb_small"]
    sizes = inspect.kv_cache({"tiny": tiny_config, "lstm": lstm}, [8, 64], [1, 3], dtype="float32")
    assert sizes.bytes["tiny"][1, 1] == cache_bytes(tiny_config, 64, 3, "float32")
    assert inspect.kv_cache(RUN, [8]).bytes["model"] == cache_bytes(RUN.model, 8)
    assert sizes.per_token == {"tiny": 2 * 2 * 8 * 4, "lstm": 0}
    assert (sizes.bytes["lstm"][0] == sizes.bytes["lstm"][1]).all()
    table = sizes.to_pandas()
    assert len(table) == 8
    assert (
        table.query("model == 'tiny' and length == 64 and batch_size == 3")["bytes"].item() == sizes.bytes["tiny"][1, 1]
    )
    assert ">24,576<" in sizes._repr_html_()
    assert "&lt;b&gt;" in inspect.kv_cache({"<b>": RUN})._repr_html_()
    with pytest.raises(UserError, match="EncoderConfig keeps no cache"):
        inspect.kv_cache({"bert": llama_jax.presets()["bert_base"]})


def test_labels_show_every_byte(finished_run: Run):
    tokenizer = finished_run.tokenizer
    text = "the  cat\n\t中 $x$"
    ids = tokenizer.encode(text, bos=True)
    texts = texts_of(tokenizer, ids)
    assert len(texts) == len(ids)
    assert all(texts)
    shown = re.sub("<0x..>", "", "".join(texts[1:])).removeprefix("·")  # a space before the text is a token's
    assert shown == text.replace(" ", "·").replace("\n", r"\n").replace("\t", r"\t")
    assert texts_of(None, [3, 4]) == ["3", "4"]


def test_labels_of_bytes(finished_run: Run, tmp_path: Path):
    """Bytes are their numbers until the last of a character, also in the exported tokenizer of transformers."""
    own = finished_run.tokenizer
    for name, content in own.export_files().items():
        (tmp_path / name).write_bytes(content)
    for tokenizer in (own, load_tokenizer(tmp_path)):
        ids = tokenizer.encode("\n中\1")[-5:]
        assert texts_of(tokenizer, ids) == [r"\n", "<0xE4>", "<0xB8>", "中", "<0x01>"]
        assert texts_of(tokenizer, ids, alone=True)[1:4] == ["<0xE4>", "<0xB8>", "<0xAD>"]
    letters = train_tokenizer(["the cat"] * 9, kind="byte_bpe", vocab_size=260)
    assert texts_of(letters, letters.encode("\n é")) == [r"\n", "·", "<0xC3>", "é"]


def drawn(figure: Any) -> None:
    figure.savefig(io.BytesIO(), format="png", dpi=30)


@pytest.mark.slow
def test_every_figure_is_drawn(finished_run: Run, tiny_config: DecoderConfig):
    """Warnings, such as those of characters that the font lacks, are errors here."""
    lm, text = finished_run.load(), "the cat\n\t中 $x$"
    maps, gradients = inspect.attention_maps(lm, text), inspect.gradient_norms(lm, text)
    for figure in (
        maps.plot(),
        maps.plot(head=1),
        inspect.logit_lens(lm, text + " and then ran" * 6).plot(),
        inspect.activation_norms(lm, text).plot(),
        gradients.plot(),
        gradients.plot("attention"),
        inspect.rope_decay({"a": tiny_config, "b": lm}).plot(),
        inspect.kv_cache(tiny_config).plot(),
        inspect.ExpertLoad("step", np.arange(3), np.full((3, 4), 0.25), np.zeros(3)).plot(),
        inspect.UpdateHistory(np.arange(3), np.ones((3, 4)), np.ones((3, 4))).plot(),
    ):
        drawn(figure)
    with pytest.raises(UserError, match="part='x' is in none of the names: attention"):
        gradients.plot("x")
    with pytest.raises(UserError, match="row=3 must be from 0 to 0"):
        maps.plot(row=3)
    assert repr(maps).startswith("AttentionMaps(weights=float32[1, 1, 4, ")
    assert "layers={attention.k_proj.weight, " in repr(gradients)
    with pytest.raises(UserError, match="head=9 must be from 0 to 3"):
        maps.plot(head=9)
    with pytest.raises(UserError, match="layer=5 must be one of 0"):
        maps.plot(5)
