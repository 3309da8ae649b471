"""The mesh, and the one table from logical axes to mesh axes.

In: a mesh shape. Out: partition specs for parameters and activations, by the names of their dimensions. A new logical
axis is one line in `axes.LOGICAL_AXES`.
"""

from llama_jax.parallel.axes import (
    LOGICAL_AXES,
    axes_of,
    einsum,
    fitting,
    mesh_axis_sizes,
    platform,
    replicate,
    reshape,
    shard,
    spec,
    split_over,
)
from llama_jax.parallel.mesh import MESH_AXES, MeshConfig, make_mesh

__all__ = [
    "LOGICAL_AXES",
    "MESH_AXES",
    "MeshConfig",
    "axes_of",
    "einsum",
    "fitting",
    "make_mesh",
    "mesh_axis_sizes",
    "platform",
    "replicate",
    "reshape",
    "shard",
    "spec",
    "split_over",
]
