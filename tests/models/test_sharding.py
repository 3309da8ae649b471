"""Eight devices compute what one computes, and hold their part of it."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llama_jax.models import Compute, DecoderConfig, abstract_params, assemble, from_params
from llama_jax.nn import parameters, rope
from llama_jax.parallel import axes_of, make_mesh, mesh_axis_sizes, shard, spec
from llama_jax.training import AdamW, init_state, make_train_step
from llama_jax.training.step import losses

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "context": {"context": 8},
    "data and fsdp": {"data": 2, "fsdp": 4},
    "data and tensor": {"data": 4, "tensor": 2},
    "data and context": {"data": 2, "context": 4},
    "fsdp and tensor": {"fsdp": 2, "tensor": 4},
    "fsdp and context": {"fsdp": 4, "context": 2},
    "tensor and context": {"tensor": 2, "context": 4},
    "fsdp, tensor and context": {"fsdp": 2, "tensor": 2, "context": 2},
}
# The data axis is in the test of three steps.
BATCH, LENGTH = 8, 32
LEAVES = ("tokens", "targets", "weights", "segment_ids", "positions")


@pytest.fixture(scope="module")
def config(tiny_config: DecoderConfig) -> DecoderConfig:
    """Eight query heads share two kv heads: fewer than a tensor axis of eight."""
    attention = dataclasses.replace(tiny_config.attention, num_heads=8, num_kv_heads=2)
    return dataclasses.replace(tiny_config, attention=attention)


def batch_of(vocab_size: int, rows: int = BATCH) -> dict[str, np.ndarray]:
    """Rows of two documents and some padding."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(vocab_size, size=(rows, LENGTH + 1)).astype(np.int32)
    weights = rng.random((rows, LENGTH)).astype(np.float32)
    weights[:, -2:] = 0
    segments = np.repeat([[1, 2, 0]], [11, 19, 2], axis=1).repeat(rows, 0).astype(np.int32)
    positions = np.concatenate([np.arange(11), np.arange(19), [0, 0]])[None].repeat(rows, 0).astype(np.int32)
    return dict(zip(LEAVES, (tokens[:, :-1], tokens[:, 1:], weights, segments, positions), strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss_and_gradient(config: DecoderConfig, compute: Compute, params, batch):
    return jax.value_and_grad(lambda p: losses(p, batch, config, compute, z_loss=1e-3)[0][0][1])(params)


def on_mesh(config: DecoderConfig, compute: Compute, params: dict, batch: dict):
    """Loss and gradient on the current mesh, and the parameters as they lie there."""
    placed = {name: jax.device_put(params[name], a.sharding) for name, a in abstract_params(config).items()}
    batch = {name: shard(jnp.asarray(x), "batch", "sequence") for name, x in batch.items()}
    return *loss_and_gradient(config, compute, placed, batch), placed


COMPUTE = Compute(attention_kernel="blockwise", loss_chunk=5)


@pytest.fixture(scope="module")
def expected(config, random_params):
    """Of one device, by the plainest of everything."""
    plain = Compute(attention_kernel="reference", scan_layers=False, loss_chunk=LENGTH)
    return loss_and_gradient(config, plain, random_params(config), batch_of(config.vocab_size))


def assert_same(found, expected) -> None:
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-6)
    for name, value in expected[1].items():
        largest = float(jnp.abs(value).max())
        assert largest > 0
        np.testing.assert_allclose(np.asarray(found[1][name]), value, atol=1e-5 * largest, rtol=0, err_msg=name)


def expected_bytes(params: dict[str, jax.Array], sizes: dict[str, int]) -> float:
    """What a device holds of parameters that fsdp and tensor split wherever the table says and they divide."""
    fsdp, tensor = sizes.get("fsdp", 1), sizes.get("tensor", 1)
    total = 0.0
    for name, value in params.items():
        kv = "k_proj" in name or "v_proj" in name
        split = 1 if "norm" in name else fsdp * (1 if kv and tensor > 2 else tensor)
        total += value.nbytes / split
    return total


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_loss_and_gradient_are_those_of_one_device(name: str, config, random_params, expected):
    params = random_params(config)
    with jax.set_mesh(make_mesh(MESHES[name])):
        loss, gradient, placed = on_mesh(config, COMPUTE, params, batch_of(config.vocab_size))
        assert {k: v.sharding.spec for k, v in gradient.items()} == {k: v.sharding.spec for k, v in placed.items()}
    assert_same((loss, gradient), expected)
    held = sum(value.addressable_shards[0].data.nbytes for value in placed.values())
    assert held == expected_bytes(params, MESHES[name])


@pytest.mark.quick("fsdp, tensor and context")
@pytest.mark.parametrize("name", MESHES)
def test_the_form_for_tpus_is_the_same(name: str, config, random_params, expected, monkeypatch: pytest.MonkeyPatch):
    """Heads are dimensions of the products, pairs are turned by a permutation."""
    for module in (parameters, rope):
        monkeypatch.setattr(module, "platform", lambda: "tpu")
    # A function of its own: JAX would else find what it has traced of this one for a CPU.
    plain = loss_and_gradient.__wrapped__
    anew = jax.jit(lambda *args: plain(*args), static_argnums=(0, 1))
    monkeypatch.setitem(globals(), "loss_and_gradient", anew)
    with jax.set_mesh(make_mesh(MESHES[name])):
        loss, gradient, placed = on_mesh(config, COMPUTE, random_params(config), batch_of(config.vocab_size))
        assert {k: v.sharding.spec for k, v in gradient.items()} == {k: v.sharding.spec for k, v in placed.items()}
    assert_same((loss, gradient), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "remat"),
    [("fsdp, tensor and context", "full"), ("tensor", "full"), ("fsdp, tensor and context", "offload")],
)
def test_keys_gathered_and_remat(name: str, remat: Any, config, random_params, expected):
    with jax.set_mesh(make_mesh(MESHES[name])):
        compute = dataclasses.replace(COMPUTE, context="all_gather", remat=remat)
        assert_same(on_mesh(config, compute, random_params(config), batch_of(config.vocab_size))[:2], expected)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["tensor", "fsdp", "fsdp, tensor and context"])
def test_an_odd_vocabulary_and_one_row(name: str, tied: bool, config, random_params):
    """Neither 41 tokens nor one row can be split: both are whole on every device."""
    odd = dataclasses.replace(config, vocab_size=41, tie_embeddings=tied)
    params, batch = random_params(odd), batch_of(41, rows=1)
    expected = loss_and_gradient(odd, COMPUTE, params, batch)
    with jax.set_mesh(make_mesh(MESHES[name])):
        loss, gradient, placed = on_mesh(odd, COMPUTE, params, batch)
        embedding = placed["embedding.weight"].sharding
        assert embedding == NamedSharding(jax.sharding.get_mesh(), spec(None, "embed", shape=(41, 16)))
    assert_same((loss, gradient), expected)


@pytest.mark.quick("data and tensor", "fsdp and context", "fsdp, tensor and context")
@pytest.mark.parametrize("name", MESHES)
def test_activations_are_split(name: str, config):
    """The hidden states of the trunk: rows over data and fsdp, positions over context."""
    with jax.set_mesh(make_mesh(MESHES[name])):
        tokens = shard(jnp.asarray(batch_of(config.vocab_size)["tokens"]), "batch", "sequence")

        def outputs(params, tokens):
            model = assemble(config, params, COMPUTE)
            return model.trunk(tokens)[0], model(tokens)

        hidden, logits = jax.eval_shape(outputs, abstract_params(config), tokens)
        sizes = mesh_axis_sizes()
        parts = sizes["data"] * sizes["fsdp"] * sizes["context"]
        assert math.prod(hidden.sharding.shard_shape(hidden.shape)) * parts == math.prod(hidden.shape)
        assert math.prod(sizes[axis] for axes in axes_of(logits) for axis in axes) == 8, "split over every axis"


HYPER = AdamW(learning_rate=1e-2, warmup_steps=1).hyper(10)


def three_steps(config: DecoderConfig, accumulation_steps: int, params: dict, *, whole: bool):
    step = make_train_step(config, COMPUTE, accumulation_steps=accumulation_steps)
    state = jax.jit(init_state)(params, HYPER)
    losses = []
    for i in range(3):
        batch = batch_of(config.vocab_size)
        batch["tokens"] = np.roll(batch["tokens"], i, axis=0)
        placed = {k: jnp.asarray(x) if whole else shard(jnp.asarray(x), "batch", "sequence") for k, x in batch.items()}
        state, metrics = step(state, placed, HYPER)
        losses.append(float(metrics["loss"]))
    return losses, {k: np.asarray(v) for k, v in state.params.items()}


@pytest.fixture(scope="module")
def scanned(config) -> DecoderConfig:
    return dataclasses.replace(config, num_layers=2)


@pytest.fixture(scope="module")
def steps_of_one_device(scanned, random_params):
    return three_steps(scanned, 1, {k: jnp.copy(v) for k, v in random_params(scanned).items()}, whole=True)


@pytest.mark.quick("fsdp, tensor and context")
@pytest.mark.parametrize("name", ["data", "fsdp, tensor and context"])
def test_three_steps_are_those_of_one_device(name: str, scanned, random_params, steps_of_one_device):
    """With two layers in a scan."""
    losses, params = steps_of_one_device
    with jax.set_mesh(make_mesh(MESHES[name])):
        placed = {k: jax.device_put(random_params(scanned)[k], a.sharding) for k, a in abstract_params(scanned).items()}
        found, found_params = three_steps(scanned, 2 if name != "data" else 1, placed, whole=False)
    np.testing.assert_allclose(found, losses, rtol=2e-5)
    for key, value in params.items():
        # Adam divides by the gradient's own size: where that is near zero, rounding decides about a part of a step.
        np.testing.assert_allclose(found_params[key], value, atol=2e-3, err_msg=key)
        assert np.mean(np.abs(found_params[key] - value)) < 2e-6, key


def test_a_model_enters_its_own_mesh(config, random_params):
    params, tokens = random_params(config), jnp.asarray(batch_of(config.vocab_size)["tokens"])
    alone = from_params(config, params, Compute())(tokens)
    mesh = make_mesh(MESHES["fsdp, tensor and context"])
    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(params[name], a.sharding) for name, a in abstract_params(config).items()}
    logits = from_params(config, placed, Compute(), mesh)(tokens)
    assert len(logits.sharding.device_set) == 8
    np.testing.assert_allclose(np.asarray(logits), alone, atol=1e-5)
