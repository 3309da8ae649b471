"""Writing into a cache of keys, values or whatever else an attention keeps of every token: [B, K, S, H] each."""

import jax
from jaxtyping import Array, Float, Int

Cache = dict[str, Float[Array, "b k s _"]]


def write(cache: Cache, new: dict[str, Float[Array, "b k t _"]], start: Int[Array, " b"]) -> Cache:
    """The cache with each row's new entries at its own place `start`."""
    written = {name: _write(cache[name], x.astype(cache[name].dtype), start) for name, x in new.items()}
    # Without it XLA:CPU writes once more inside what reads the cache, and copies the whole cache for that.
    return jax.lax.optimization_barrier(written)


def _write(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Per-row slices, which need no communication on a mesh."""
    if cache.shape[0] == 1:  # one slice is written in place; XLA:CPU copies what it scatters into
        return jax.lax.dynamic_update_slice_in_dim(cache, new, start[0], axis=2)
    place = jax.vmap(lambda row, new_row, at: jax.lax.dynamic_update_slice_in_dim(row, new_row, at, axis=1))
    return place(cache, new, start)
