"""Products and their gradients: the formula, and in bfloat16 no product of float32 matrices."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.models import Compute, DecoderConfig, init_params
from llama_jax.nn import ACTIVATIONS, Rope
from llama_jax.nn.attention.blockwise import blockwise
from llama_jax.nn.base import Mask
from llama_jax.nn.feed_forward import activated
from llama_jax.nn.parameters import embed_lookup
from llama_jax.nn.products import product, scaled, turned
from llama_jax.training import AdamW, init_state, make_train_step

# Rows, inputs, outputs: each side the larger one once, and odd sizes.
SIZES = [(12, 8, 5), (7, 3, 40), (16, 33, 4)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_and_its_gradients_are_the_formula(dtype, sizes: tuple[int, int, int], transposed: bool):
    m, i, o = sizes
    rng = np.random.default_rng(0)
    x, w, d_y = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((m, i), (i, o), (m, o)))
    y, pull = jax.vjp(lambda x, w: product(x, w.T if transposed else w, transposed, jnp.float32), x, w)
    d_x, d_w = pull(d_y.astype(jnp.float32))
    assert (y.dtype, d_x.dtype, d_w.dtype) == (jnp.float32, dtype, dtype)
    exact_x, exact_w, exact_d = (np.asarray(a, np.float64) for a in (x, w, d_y))
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-7
    for found, wanted in ((y, exact_x @ exact_w), (d_x, exact_d @ exact_w.T), (d_w, exact_x.T @ exact_d)):
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_turned_swaps_the_last_two(dtype):
    x = jnp.arange(2 * 3 * 5, dtype=dtype).reshape(2, 3, 5)
    np.testing.assert_array_equal(jax.jit(turned)(x), np.asarray(x).swapaxes(1, 2))
    lanes = jnp.stack([x, x + 1])
    np.testing.assert_array_equal(jax.jit(jax.vmap(turned))(lanes), np.asarray(lanes).swapaxes(2, 3))


def test_a_step_in_bfloat16_has_no_product_of_float32(tiny_config: DecoderConfig):
    """Of weights, attention's blocks and the head, forward and backward: XLA has the fast products for these alone."""
    hyper = AdamW(learning_rate=1e-3, warmup_steps=0).hyper(num_steps=10)
    state = jax.eval_shape(init_state, jax.eval_shape(lambda: init_params(tiny_config, 0)), hyper)
    fields = {"tokens": jnp.int32, "targets": jnp.int32, "positions": jnp.int32, "segment_ids": jnp.int32}
    batch = {name: jax.ShapeDtypeStruct((2, 16), dtype) for name, dtype in (fields | {"weights": jnp.float32}).items()}
    step = make_train_step(tiny_config, Compute(dtype="bfloat16", attention_kernel="blockwise"))
    text = step.lower(state, batch, hyper).as_text()
    matrix = r"tensor<\d+x\d+[\dx]*x(\w+)>"
    found = re.findall(rf"stablehlo\.dot_general.* : \({matrix}, {matrix}\)", text)
    assert len(found) > 20
    assert set(found) == {("bf16", "bf16")}
    norms = sum("norm" in name for name in state.params)  # whose gradients are products of a vector with a matrix
    assert text.count("stablehlo.dot_general") == len(found) + norms


EYE = np.eye(32, dtype=np.float32)
AGAIN = {
    # A layer that has to keep its input [...] alone, and what is larger than that: its scores, three steps of SwiGLU.
    "attention": (lambda q, w: blockwise(q, q[:, :, 0] * w, q[:, :, 0], Mask(), None, 1.0), (1, 2, 1, 128, 8)),
    "nonlinearity": (lambda x, w: activated(ACTIVATIONS["silu"], x * w, x + w), (256, 256)),
    # A normalized input, which its weight's gradient would turn in the forward pass and keep as well.
    "product": (
        lambda x, w: x + product(x / jnp.linalg.norm(x, axis=-1, keepdims=True), w + EYE, False, None),
        (512, 32),
    ),
}


@pytest.mark.parametrize("piece", AGAIN)
def test_the_backward_pass_computes_again(piece: str):
    """XLA:CPU would find the values of the forward pass, and keep them."""
    layer, shape = AGAIN[piece]

    def temporary_bytes(layers: int) -> int:
        def loss(weights, x):
            for w in weights:
                x = layer(x, w)
            return (x**2).sum()

        gradient = jax.jit(jax.grad(loss))
        return gradient.lower(jnp.ones(layers), jnp.ones(shape)).compile().memory_analysis().temp_size_in_bytes

    inputs = 3 if piece == "attention" else 1  # keys and the result are as large as the queries
    of_layer = (temporary_bytes(6) - temporary_bytes(4)) / 2
    assert of_layer < 1.3 * inputs * 4 * math.prod(shape)


def test_the_gradient_of_a_table_takes_its_memory_when_it_is_added_to():
    """XLA:CPU would make its zeros first, beside what the forward pass takes."""
    table, x = jnp.ones((1024, 32)), jnp.ones((128, 128))

    def loss(table, x):
        rows = embed_lookup(table, jnp.arange(8)[None])
        for _ in range(2):
            x = jax.lax.sort(jnp.sin(x) @ jnp.cos(x.T))
        return (rows * x[0, 0]).sum()

    memory = jax.jit(jax.grad(loss)).lower(table, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.1 * table.nbytes


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_has_its_own_gradient(name: str):
    activation = ACTIVATIONS[name]
    x, up, d_y = jax.random.normal(jax.random.key(0), (3, 5, 7))
    x = x.at[0, 0].set(0)
    for inputs, formula in (((x,), activation), ((x, up), lambda x, up: activation(x) * up)):
        (y, pull), (plain_y, plain) = (
            jax.vjp(functools.partial(activated, activation), *inputs),
            jax.vjp(formula, *inputs),
        )
        for found, wanted in zip((y, *pull(d_y)), (plain_y, *plain(d_y)), strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_scale_and_its_gradients_are_the_formula(dtype, shape: tuple[int, ...]):
    rng = np.random.default_rng(0)
    x, w, d_y = (jnp.asarray(rng.normal(size=size), dtype) for size in ((4, 5, *shape), shape, (4, 5, *shape)))
    y, pull = jax.vjp(scaled, x, w)
    d_x, d_w = pull(d_y)
    assert (y.dtype, d_x.dtype, d_w.dtype) == (dtype, dtype, dtype)
    exact_x, exact_w, exact_d = (np.asarray(a, np.float64) for a in (x, w, d_y))
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-7
    wanted = exact_x * exact_w, exact_d * exact_w, (exact_x * exact_d).sum((0, 1))
    for found, exact in zip((y, d_x, d_w), wanted, strict=True):
        np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=tolerance, atol=tolerance)


def test_angles_have_one_cosine_for_all_heads_and_layers():
    """XLA:CPU would compute it in each place that multiplies by it."""
    rope = Rope(theta=10000.0, scaling=None)

    def layers(x: jax.Array, positions: jax.Array) -> jax.Array:
        for _ in range(3):
            x = turned(rope.rotate(x, positions)) @ jnp.ones((x.shape[2], x.shape[3]))
        return x.sum()

    gradient = jax.jit(jax.grad(layers)).lower(jnp.ones((2, 8, 4, 4)), jnp.zeros((2, 8), jnp.int32))
    assert len(re.findall(r" cosine\(", gradient.compile().as_text())) == 1
