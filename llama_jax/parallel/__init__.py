"""The mesh, and the one table from logical axes to mesh axes.

In: a mesh shape. Out: partition specs for parameters and activations, by the names of their dimensions. A new logical
axis is one line in `mesh.py`. `distributed` makes one program of several processes.
"""

from llama_jax.parallel import distributed as distributed
from llama_jax.parallel.mesh import (
    LOGICAL_AXES as LOGICAL_AXES,
    MESH_AXES as MESH_AXES,
    MeshConfig as MeshConfig,
    axes_of as axes_of,
    batch_parts as batch_parts,
    einsum as einsum,
    fitting as fitting,
    make_mesh as make_mesh,
    mesh_axis_sizes as mesh_axis_sizes,
    over_slices as over_slices,
    platform as platform,
    replicate as replicate,
    reshape as reshape,
    shard as shard,
    spec as spec,
    split_layers as split_layers,
    split_over as split_over,
)
