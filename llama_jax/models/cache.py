"""Sizes of the caches that decoding keeps: keys and values, latents, or the states of recurrent networks."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from llama_jax.config import UserError
from llama_jax.models.config import ModelConfig
from llama_jax.nn import Mixer, PyTree


def cache_shapes(
    config: ModelConfig, length: int, batch_size: int = 1, dtype: DTypeLike = "bfloat16", room: int | None = None
) -> list[PyTree]:
    """Return the abstract cache of every layer that decodes, for `batch_size` rows of `length` positions.

    With `room` layers with a window keep only it, and room for so many tokens. They have the shardings of the current
    mesh. Nothing is allocated. Raises UserError where a layer has no cache.
    """
    mesh = jax.sharding.get_abstract_mesh()
    dtype = jnp.dtype(dtype)
    return [
        _shapes(mixer, config.hidden_size, length, batch_size, dtype, room, mesh)
        for mixer, _ in config.stacks()["layers"]
    ]


@functools.lru_cache(1024)
def _shapes(
    mixer: Mixer, width: int, length: int, batch_size: int, dtype: np.dtype, room: int | None, mesh: Any
) -> PyTree:
    """Return the abstract cache of one layer on the current mesh."""

    def make() -> PyTree:
        module = mixer.build(width, rngs=nnx.Rngs(params=0))
        if room is not None:
            return module.init_window(batch_size, length, dtype, room)
        return module.init_cache(batch_size, length, dtype)

    try:
        return jax.eval_shape(make)
    except NotImplementedError:
        raise UserError(f"attention={type(mixer).__name__} has no init_cache, so it cannot decode") from None


def cache_bytes(config: ModelConfig, length: int, batch_size: int = 1, dtype: DTypeLike = "bfloat16") -> int:
    """Return the exact bytes of all layers' caches, on all devices, for `batch_size` rows of `length` positions.

    `dtype` is the type of activations, in which keys, values and latents are kept; recurrent states are float32. Layers
    with a window keep one position more than it, as the rows of a batch that is continued do. Of an encoder-decoder it
    is the decoder's own tokens, without the keys of the source. Nothing is allocated.

    Raises UserError for a model that cannot continue a text.
    """
    if not config.generates:
        raise UserError(f"{type(config).__name__} keeps no cache: it cannot continue a text")
    for name, value in (("length", length), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):  # whole, on whatever mesh
        windows = getattr(config, "position_bias", None) is None and not config.has_source
        return sum(map(nbytes, cache_shapes(config, length, batch_size, dtype, 1 if windows else None)))


def cache_bytes_per_token(config: ModelConfig, dtype: DTypeLike = "bfloat16") -> int:
    """Return the bytes that one more position of a row takes, as `cache_bytes` has them; 0 for recurrent states."""
    return cache_bytes(config, 2, 1, dtype) - cache_bytes(config, 1, 1, dtype)


def nbytes(cache: PyTree) -> int:
    """Return the bytes of the arrays, or abstract arrays, of a tree."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(cache))
