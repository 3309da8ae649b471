"""A step learns from rows of padding nothing: alone they change nothing, beside others they do not count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.models import Compute, DecoderConfig, MTPDecoderConfig
from llama_jax.nn import Experts, SoftmaxTopK, SparseLatentAttention
from llama_jax.training import AdamW, init_state, make_train_step

LENGTH, COMPUTE = 8, Compute(dtype="float32", loss_chunk=4)
HYPER = AdamW(learning_rate=0.01, warmup_steps=1, weight_decay=0.0, z_loss=0.1, label_smoothing=0.1).hyper(5)


@pytest.fixture(scope="module")
def config(tiny_config: DecoderConfig) -> MTPDecoderConfig:
    """With every loss that layers have."""
    shared = {f.name: getattr(tiny_config, f.name) for f in dataclasses.fields(DecoderConfig)}
    experts = Experts(
        4, 8, SoftmaxTopK(2, normalize=True), "silu", gated=True, capacity=3, load_balance_loss=0.1, router_z_loss=0.1
    )
    attention = SparseLatentAttention(
        num_heads=2, q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3, rope=None,
        eps=1e-6, num_index_heads=2, index_head_dim=4, index_topk=3, index_loss_weight=0.1,
    )  # fmt: skip
    changes = {"num_layers": 1, "attention": attention, "feed_forward": experts}
    return MTPDecoderConfig(**shared | changes, num_mtp_layers=1)


def batch_of(vocab_size: int, real: list[bool]) -> dict[str, jax.Array]:
    """Rows of one text each, the same few at those that are `real`, and of padding."""
    rng, count = np.random.default_rng(0), sum(real)
    tokens = rng.integers(vocab_size, size=(count, LENGTH + 1)).astype(np.int32)
    whole = np.ones((count, LENGTH), np.int32)
    texts = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": whole}
    texts |= {"weights": whole.astype(np.float32), "positions": np.cumsum(whole, 1, dtype=np.int32) - 1}
    batch = {name: np.zeros((len(real), LENGTH), x.dtype) for name, x in texts.items()}
    for name, x in texts.items():
        batch[name][np.array(real)] = x
    return {name: jnp.asarray(x) for name, x in batch.items()}


def step_of(config, params, real: list[bool], parts: int = 1):
    """Metrics and new parameters."""
    step = make_train_step(config, COMPUTE, accumulation_steps=parts)
    state = jax.jit(init_state)(jax.tree.map(jnp.array, params), HYPER)
    state, metrics = step(state, batch_of(config.vocab_size, real), HYPER)
    return jax.tree.map(np.asarray, metrics), jax.tree.map(np.asarray, state.params)


@pytest.mark.slow
def test_nothing_but_padding_changes_nothing(config, random_params):
    params = random_params(config)
    metrics, after = step_of(config, params, [False, False])
    zeros = {name for name, value in metrics.items() if not np.any(value)}
    assert zeros == set(metrics) - {"learning_rate", "num_targets"}
    for name, value in params.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("real", "parts"),
    [([True, False, True, True, False], 1), ([True, False, True, True, False, False], 2)],
    ids=["at once", "in unequal parts"],
)
def test_beside_others_it_does_not_count(config, random_params, real: list[bool], parts: int):
    params = random_params(config)
    expected, after = step_of(config, params, [True] * 3)
    metrics, found = step_of(config, params, real, parts)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    assert {"indexer_loss", "load_balance_loss", "router_z_loss", "mtp_1_loss"} < expected.keys()
    for name, value in after.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
