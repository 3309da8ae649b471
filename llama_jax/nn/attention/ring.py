"""Caches of a sliding window: a ring of the last entries of each row, and the place of each.

The entry of place p is in slot p % R. `held` [B, R] is 1 + the place of a slot's entry, 0 where there is none, so that
an empty ring is all zeros. With R of the window and as many places more as are written at once, nothing that a query
attends to is overwritten, also where the last of these entries are written again (guesses that were wrong).
"""

import jax.numpy as jnp
from jaxtyping import Array, Int, Num

Cache = dict[str, Num[Array, "b ..."]]
HELD = "held"


def is_ring(cache: object) -> bool:
    """Return whether a layer's cache is a ring."""
    return isinstance(cache, dict) and HELD in cache


def places_of(ring: Cache) -> Int[Array, "b s"]:
    """Return the place of each slot's entry; of an empty slot one that no window reaches."""
    return jnp.where(ring[HELD] > 0, ring[HELD] - 1, jnp.iinfo(jnp.int32).min // 2)


def noted(ring: Cache, start: Int[Array, " b"], count: int) -> Int[Array, "b s"]:
    """Return what is `held` after `count` entries are written from the place `start` of each row on."""
    size = ring[HELD].shape[1]
    ahead = (jnp.arange(size) - start[:, None]) % size
    return jnp.where(ahead < count, 1 + start[:, None] + ahead, ring[HELD])


def ring_of(line: Cache, size: int, count: int | Array) -> Cache:
    """Return a ring of `size` with the last of the first `count` entries of a cache [1, K, S, H] by name."""
    last = count - 1
    places = last - (last - jnp.arange(size)) % size
    ring = {name: jnp.take(x, jnp.maximum(places, 0), axis=2, mode="clip") for name, x in line.items()}
    return ring | {HELD: jnp.maximum(places + 1, 0)[None]}


def line_of(ring: Cache, length: int) -> Cache:
    """Return the entries [1, K, `length`, H] of a ring of one row at their places, and zeros at the others."""
    places = jnp.arange(length)
    slots = places % ring[HELD].shape[1]
    there = (ring[HELD][0, slots] == places + 1)[:, None]
    return {name: jnp.where(there, jnp.take(x, slots, axis=2), 0) for name, x in ring.items() if name != HELD}
