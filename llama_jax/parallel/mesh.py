"""The mesh, and logical axes: the meaning of a dimension, and the mesh axes that split it.

Modules name dimensions, the table `LOGICAL_AXES` decides. Without a mesh (`jax.set_mesh` not entered) every function of
the second half does nothing, so the same model code runs in a notebook on one device and on a pod.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, PartitionSpec

from llama_jax.config import UserError

MESH_AXES = ("pipeline", "data", "fsdp", "tensor", "context", "expert")
LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("pipeline", "data", "fsdp", "expert"),  # around the layers; within them a microbatch is on one stage
    "sequence": ("context",),
    # activations and parameters alike
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    # parameters only: the model dimension of a weight; gathered before use
    "embed": ("fsdp",),
    # the stacked layers of a parameter: on each stage its own
    "layers": ("pipeline",),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis; -1 (one axis at most) takes the devices that the others leave.

    pipeline: stages of layers, which pass microbatches on to the next one; all around them splits the batch over it.
    data: copies of the parameters; splits the batch.
    fsdp: splits the batch and the parameters.
    tensor: splits heads, feed-forward width and vocabulary.
    context: splits the sequence.
    expert: splits experts; all other layers split the batch over it.
    """

    pipeline: int = 1
    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise UserError(f"{axis}={size} must be at least 1, or -1 for the devices that are left")
        open_axes = [axis for axis, size in sizes.items() if size == -1]
        if len(open_axes) > 1:
            raise UserError(f"{open_axes[1]}=-1: {open_axes[0]} is -1 too, and only one axis can take what is left")

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Return axis sizes on `num_devices` devices, -1 filled in.

        Raises UserError when they do not multiply to that number.
        """
        sizes = dataclasses.asdict(self)
        fixed = math.prod(size for size in sizes.values() if size != -1)
        sizes = {axis: max(1, num_devices // fixed) if size == -1 else size for axis, size in sizes.items()}
        if math.prod(sizes.values()) != num_devices:
            shape = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "all axes 1"
            raise UserError(f"mesh ({shape}) takes {math.prod(sizes.values())} devices and there are {num_devices}")
        return sizes


def make_mesh(config: MeshConfig | dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh with explicit axes over `devices` (default: all).

    Between TPU slices run pipeline and data, or else fsdp; all other axes stay within one. Raises UserError when the
    sizes do not fit the devices or their slices.
    """
    if isinstance(config, dict):
        for axis in config.keys() - set(MESH_AXES):
            raise UserError(f"mesh axis '{axis}' does not exist: the axes are {', '.join(MESH_AXES)}")
        config = MeshConfig(**({"fsdp": 1} | config))
    devices = list(devices) if devices is not None else jax.devices()
    sizes = config.sizes(len(devices))
    return Mesh(_arrange(sizes, devices), tuple(sizes), axis_types=(AxisType.Explicit,) * len(sizes))


def _arrange(sizes: dict[str, int], devices: Sequence[Any]) -> np.ndarray:
    """Return the devices in the shape of the mesh, neighbours on an axis close to each other in the network."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        across = over_slices(sizes, slices)
        if across is None:
            raise UserError(
                f"mesh.pipeline={sizes['pipeline']}, mesh.data={sizes['data']} and mesh.fsdp={sizes['fsdp']} do not "
                f"fit {slices} slices, from one to another of which only these axes can run: make one of them a "
                f"multiple of {slices}"
            )
        within = [size // across[axis] for axis, size in sizes.items()]
        make = functools.partial(create_hybrid_device_mesh, within, tuple(across.values()), devices)
    else:
        make = functools.partial(create_device_mesh, tuple(sizes.values()), devices)
    try:
        return make()
    except NotImplementedError:  # no side of the torus has an axis's size: an axis then runs along a part of one
        return make(allow_split_physical_axes=True)


def over_slices(sizes: Mapping[str, int], num_slices: int) -> dict[str, int] | None:
    """Return how many of the slices each axis spans: all that pipeline can, then data or else fsdp the rest.

    Returns None where they do not fit.
    """
    stages = math.gcd(sizes.get("pipeline", 1), num_slices)
    rest = num_slices // stages
    outer = next((axis for axis in ("data", "fsdp") if sizes.get(axis, 1) % rest == 0), None)
    return None if outer is None else dict.fromkeys(sizes, 1) | {outer: rest, "pipeline": stages}


def batch_parts(sizes: Mapping[str, int]) -> int:
    """Return the number of parts into which a mesh of these sizes splits the batch."""
    return math.prod(sizes[axis] for axis in LOGICAL_AXES["batch"])


def mesh_axis_sizes() -> dict[str, int]:
    """Return the sizes of the current mesh's axes.

    It is empty without a mesh, and inside `shard_map`, where arrays are local parts.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Explicit}


def split_over(name: str | None, size: int) -> tuple[str, ...]:
    """Return the mesh axes, larger than 1, that split a dimension of this size; () where it is whole."""
    return _dividing(mesh_axis_sizes(), name, size)


def _dividing(sizes: Mapping[str, int], name: str | None, size: int) -> tuple[str, ...]:
    axes = tuple(axis for axis in LOGICAL_AXES[name] if sizes.get(axis, 1) > 1) if name else ()
    return () if size % math.prod(sizes[axis] for axis in axes) else axes


def axes_of(x: jax.Array | jax.ShapeDtypeStruct) -> tuple[tuple[str, ...], ...]:
    """Return the mesh axes, larger than 1, that split each dimension of an array (or of its abstract value)."""
    sizes = mesh_axis_sizes()
    partition: Iterable[str | tuple[str, ...] | None] = (
        x.sharding.spec if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x).sharding.spec
    )
    entries = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in partition]
    entries += [()] * (x.ndim - len(entries))
    return tuple(tuple(axis for axis in entry if sizes[axis] > 1) for entry in entries)


def platform() -> str:
    """Return the platform of the current mesh, whose devices need not exist here, or the default one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def spec(*names: str | None, shape: Sequence[int] | None = None) -> PartitionSpec | None:
    """Return the partition spec of an array with these logical axes; None without a mesh.

    With `shape`, a dimension that its mesh axes do not divide is replicated. Raises ValueError when two dimensions have
    one mesh axis.
    """
    sizes = mesh_axis_sizes()
    if not sizes:
        return None
    taken: dict[str, str] = {}
    entries: list[tuple[str, ...] | None] = []
    for i, name in enumerate(names):
        axes = _dividing(sizes, name, 0 if shape is None else shape[i])  # every number divides 0
        for axis in axes:
            if axis in taken:
                raise ValueError(f"dimensions '{taken[axis]}' and '{name}' of one array both map to mesh axis '{axis}'")
            taken[axis] = str(name)
        entries.append(axes or None)
    return PartitionSpec(*entries)


def fitting(name: str | None, size: int) -> str | None:
    """Return `name` where its mesh axes divide a dimension of this size, else None: the dimension stays whole."""
    sizes = mesh_axis_sizes()
    split = math.prod(sizes.get(axis, 1) for axis in LOGICAL_AXES[name]) if name else 1
    return None if size % split else name


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """Return `x` with its dimensions split by their logical axes."""
    partition = spec(*names, shape=x.shape)
    return x if partition is None else jax.sharding.reshard(x, partition)


def replicate(x: jax.Array) -> jax.Array:
    """Return `x`, whole on every device."""
    return shard(x, *(None,) * x.ndim)


def einsum(subscripts: str, *operands: jax.Array, out: Sequence[str | None]) -> jax.Array:
    """Compute `jnp.einsum`; the result's dimensions have the logical axes `out`."""
    terms, result = subscripts.replace(" ", "").split("->")
    sizes = {
        letter: size
        for term, operand in zip(terms.split(","), operands, strict=True)
        for letter, size in zip(term, operand.shape, strict=True)
    }
    partition = spec(*out, shape=[sizes[letter] for letter in result])
    return jnp.einsum(subscripts, *operands, out_sharding=partition)


def split_layers(x: jax.Array, *, whole: bool = False) -> jax.Array:
    """Return stacked parameters [L, ...], each stage of the pipeline with its own layers, or every device with all."""
    if mesh_axis_sizes().get("pipeline", 1) == 1:
        return x
    first = () if whole else split_over("layers", x.shape[0])
    return jax.sharding.reshard(x, PartitionSpec(first or None, *jax.typeof(x).sharding.spec[1:]))


def reshape(x: jax.Array, shape: Sequence[int], *names: str | None) -> jax.Array:
    """Compute `x.reshape(shape)`; the result's dimensions have these logical axes."""
    return jnp.reshape(x, shape, out_sharding=spec(*names, shape=shape))
