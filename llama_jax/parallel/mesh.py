"""The mesh of a run."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh

from llama_jax.config import UserError

MESH_AXES = ("data", "fsdp", "tensor", "context", "expert")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each mesh axis spans; -1 (one axis at most) takes what the others leave.

    data: copies of the parameters; splits the batch.
    fsdp: splits the batch and the parameters.
    tensor: splits heads, feed-forward width and vocabulary.
    context: splits the sequence.
    expert: splits experts; all other layers split the batch over it.
    """

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
        """Axis sizes on `num_devices` devices, -1 filled in. Raises UserError when they do not multiply to it."""
        sizes = dataclasses.asdict(self)
        fixed = math.prod(size for size in sizes.values() if size != -1)
        for axis, size in sizes.items():
            if size == -1:
                sizes[axis] = max(1, num_devices // fixed)
        if math.prod(sizes.values()) != num_devices:
            shape = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "all axes 1"
            raise UserError(f"mesh ({shape}) takes {math.prod(sizes.values())} devices and there are {num_devices}")
        return sizes


def make_mesh(config: MeshConfig | dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with explicit axes over `devices` (default: all).

    Of several TPU slices the data axis, or else fsdp, runs from slice to slice; all other axes stay within one. Raises
    UserError when the sizes do not fit the devices or their slices.
    """
    if isinstance(config, dict):
        for axis in config.keys() - set(MESH_AXES):
            raise UserError(f"mesh axis '{axis}' does not exist: the axes are {', '.join(MESH_AXES)}")
        config = MeshConfig(**({"fsdp": 1} | config))
    devices = list(devices) if devices is not None else jax.devices()
    sizes = config.sizes(len(devices))
    return Mesh(_arrange(sizes, devices), tuple(sizes), axis_types=(AxisType.Explicit,) * len(sizes))


def _arrange(sizes: dict[str, int], devices: Sequence[Any]) -> np.ndarray:
    """The devices in the shape of the mesh, neighbours on an axis near each other in the machine's network."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        outer = next((axis for axis in ("data", "fsdp") if sizes[axis] % slices == 0), None)
        if outer is None:
            raise UserError(
                f"mesh.data={sizes['data']} and mesh.fsdp={sizes['fsdp']} do not fit {slices} slices, from one to "
                f"another of which only these axes can run: make one of them a multiple of {slices}"
            )
        across = {axis: slices if axis == outer else 1 for axis in sizes}
        within = [size // across[axis] for axis, size in sizes.items()]
        make = functools.partial(create_hybrid_device_mesh, within, tuple(across.values()), devices)
    else:
        make = functools.partial(create_device_mesh, tuple(sizes.values()), devices)
    try:
        return make()
    except NotImplementedError:  # no side of the torus has an axis's size: an axis then runs along a part of one
        return make(allow_split_physical_axes=True)
