"""Matrices in int8, int4 and fp8, in products and in whole models."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.checkpoint import load, save
from llama_jax.config import UserError
from llama_jax.evaluation import quantization_cost
from llama_jax.models import Compute, DecoderConfig, build, num_parameters
from llama_jax.nn import (
    Experts,
    Form,
    GroupedQuery,
    LatentAttention,
    RMSNorm,
    Rope,
    SoftmaxTopK,
    SwiGLU,
    form_of,
    multiplied,
)
from llama_jax.parallel import make_mesh
from llama_jax.sampling import generate

ROPE = Rope(10000.0, None)
QUERY = GroupedQuery(num_heads=4, num_kv_heads=2, head_dim=16, rope=ROPE, qkv_bias=True, out_bias=False)
LATENT = LatentAttention(
    num_heads=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    rope=ROPE,
    eps=1e-5,
)
FEED_FORWARD = SwiGLU(96, bias=False)
EXPERTS = Experts(4, 32, SoftmaxTopK(2, normalize=True), activation="silu", gated=True)


@functools.cache
def model(attention=QUERY, feed_forward=FEED_FORWARD, tied: bool = True):
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=1,
        max_positions=64,
        attention=attention,
        feed_forward=feed_forward,
        norm=RMSNorm(1e-5),
        tie_embeddings=tied,
    )
    return build(config, compute=Compute(dtype="float32"))


def matrix(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(("format", "levels"), [("int8", 127), ("int4", 7)])
def test_every_value_is_within_half_a_step_of_its_own(format: str, levels: int) -> None:
    w = matrix(256, 5).at[:, 2].multiply(100.0).at[:, 3].set(0.0)
    step = jnp.abs(w).max(0) / levels
    assert (jnp.abs(form_of(w, ("embed", "mlp"), (0,), format)[...] - w) <= step * 0.5001).all()


@pytest.mark.parametrize(("inputs", "rows"), [(48, 1), (86, 2), (96, 5), (13, 1), (96, 20)])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_product_is_that_with_the_dense_matrix(format: str, inputs: int, rows: int) -> None:
    x, form = matrix(1, rows, inputs), form_of(matrix(inputs, 24), ("embed", "mlp"), (0,), format)
    y = jax.jit(lambda x: multiplied(x, form, 1))(x)
    if y is not None:
        np.testing.assert_allclose(y, x @ form[...], atol=1e-3)
    else:
        assert format == "int4"  # many rows, or few inputs: the dense matrix is multiplied


def test_the_products_of_heads_and_of_a_transposed_table() -> None:
    heads = form_of(matrix(4, 32, 24), ("heads", None, "embed"), (0, 1), "int4")
    x = matrix(1, 1, 4, 32)
    y = multiplied(x, heads, 2)
    np.testing.assert_allclose(y, jnp.einsum("btnh,nhd->btd", x, heads[...]), atol=1e-3)
    table = form_of(matrix(40, 32), ("vocab", "embed"), (1,), "int8", transposed=True)
    assert isinstance(table, Form)
    assert table[...].shape == (40, 32)
    np.testing.assert_allclose(table.rows(jnp.array([[3, 39]]))[0], table[...][jnp.array([3, 39])], atol=1e-6)


def test_one_row_in_bfloat16_is_the_product_of_float32() -> None:
    x, w = matrix(1, 1, 96).astype(jnp.bfloat16), matrix(96, 24).astype(jnp.bfloat16)
    y = multiplied(x, w, 1)
    assert y is not None
    np.testing.assert_allclose(y, x.astype(jnp.float32) @ w.astype(jnp.float32), rtol=1e-4, atol=1e-4)


@pytest.mark.quick("grouped query-int4")
@pytest.mark.parametrize(
    ("attention", "feed_forward", "tied", "format"),
    [
        (QUERY, FEED_FORWARD, True, "int4"),
        (LATENT, EXPERTS, False, "int8"),
        (QUERY, FEED_FORWARD, True, "int8"),
        (LATENT, EXPERTS, False, "int4"),
    ],
    ids=["grouped query-int4", "latent, experts-int8", "grouped query-int8", "latent, experts-int4"],
)
def test_a_quantized_model_is_that_of_its_rounded_weights(attention, feed_forward, tied: bool, format: str) -> None:
    exact = model(attention, feed_forward, tied)
    quantized = exact.quantized(format)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 12))
    wanted = np.asarray(exact(tokens))
    error = np.asarray(quantized(tokens)) - wanted
    assert 1e-5 < error.std() / wanted.std() < {"int8": 0.03, "int4": 0.4}[format]
    assert sum(x.nbytes for x in jax.tree.leaves(quantized.state)) < 0.5 * sum(
        x.nbytes for x in jax.tree.leaves(exact.state)
    )
    assert num_parameters(quantized.config) == num_parameters(exact.config)


def test_greedy_tokens_are_the_same_as_by_a_whole_forward() -> None:
    quantized, prompt = model().quantized("int8"), [[3, 1, 4, 1, 5]]
    written = np.asarray(generate(quantized, prompt, max_new_tokens=6))[0]
    logits = np.asarray(quantized(written[None]))
    np.testing.assert_array_equal(logits[0, 4:-1].argmax(-1), written[5:])


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(UserError, match="quantize='int3' must be one of int8, int4, fp8"):
        model().quantized("int3")
    with pytest.raises(UserError, match="fp8 needs an NVIDIA GPU"):
        model().quantized("fp8")
    quantized = model().quantized("int8")
    with pytest.raises(UserError, match="load it without quantize"):
        quantized.params()
    with pytest.raises(UserError, match="int8 already"):
        quantized.quantized("int4")


@pytest.mark.quick("int4-{'tensor': 2, 'fsdp': 2}")
@pytest.mark.parametrize("sizes", [{"tensor": 2, "fsdp": 2}, {"fsdp": 4}], ids=str)
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_mesh_computes_the_same(format: str, sizes: dict[str, int]) -> None:
    alone, tokens = model().quantized(format), np.random.default_rng(0).integers(0, 64, (4, 8))
    with jax.set_mesh(make_mesh(sizes, jax.devices()[:4])):
        sharded = build(model().config, compute=Compute(dtype="float32")).quantized(format)
    np.testing.assert_allclose(sharded(tokens), alone(tokens), atol=2e-3)
    down = sharded.layers[0].feed_forward.down_proj.weight
    parts = 4 if format == "int8" or "tensor" not in sizes else 2  # int4 has one group of 96 inputs, which stays whole
    assert down.values[...].addressable_shards[0].data.size * parts == down.values[...].size


@pytest.mark.slow
def test_real_weights_lose_little(shared_data: Path) -> None:
    folder = shared_data / "llama2c"
    text = (folder / "stories260K_expected_greedy200.txt").read_text()
    exact, int8 = (
        load(folder / "stories260K.bin", tokenizer=folder / "tok512.bin", dtype="float32", quantize=quantize)
        for quantize in (None, "int8")
    )
    assert exact.tokenizer is not None
    tokens = exact.tokenizer.encode_batch([text])[0][None, :128]
    error = np.asarray(int8.model(tokens) - exact.model(tokens))
    assert error.std() < 0.02 * np.asarray(exact.model(tokens)).std()
    before, after = quantization_cost(exact, text)
    assert after < 1.01 * before
    before, after = quantization_cost(exact, text, quantize="int4")
    assert before < after < 1.5 * before
    with pytest.raises(UserError, match="quantize=int8 has no full weights"):
        save(int8, folder / "never")
