"""Logical axes: what a dimension means, and which mesh axes split it.

Modules name dimensions, this table decides. Without a mesh (`jax.set_mesh` not entered) every function here does
nothing, so the same model code runs in a notebook on one device and on a pod.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),
    "sequence": ("context",),
    # activations and parameters alike
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    # parameters only: the model dimension of a weight; gathered before use
    "embed": ("fsdp",),
}


def mesh_axis_sizes() -> dict[str, int]:
    """Sizes of the current mesh's axes; empty without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty else dict(mesh.shape)


def spec(*names: str | None, shape: Sequence[int] | None = None) -> PartitionSpec | None:
    """The partition spec of an array whose dimensions carry these logical names; None without a mesh.

    With `shape`, a dimension that its mesh axes do not divide is replicated. Raises ValueError when two dimensions land
    on one mesh axis.
    """
    sizes = mesh_axis_sizes()
    if not sizes:
        return None
    taken: dict[str, str] = {}
    entries: list[tuple[str, ...] | None] = []
    for i, name in enumerate(names):
        axes = tuple(axis for axis in LOGICAL_AXES[name] if sizes.get(axis, 1) > 1) if name else ()
        if shape is not None and shape[i] % math.prod(sizes[axis] for axis in axes):
            axes = ()
        for axis in axes:
            if axis in taken:
                raise ValueError(f"dimensions '{taken[axis]}' and '{name}' of one array both map to mesh axis '{axis}'")
            taken[axis] = str(name)
        entries.append(axes or None)
    return PartitionSpec(*entries)


def fitting(name: str | None, size: int) -> str | None:
    """`name` where its mesh axes divide a dimension of this size, else None: the dimension stays whole."""
    sizes = mesh_axis_sizes()
    split = math.prod(sizes.get(axis, 1) for axis in LOGICAL_AXES[name]) if name else 1
    return None if size % split else name


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` with its dimensions split as their logical names say."""
    partition = spec(*names, shape=x.shape)
    return x if partition is None else jax.sharding.reshard(x, partition)


def replicate(x: jax.Array) -> jax.Array:
    """`x`, whole on every device."""
    return shard(x, *(None,) * x.ndim)


def einsum(subscripts: str, *operands: jax.Array, out: Sequence[str | None]) -> jax.Array:
    """`jnp.einsum` whose result's dimensions carry the logical names `out`."""
    letters = subscripts.replace(" ", "").split("->")
    sizes = {
        letter: size
        for term, operand in zip(letters[0].split(","), operands, strict=True)
        for letter, size in zip(term, operand.shape, strict=True)
    }
    partition = spec(*out, shape=[sizes[letter] for letter in letters[1]])
    return jnp.einsum(subscripts, *operands, out_sharding=partition)


def reshape(x: jax.Array, shape: Sequence[int], *names: str | None) -> jax.Array:
    """`x.reshape(shape)` whose dimensions carry these logical names."""
    return jnp.reshape(x, shape, out_sharding=spec(*names, shape=shape))
