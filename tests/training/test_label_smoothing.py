"""The smoothed loss is the cross-entropy with the smoothed target, gradient and all, on one device and on eight."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.models import Compute, DecoderConfig, abstract_params
from llama_jax.parallel import make_mesh, shard
from llama_jax.training import cross_entropy
from llama_jax.training.step import losses

B, T, D, V = 4, 12, 8, 24


def head(hidden: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum("btd,dv->btv", hidden, weight)


def plain(weight: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array, smoothing: float, z: float):
    """The cross-entropy with a distribution: 1 - e of the target, and e shared by all (Szegedy et al. 2016)."""
    logits = head(hidden, weight)
    wanted = (1 - smoothing) * jax.nn.one_hot(targets, V) + smoothing / V
    ce = -(wanted * jax.nn.log_softmax(logits)).sum(-1)
    return (weights * (ce + z * jax.nn.logsumexp(logits, axis=-1) ** 2)).sum()


@pytest.fixture(scope="module")
def values() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {
        "weight": jnp.asarray(rng.normal(size=(D, V)), jnp.float32),
        "hidden": jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32),
        "targets": jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        "weights": jnp.asarray(rng.uniform(0.5, 2, (B, T)) * (rng.random((B, T)) < 0.7), jnp.float32),
    }


def expected(values: dict[str, jax.Array], smoothing: float, z_loss: float) -> Any:
    wanted = lambda w, h: plain(w, h, values["targets"], values["weights"], smoothing, z_loss)  # noqa: E731
    return jax.jit(jax.value_and_grad(wanted, argnums=(0, 1)))(values["weight"], values["hidden"])


def ours(values: dict[str, jax.Array], smoothing: float, z_loss: float, chunk: int = 5) -> Any:
    """((loss, cross-entropy), gradients)."""

    def loss(weight: jax.Array, hidden: jax.Array, smoothing: jax.Array) -> Any:
        rest = values["targets"], values["weights"]
        return cross_entropy(head, weight, hidden, *rest, z_loss=z_loss, label_smoothing=smoothing, chunk=chunk)

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return gradient(values["weight"], values["hidden"], jnp.float32(smoothing))


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.1, 0.0), (0.4, 0.3)])
def test_smoothed_loss_and_gradient_are_the_plain_ones(values: dict[str, jax.Array], smoothing: float, z_loss: float):
    (loss, ce), gradients = ours(values, smoothing, z_loss)
    wanted, wanted_gradients = expected(values, smoothing, z_loss)
    unsmoothed = expected(values, 0.0, 0.0)[0]
    assert abs(float(wanted - unsmoothed)) > 0.5
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(ce, unsmoothed, rtol=1e-5)  # what is logged stays comparable
    for found, want in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    # Without a gradient another function runs.
    rest = values["hidden"], values["targets"], values["weights"]
    loss, ce = jax.jit(lambda e: cross_entropy(head, values["weight"], *rest, z_loss=z_loss, label_smoothing=e))(
        smoothing
    )
    np.testing.assert_allclose([loss, ce], [wanted, unsmoothed], rtol=1e-5)


@pytest.mark.parametrize("shape", [{"tensor": 8}, {"data": 2, "tensor": 4}], ids=str)
def test_a_vocabulary_split_over_devices(values: dict[str, jax.Array], shape: dict[str, int]):
    """A device has a few of the logits, and e / V is for all of them."""
    wanted, wanted_gradients = expected(values, 0.2, 0.1)
    with jax.set_mesh(make_mesh(shape)):
        places = {"weight": ("embed", "vocab"), "hidden": ("batch", "sequence", None)}
        placed = {
            name: shard(jax.device_put(np.asarray(x)), *places.get(name, ("batch", "sequence")))
            for name, x in values.items()
        }
        assert "tensor" in str(jax.typeof(placed["weight"]).sharding.spec)

        def sharded_head(hidden: jax.Array, weight: jax.Array) -> jax.Array:
            return head(hidden, weight)

        def loss(weight: jax.Array, hidden: jax.Array) -> Any:
            rest = placed["targets"], placed["weights"]
            return cross_entropy(sharded_head, weight, hidden, *rest, z_loss=0.1, label_smoothing=0.2, chunk=5)

        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (found, ce), gradients = gradient(placed["weight"], placed["hidden"])
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(ce, expected(values, 0.0, 0.0)[0], rtol=1e-5)
    for one, want in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(one, want, rtol=1e-4, atol=1e-5)


def test_the_option_reaches_every_model_s_loss(tiny_config: DecoderConfig, random_params: Any):
    """A decoder that knows nothing: ln V with any smoothing, and one that knows all pays for the smoothing."""
    params = random_params(tiny_config)
    batch = {
        name: jnp.asarray(np.random.default_rng(1).integers(0, 40, (2, 8)), jnp.int32) for name in ("tokens", "targets")
    }
    batch |= {"positions": jnp.broadcast_to(jnp.arange(8), (2, 8)), "segment_ids": jnp.ones((2, 8), jnp.int32)}
    batch |= {"weights": jnp.ones((2, 8), jnp.float32)}

    @jax.jit
    def total(params: Any, smoothing: jax.Array) -> jax.Array:
        return losses(params, batch, tiny_config, Compute(), label_smoothing=smoothing)[0][0][1]

    flat = params | {"lm_head.weight": jnp.zeros_like(params["lm_head.weight"])}
    assert set(params) == set(abstract_params(tiny_config))
    for smoothing in (0.0, 0.3):
        assert float(total(flat, smoothing)) == pytest.approx(16 * np.log(40), rel=1e-5)
    half, whole, none = (float(total(params, e)) for e in (0.25, 0.5, 0.0))
    assert half != pytest.approx(none, rel=1e-3)
    assert half - none == pytest.approx(whole - half, rel=1e-3)  # it is linear in e
