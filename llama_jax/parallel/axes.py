"""Logical axes: what a dimension means, and which mesh axes split it.

Modules name dimensions, this table decides. Without a mesh (`jax.set_mesh` not entered) every function here does
nothing, so the same model code runs in a notebook on one device and on a pod.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp", "expert"),
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


def batch_parts(sizes: Mapping[str, int]) -> int:
    """Into how many parts a mesh of these sizes splits the batch."""
    return math.prod(sizes[axis] for axis in LOGICAL_AXES["batch"])


def mesh_axis_sizes() -> dict[str, int]:
    """Sizes of the current mesh's axes; empty without a mesh, and inside `shard_map`, where arrays are local parts."""
    mesh = jax.sharding.get_abstract_mesh()
    explicit = AxisType.Explicit
    return {
        name: mesh.shape[name] for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == explicit
    }


def split_over(name: str | None, size: int) -> tuple[str, ...]:
    """The mesh axes, larger than 1, that split a dimension of this size; () where it is whole."""
    sizes = mesh_axis_sizes()
    axes = tuple(axis for axis in LOGICAL_AXES[name] if sizes.get(axis, 1) > 1) if name else ()
    return () if size % math.prod(sizes[axis] for axis in axes) else axes


def axes_of(x: Any) -> tuple[tuple[str, ...], ...]:
    """The mesh axes, larger than 1, that split each dimension of an array (or of its abstract value)."""
    sizes = mesh_axis_sizes()
    entries = x.sharding.spec if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x).sharding.spec
    entries = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in entries]
    entries += [()] * (x.ndim - len(entries))
    return tuple(tuple(axis for axis in entry if sizes[axis] > 1) for entry in entries)


def platform() -> str:
    """What the computation is for: the platform of the current mesh (which need not exist here), or the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


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
