"""Batches with a prefix or a source: one row, on every mesh the same, and nothing of it where there is none."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax.models import Compute, DecoderConfig, abstract_params, assemble
from llama_jax.nn.attention import attend as kernels
from llama_jax.parallel import make_mesh, shard
from llama_jax.training import AdamW, init_state, make_train_step
from llama_jax.training.kernel_check import PreflightFailed, preflight
from llama_jax.training.losses import cross_entropy
from llama_jax.training.step import losses, model_batch

ROWS, LENGTH, SOURCE_LENGTH = 4, 20, 12


def batch_of(kind: str, vocab_size: int = 40) -> dict[str, np.ndarray]:
    """Rows of two documents and padding."""
    rng = np.random.default_rng(0)

    def stream(sizes: list[int]) -> dict[str, np.ndarray]:
        segments = np.repeat([1, 2, 0], sizes)
        positions = np.concatenate([np.arange(sizes[0]), np.arange(sizes[1]), np.zeros(sizes[2])])
        tokens = rng.integers(vocab_size, size=(ROWS, sum(sizes)))
        rows = {"segment_ids": segments, "positions": positions}
        rows = {name: np.tile(x, (ROWS, 1)) for name, x in rows.items()} | {"tokens": tokens}
        return {name: x.astype(np.int32) for name, x in rows.items()}

    batch = stream([7, 9, 4])
    targets = rng.integers(vocab_size, size=(ROWS, LENGTH)).astype(np.int32)
    batch |= {"targets": targets, "weights": (batch["segment_ids"] > 0).astype(np.float32)}
    if kind == "prefix":
        batch["prefix"] = ((batch["positions"] < 4) & (batch["segment_ids"] > 0)).astype(np.int32)
    if kind == "source":
        batch |= {f"source_{name}": x for name, x in stream([5, 6, 1]).items()}
    return batch


def test_a_source_and_its_target_in_one_row(tiny_config):
    batch = {
        "tokens": [[10, 11, 12, 0]], "targets": [[11, 12, 13, 0]], "weights": [[1.0, 1.0, 0.5, 0.0]],
        "segment_ids": [[1, 2, 2, 0]], "positions": [[0, 0, 1, 0]], "token_types": [[7, 7, 7, 7]],
        "source_tokens": [[20, 21, 22, 0]], "source_segment_ids": [[1, 1, 2, 0]], "source_positions": [[0, 1, 0, 0]],
    }  # fmt: skip
    row = model_batch({name: jnp.asarray(x) for name, x in batch.items()}, tiny_config)
    assert {name: x.tolist() for name, x in row.items()} == {
        "tokens": [[20, 21, 22, 0, 10, 11, 12, 0]],
        "targets": [[0, 0, 0, 0, 11, 12, 13, 0]],
        "weights": [[0, 0, 0, 0, 1, 1, 0.5, 0]],
        "segment_ids": [[1, 1, 2, 0, 1, 2, 2, 0]],
        "positions": [[0, 1, 0, 0, 2, 1, 2, 0]],
        "prefix": [[1, 1, 1, 0, 0, 0, 0, 0]],
    }


def test_one_pair_in_a_row_is_a_prefix_language_model(two_layers: DecoderConfig, random_params: Any):
    """Without padding between them source and target are one text with a prefix, as a prompt and its answer are.

    In two layers: the first reads of a source what it is, and no target sees less of it without the prefix.
    """
    params, rng = random_params(two_layers), np.random.default_rng(0)
    text = rng.integers(40, size=(1, 11)).astype(np.int32)
    whole = np.ones_like(text)
    batch = {"tokens": text[:, 5:], "targets": text[:, 5:], "weights": np.ones((1, 6), np.float32)}
    batch |= {"segment_ids": whole[:, 5:], "positions": np.arange(6)[None].astype(np.int32)}
    batch |= {"source_tokens": text[:, :5], "source_segment_ids": whole[:, :5]}
    batch |= {"source_positions": np.arange(5)[None].astype(np.int32)}

    @jax.jit
    def run(params: Any, batch: Any) -> tuple[jax.Array, ...]:
        model = assemble(two_layers, params, Compute())
        ((_, loss, _),), _ = losses(params, batch, two_layers, Compute())
        tokens = jnp.asarray(text)
        return loss, model(tokens), model(tokens, prefix=(jnp.arange(11) < 5)[None].astype(jnp.int32))

    loss, causal, logits = (np.asarray(x) for x in run(params, batch))
    assert np.abs(logits - causal)[:, 5:].max() > 0.1, "the prefix has to matter"
    scores = logits[:, 5:] - np.log(np.exp(logits[:, 5:]).sum(-1, keepdims=True))
    expected = -np.take_along_axis(scores, text[:, 5:, None], -1).sum()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


# A decoder joins a source before its target as a prefix.
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prefix", "source"])
def test_a_step_on_a_mesh_and_in_parts_is_that_of_one_device(kind: str, tiny_config, random_params):
    params, batch = random_params(tiny_config), batch_of(kind)

    @jax.jit
    def plain(params, batch):
        compute = Compute(attention_kernel="reference")
        loss = lambda p: losses(p, batch, tiny_config, compute, z_loss=0.0)[0][0][1] / batch["weights"].sum()  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(params)
        return value, optax.tree.norm(gradient)

    hyper = AdamW(learning_rate=0.01, warmup_steps=1).hyper(5)
    with jax.set_mesh(make_mesh({"fsdp": 2, "tensor": 2, "context": 2})):
        placed = {name: jax.device_put(params[name], a.sharding) for name, a in abstract_params(tiny_config).items()}
        rows = {name: shard(jnp.asarray(x), "batch", "sequence") for name, x in batch.items()}
        step = make_train_step(tiny_config, Compute(loss_chunk=7), accumulation_steps=2)
        _, found = step(jax.jit(init_state)(placed, hyper), rows, hyper)
    expected = plain(params, batch)
    assert float(found["loss"]) == pytest.approx(float(expected[0]), rel=1e-5)
    assert float(found["grad_norm"]) == pytest.approx(float(expected[1]), rel=1e-4)
    assert found["num_targets"] == 64


def test_a_batch_without_either_is_the_plain_program(tiny_config: DecoderConfig, random_params: Any):
    params = random_params(tiny_config)
    batch = {name: jnp.asarray(x) for name, x in batch_of("causal").items()}
    compute = Compute(attention_kernel="blockwise")

    def ours(params, batch):
        return losses(params, batch, tiny_config, compute, z_loss=0.1)[0][0][1]

    def plain(params, batch):
        model = assemble(tiny_config, params, compute)
        hidden, _ = model.trunk(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
        arrays = hidden, batch["targets"], batch["weights"]
        return cross_entropy(model.head, model.head_weight(), *arrays, z_loss=0.1, chunk=compute.loss_chunk)[0]

    def program(function, batch) -> str:
        text = jax.jit(function).lower(params, batch).as_text()
        return text.replace("jit_ours", "").replace("jit_plain", "")

    assert program(ours, batch) == program(plain, batch)
    prefix = {"prefix": jnp.asarray(batch_of("prefix")["prefix"])}
    assert program(ours, batch | prefix) != program(plain, batch)


COMPUTE = Compute(attention_kernel="blockwise")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prefix", "source"])
def test_a_kernel_that_forgets_the_prefix_is_refused(kind: str, tiny_config, monkeypatch: pytest.MonkeyPatch):
    batch = {name: jnp.asarray(x) for name, x in batch_of(kind).items()}
    (agreement,) = preflight(tiny_config, COMPUTE, batch)
    assert agreement.kernel == "blockwise"
    assert 0 < max(agreement.errors.values()) < 1e-5

    def forgets(q, k, v, mask, *, scale):
        return kernels.blockwise_attention(q, k, v, dataclasses.replace(mask, prefix=None), scale=scale)

    monkeypatch.setitem(kernels.KERNELS, "blockwise", kernels.Kernel(forgets))
    with pytest.raises(PreflightFailed, match="'blockwise' disagrees with the reference"):
        preflight(tiny_config, COMPUTE, batch)
