"""Eight devices compute what one computes, and hold an eighth of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llama_jax.models import Compute, DecoderConfig, abstract_params, assemble, from_params
from llama_jax.parallel import make_mesh, shard, spec

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "context": {"context": 8},
    "combined": {"data": 1, "fsdp": 2, "tensor": 2, "context": 2},
}


@pytest.fixture(scope="module")
def config(tiny_config: DecoderConfig) -> DecoderConfig:
    """Eight query heads share two kv heads: fewer than a tensor axis of eight."""
    attention = dataclasses.replace(tiny_config.attention, num_heads=8, num_kv_heads=2)
    return dataclasses.replace(tiny_config, attention=attention)


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss_and_gradient(config: DecoderConfig, kernel: str, params, inputs, targets, segment_ids, positions):
    def loss(params):
        model = assemble(config, params, Compute(attention_kernel=kernel))
        logits = model(inputs, segment_ids=segment_ids, positions=positions)
        # No gather along the vocabulary, which is split.
        right = jnp.where(jnp.arange(config.vocab_size) == targets[..., None], logits, 0).sum(-1)
        return (jax.nn.logsumexp(logits, -1) - right).mean()

    return jax.value_and_grad(loss)(params)


def batch_of(config: DecoderConfig) -> list[np.ndarray]:
    """inputs, targets, segment_ids, positions [8, 16]: rows of two documents."""
    tokens = np.random.default_rng(1).integers(config.vocab_size, size=(8, 17)).astype(np.int32)
    segments = np.repeat([[0, 1]], [5, 11], axis=1).repeat(8, 0)
    positions = np.concatenate([np.arange(5), np.arange(11)])[None].repeat(8, 0)
    return [tokens[:, :-1], tokens[:, 1:], segments, positions]


def on_mesh(config: DecoderConfig, params: dict, kernel: str = "reference"):
    """Loss and gradient on the current mesh, and the parameters as they lie there."""
    placed = {name: jax.device_put(params[name], a.sharding) for name, a in abstract_params(config).items()}
    batch = [shard(jnp.asarray(x), "batch", "sequence") for x in batch_of(config)]
    return *loss_and_gradient(config, kernel, placed, *batch), placed


@pytest.fixture(scope="module")
def expected(config, random_params):
    return loss_and_gradient(config, "reference", random_params(config), *map(jnp.asarray, batch_of(config)))


def assert_same(found, expected) -> None:
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-6)
    for name, value in expected[1].items():
        np.testing.assert_allclose(np.asarray(found[1][name]), value, atol=2e-6, rtol=1e-4, err_msg=name)


def bytes_on_first_device(params: dict[str, jax.Array]) -> int:
    return sum(value.addressable_shards[0].data.nbytes for value in params.values())


@pytest.mark.parametrize("name", MESHES)
def test_loss_and_gradient_are_those_of_one_device(name: str, config, random_params, expected):
    params = random_params(config)
    with jax.set_mesh(make_mesh(MESHES[name])):
        loss, gradient, placed = on_mesh(config, params)
        assert {k: v.sharding.spec for k, v in gradient.items()} == {k: v.sharding.spec for k, v in placed.items()}
    assert_same((loss, gradient), expected)
    total = sum(value.nbytes for value in params.values())
    norms = sum(value.nbytes for k, value in params.items() if "norm" in k)
    held = bytes_on_first_device(placed)
    if name in ("data", "context"):
        assert held == total
    elif name == "tensor":
        # Two kv heads cannot be split in eight: they are whole on every device.
        whole = norms + sum(value.nbytes for k, value in params.items() if "k_proj" in k or "v_proj" in k)
        assert held == whole + (total - whole) / 8
    else:
        assert held == norms + (total - norms) / (8 if name == "fsdp" else 4)


def test_an_odd_vocabulary_and_blockwise_attention(config, random_params):
    odd = dataclasses.replace(config, vocab_size=41)
    params = random_params(odd)
    expected = loss_and_gradient(odd, "reference", params, *map(jnp.asarray, batch_of(odd)))
    with jax.set_mesh(make_mesh(MESHES["combined"])):
        loss, gradient, placed = on_mesh(odd, params, "blockwise")
        assert placed["embedding.weight"].sharding == NamedSharding(jax.sharding.get_mesh(), spec(None, "embed"))
    assert_same((loss, gradient), expected)


def test_a_model_enters_its_own_mesh(config, random_params):
    params, tokens = random_params(config), jnp.asarray(batch_of(config)[0])
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(params[name], a.sharding) for name, a in abstract_params(config).items()}
    logits = from_params(config, placed, Compute(), mesh)(tokens)
    assert len(logits.sharding.device_set) == 8
    alone = from_params(config, params, Compute())(tokens)
    np.testing.assert_allclose(np.asarray(logits), alone, atol=1e-5)
