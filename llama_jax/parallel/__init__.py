"""The mesh, and the one table from logical axes to mesh axes.

In: a mesh shape. Out: partition specs for parameters and activations, by the names of their dimensions. A new logical
axis is one line in `axes.LOGICAL_AXES`. `distributed` makes one program of several processes.
"""

from llama_jax.parallel import distributed
from llama_jax.parallel.axes import (
    LOGICAL_AXES,
    axes_of,
    batch_parts,
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
    "batch_parts",
    "distributed",
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
