"""The chunked loss is the plain one, gradient and all, and never holds the logits."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from llama_jax.models import Compute, DecoderConfig, assemble, loss_chunks
from llama_jax.parallel import make_mesh
from llama_jax.training import cross_entropy
from llama_jax.training.step import losses

B, T, D, V = 3, 12, 8, 20


def head(hidden: jax.Array, weight: jax.Array) -> jax.Array:
    return hidden @ weight


def plain(head: Any, weight: Any, hidden: jax.Array, targets: jax.Array, weights: jax.Array, z_loss: float):
    log_z = jax.nn.logsumexp(head(hidden, weight), axis=-1)
    ce = log_z - jnp.take_along_axis(head(hidden, weight), targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (ce + z_loss * log_z**2)), jnp.sum(weights * ce)


@pytest.fixture(scope="module")
def values() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {
        "weight": jnp.asarray(rng.normal(size=(D, V)), jnp.float32),
        "hidden": jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32),
        "targets": jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        # Zero for some, a whole row too; and no common value, so that each weight has to meet its own target.
        "weights": jnp.asarray(rng.uniform(0.5, 2, (B, T)) * (rng.random((B, T)) < 0.7), jnp.float32).at[1].set(0),
    }


plain_gradient = jax.jit(jax.value_and_grad(functools.partial(plain, head), argnums=(0, 1), has_aux=True))


# Every chunk with a z-loss, and one without.
@pytest.mark.parametrize(("chunk", "z_loss"), [(1, 0.3), (4, 0.3), (5, 0.3), (12, 0.3), (100, 0.3), (5, 0.0)])
def test_chunked_is_plain_with_gradients(values: dict[str, jax.Array], chunk: int, z_loss: float):
    @jax.jit
    def found(weight: jax.Array, hidden: jax.Array, *rest: jax.Array) -> Any:
        ours = functools.partial(cross_entropy, head, z_loss=z_loss, chunk=chunk)
        # Without a gradient another function runs.
        return jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(weight, hidden, *rest), ours(
            weight, hidden, *rest
        )

    arrays = [values[name] for name in ("weight", "hidden", "targets", "weights")]
    ours, (total, ce) = found(*arrays)
    theirs = plain_gradient(*arrays, z_loss)
    assert float(theirs[0][0]) > 10
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose([total, ce], theirs[0], rtol=1e-6)


@given(st.integers(1, 4096), st.sampled_from(["tpu", "gpu"]))
def test_a_chunk_has_as_many_tokens_as_fit(rows: int, platform: str):
    positions = 8192 // loss_chunks(None, rows, 8192, platform)
    assert rows * positions <= 2048 < 2 * rows * positions or positions == 1
    assert loss_chunks(None, rows, 8192, "cpu") == 8192 // 128
    assert loss_chunks(7, rows, 8192, platform) == -(-8192 // 7)


def test_gradient_follows_what_the_loss_is_multiplied_with(values: dict[str, jax.Array]):
    def scaled(weight: jax.Array, factor: float) -> jax.Array:
        return factor * cross_entropy(**(values | {"weight": weight}), head=head, chunk=4)[0]

    gradient = jax.jit(jax.grad(scaled))
    once, thrice = (gradient(values["weight"], factor) for factor in (1.0, 3.0))
    np.testing.assert_allclose(3 * once, thrice, rtol=1e-6)


def huge(values: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Logits near 1e30 at the first place of every row."""
    return values | {"hidden": values["hidden"].at[:, 0].multiply(1e30)}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_any_weight_there_is_no_loss_and_no_gradient(values: dict[str, jax.Array], smoothing: float):
    values = huge(values)

    def loss(weight, hidden):
        return cross_entropy(
            head, weight, hidden, values["targets"], jnp.zeros((B, T)), z_loss=0.1, label_smoothing=smoothing, chunk=5
        )

    found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(values["weight"], values["hidden"])
    for x in jax.tree.leaves(found):
        np.testing.assert_array_equal(x, np.zeros(x.shape))


def test_a_z_loss_of_zero_is_none_however_large_the_logits(values: dict[str, jax.Array]):
    values = huge(values)
    loss = functools.partial(cross_entropy, head, z_loss=0.0, chunk=5)
    (total, ce), gradient = jax.value_and_grad(
        lambda w: loss(w, values["hidden"], values["targets"], values["weights"]), has_aux=True
    )(values["weight"])
    expected = plain(head, *(values[name] for name in ("weight", "hidden", "targets", "weights")), z_loss=0.0)
    np.testing.assert_allclose([total, ce], [expected[1], expected[1]], rtol=1e-5)
    assert float(total) > 1e29
    assert np.isfinite(gradient).all()


def test_padding_that_a_chunk_adds_has_no_weight(values: dict[str, jax.Array]):
    ones = values | {"weights": jnp.ones((B, T))}
    totals = [jax.jit(functools.partial(cross_entropy, head, chunk=chunk))(**ones)[0] for chunk in (T, 5, 7)]
    np.testing.assert_allclose(totals, totals[0], rtol=1e-6)


@pytest.mark.quick("True")
@pytest.mark.parametrize("tied", [False, True])
def test_model_loss_is_that_of_its_logits(tiny_config: DecoderConfig, random_params: Any, tied: bool):
    """Also of parameters that nobody has placed on the mesh: a head that is whole everywhere counts once."""
    config = DecoderConfig(**(tiny_config.__dict__ | {"tie_embeddings": tied}))
    arrays = random_params(config), batch_of(config, 2, 10)

    def ours(params: Any, batch: Any) -> jax.Array:
        return losses(params, batch, config, Compute(loss_chunk=4), z_loss=0.1)[0][0][1]

    def theirs(params: Any, batch: Any) -> jax.Array:
        logits = assemble(config, params, Compute())(
            batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"]
        )
        return plain(lambda logits, _: logits, None, logits, batch["targets"], batch["weights"], 0.1)[0]

    expected, found = (jax.jit(jax.value_and_grad(f))(*arrays) for f in (theirs, ours))
    mesh = make_mesh({"tensor": 2}, jax.devices()[:2])
    with jax.set_mesh(mesh):
        everywhere = jax.device_put(arrays, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        on_mesh = jax.jit(jax.value_and_grad(ours))(*everywhere)
    np.testing.assert_allclose([found[0], on_mesh[0]], [expected[0]] * 2, rtol=1e-5)
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-3, atol=1e-4 * np.abs(value).max(), err_msg=name)
        np.testing.assert_allclose(on_mesh[1][name], found[1][name], rtol=1e-3, atol=1e-5, err_msg=name)


def batch_of(config: DecoderConfig, rows: int, length: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    ids = rng.integers(0, config.vocab_size, (rows, length + 1))
    cut = length // 2
    segments = np.broadcast_to(1 + (np.arange(length) >= cut), (rows, length))
    positions = np.where(segments == 1, np.arange(length), np.arange(length) - cut)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "segment_ids": segments, "positions": positions}
    weights = np.ones((rows, length), np.float32)
    weights[:, cut - 1] = 0
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()} | {"weights": jnp.asarray(weights)}


def test_no_array_of_all_logits_lives(tiny_config: DecoderConfig, random_params: Any):
    """The compiled gradient has no [batch, sequence, vocabulary] array in any layout, and less memory for it."""
    rows, length, vocab = 2, 64, 3000
    config = DecoderConfig(**(tiny_config.__dict__ | {"vocab_size": vocab}))
    params, batch = random_params(config), batch_of(config, rows, length)

    def gradient(chunk: int) -> Any:
        loss = lambda params: losses(params, batch, config, Compute(loss_chunk=chunk), z_loss=0.0)[0][0][1]  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(params).compile()

    def largest(compiled: Any) -> int:
        """Elements of the largest float32 array with the vocabulary in it and without a parameter's other dimension."""
        shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())}
        own = {tuple(sorted(p.shape)) for p in params.values()}
        return max(int(np.prod(s)) for s in shapes if s[-1] % vocab == 0 and tuple(sorted(s)) not in own)

    chunked, whole = gradient(8), gradient(length)
    logits = rows * length * vocab
    assert largest(whole) >= logits
    assert largest(chunked) <= logits // 8
    saved = whole.memory_analysis().temp_size_in_bytes - chunked.memory_analysis().temp_size_in_bytes
    assert saved > 0.8 * 4 * logits
