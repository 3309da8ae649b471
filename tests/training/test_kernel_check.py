"""A kernel that does not do what the mask says is caught before the first step."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.models import Compute, DecoderConfig
from llama_jax.nn.attention import attend as kernels
from llama_jax.parallel import make_mesh, shard
from llama_jax.training import kernel_check as module
from llama_jax.training.kernel_check import PreflightFailed, attention_calls, preflight

COMPUTE = Compute(attention_kernel="blockwise")


def batch_of(rows: int = 8, length: int = 32) -> dict[str, jax.Array]:
    """One document a row: that documents are kept apart must be found out all the same."""
    ones = jnp.ones((rows, length), jnp.int32)
    batch = {"tokens": ones, "segment_ids": ones, "positions": jnp.broadcast_to(jnp.arange(length), ones.shape)}
    batch |= {"targets": ones, "weights": ones.astype(jnp.float32)}
    return {name: shard(x, "batch", "sequence") for name, x in batch.items()}


def wrong(change, **fields):
    """The blockwise kernel with its mask changed before it looks at it."""

    def run(q, k, v, mask, *, scale):
        return (
            kernels.blockwise_attention(q, k, v, dataclasses.replace(mask, **fields), scale=scale)
            if fields
            else change(q, k, v, mask, scale)
        )

    return kernels.Kernel(run)


def no_gradient_of_keys(q, k, v, mask, scale):
    return kernels.blockwise_attention(q, jax.lax.stop_gradient(k), v, mask, scale=scale)


MISTAKES = {
    "ignores segment ids": wrong(None, segment_ids=None),
    "is not causal": wrong(None, causal=False),
    "sees eight keys at most": wrong(None, window=8),
    "has no gradient of the keys": wrong(no_gradient_of_keys),
    "scales wrongly": wrong(
        lambda q, k, v, mask, scale: kernels.blockwise_attention(q, k, v, mask, scale=1.001 * scale)
    ),
}


@pytest.mark.quick("one device-scales wrongly")
@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("mesh", [None, {"fsdp": 4, "tensor": 2}], ids=["one device", "mesh"])
def test_a_wrong_kernel_is_refused(mistake: str, mesh, tiny_config: DecoderConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(kernels.KERNELS, "blockwise", MISTAKES[mistake])
    sentence = r"'blockwise' disagrees with the reference: the (result|gradient of)"
    devices = jax.devices()[: 8 if mesh else 1]
    with jax.set_mesh(make_mesh(mesh or {"data": 1}, devices)), pytest.raises(PreflightFailed, match=sentence):
        preflight(tiny_config, COMPUTE, batch_of())


@pytest.mark.slow
def test_a_kernel_that_forgets_sinks_is_refused(tiny_config: DecoderConfig, monkeypatch: pytest.MonkeyPatch):
    config = dataclasses.replace(tiny_config, attention=dataclasses.replace(tiny_config.attention, sinks=True))
    (agreement,) = preflight(config, COMPUTE, batch_of())
    assert len(agreement.errors) == 4
    forgets = lambda q, k, v, mask, sinks, *, scale: kernels.blockwise_attention(q, k, v, mask, scale=scale)  # noqa: E731
    monkeypatch.setitem(kernels.KERNELS, "blockwise", kernels.Kernel(forgets))
    with pytest.raises(PreflightFailed, match="'blockwise' disagrees with the reference"):
        preflight(config, COMPUTE, batch_of())


ONE_DEVICE, MESH = {"data": 1}, {"fsdp": 2, "tensor": 2, "context": 2}
RIGHT = list(itertools.product(("blockwise", "splash"), ("float32", "bfloat16"), (ONE_DEVICE, MESH)))


@pytest.mark.quick("splash-bfloat16-{'data': 1}")
@pytest.mark.parametrize(("kernel", "dtype", "mesh"), RIGHT, ids=str)
def test_a_right_kernel_passes(kernel: str, dtype: str, mesh: dict[str, int], tiny_config: DecoderConfig):
    length = 256 if kernel == "splash" and "context" in mesh else 128
    count = int(np.prod(list(mesh.values())))
    with jax.set_mesh(make_mesh(mesh, jax.devices()[:count])):
        method = "all_gather" if kernel == "splash" else "ring"
        compute = Compute(attention_kernel=kernel, dtype=dtype, context=method)  # type: ignore[arg-type]
        config = dataclasses.replace(tiny_config, max_positions=length)
        (agreement,) = preflight(config, compute, batch_of(4, length))
    assert agreement.kernel == kernel
    assert len(agreement.errors) == 4
    assert all(error > 0 for error in agreement.errors.values()), "the same program twice shows nothing"


@pytest.mark.slow
def test_the_reference_goes_by_blocks_where_it_would_not_fit(tiny_config: DecoderConfig, monkeypatch):
    """With a prefix, which is split into blocks as the documents are."""
    ones = jnp.ones((2, 64), jnp.int32)
    masks = {"segment_ids": ones, "prefix": ones.at[:, 9:].set(0)}

    def compiled() -> Any:
        (call,) = attention_calls(tiny_config, COMPUTE, batch_of(2, 64) | {"prefix": ones})
        return jax.jit(functools.partial(module._errors, call, "blockwise")).lower(masks).compile()

    whole = compiled()
    monkeypatch.setattr(module, "SCORES", 64 * 4)
    by_blocks = compiled()
    assert by_blocks.memory_analysis().temp_size_in_bytes < whole.memory_analysis().temp_size_in_bytes
    errors = by_blocks(masks)
    assert len(errors) == 4
    assert max(float(error) for error in errors.values()) < 1e-5


def test_each_kind_of_attention_is_looked_at_once(tiny_config: DecoderConfig):
    assert len(attention_calls(tiny_config, COMPUTE, batch_of())) == 1
    assert preflight(tiny_config, Compute(attention_kernel="reference"), batch_of()) == []
