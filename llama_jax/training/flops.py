"""FLOPs of a train step and the peak of a device, for the model FLOPs utilisation (MFU)."""

import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.chips import peak_of
from llama_jax.models import ModelConfig, abstract_params, buffers, frozen
from llama_jax.training.matrices import is_matrix


def train_flops_per_token(config: ModelConfig, sequence_length: int, source_length: int = 0) -> float:
    """Return the FLOPs of the matrix products of a token's forward and backward pass, as the mean over a row.

    6 for each parameter of a matrix that a token is multiplied with, 4 where it is frozen: not the tables, not the
    experts that it is not routed to, the embedding only where it is the head. Causal attention scores count half, since
    half of them are needed, and recomputation does not count (Chowdhery et al. 2022, appendix B, halved). A row with a
    source has both.
    """
    matrices = {
        name: math.prod(p.shape)
        for name, p in abstract_params(config).items()
        if is_matrix(name, p) and name not in buffers(config)
    }
    fixed = frozen(config)
    products = sum(
        (4 if name in fixed else 6) * size * config.tokens_of(name, sequence_length, source_length)
        for name, size in matrices.items()
    )
    for stack, layers in config.stacks().items():
        tokens = config.tokens_of(f"{stack}.feed_forward", sequence_length, source_length)
        idle = sum(piece.idle_parameters(config.hidden_size) for _, piece in layers if piece is not None)
        products -= (6 if config.adapters is None else 4) * idle * tokens
    scores = config.score_flops(sequence_length, source_length)
    return (products + 3 * scores) / (sequence_length + source_length)


def peak_flops(device: Any, dtype: np.dtype) -> float | None:
    """Return the FLOP/s that a device can reach, or None where they are not known.

    In bfloat16 on an accelerator, the maker's figure for exactly this `device_kind`; measured on CPUs and in other
    types.
    """
    if dtype == jnp.bfloat16 and device.platform != "cpu":
        return peak_of(device.device_kind)
    return _measured_peak(device, jnp.dtype(dtype).name)


@functools.cache
def _measured_peak(device: Any, dtype: str, size: int = 1536, repeats: int = 5) -> float:
    """Return the FLOP/s of the fastest of a few square products, divided by the devices that share a host's cores."""
    product = jax.jit(lambda a: a @ a)
    seconds: list[float] = []
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=[device])):
        a = jnp.ones((size, size), dtype)
        product(a).block_until_ready()
        for _ in range(repeats):
            start = time.perf_counter()
            product(a).block_until_ready()
            seconds.append(time.perf_counter() - start)
    sharing = jax.local_device_count() if device.platform == "cpu" else 1
    return 2 * size**3 / min(seconds) / sharing
