"""What a plan is made of: the part of a run's config that memory and speed depend on, and what lies on one device."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from llama_jax.config import UserError
from llama_jax.models import Compute, ModelConfig
from llama_jax.nn import Projection
from llama_jax.parallel import MeshConfig, mesh_axis_sizes, spec
from llama_jax.training import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Workload:
    """A train step; its keys are those of a run's config, so that a change fits both.

    model: what is trained.
    compute: how it is computed.
    optimizer: how it is trained.
    mesh: how devices are used.
    global_batch_size: sequences of one update.
    sequence_length: tokens of a sequence.
    num_steps: updates, for how long it all takes.
    """

    model: ModelConfig
    compute: Compute
    optimizer: OptimizerConfig
    mesh: MeshConfig
    global_batch_size: int
    sequence_length: int
    num_steps: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of one update."""
        return self.global_batch_size * self.sequence_length

    @property
    def dtype(self) -> jnp.dtype:
        """Type of activations; on the accelerators that are planned for, auto is bfloat16."""
        return jnp.dtype("bfloat16" if self.compute.dtype == "auto" else self.compute.dtype)

    def problem(self, sizes: dict[str, int]) -> str | None:
        """Why a mesh of these sizes cannot take the batch, or None."""
        rows, parts = sizes["data"] * sizes["fsdp"], self.optimizer.accumulation_steps
        if self.global_batch_size % (rows * parts):
            accumulated = f" x optimizer.accumulation_steps={parts}" if parts > 1 else ""
            return (
                f"global_batch_size={self.global_batch_size} is not divisible by mesh.data x mesh.fsdp={rows}"
                f"{accumulated}: take a multiple of {rows * parts}"
            )
        if self.sequence_length % sizes["context"]:
            return f"sequence_length={self.sequence_length} is not divisible by mesh.context={sizes['context']}"
        return None

    def check(self, num_chips: int) -> dict[str, int]:
        """Sizes of the mesh axes on so many chips. Raises UserError where they cannot take the batch."""
        sizes = self.mesh.sizes(num_chips)
        if problem := self.problem(sizes):
            raise UserError(problem)
        return sizes


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter.

    shape: in one layer.
    axes: logical axes of its dimensions.
    layers: layers that have it; 0 for one around the layers.
    in_dims: dimensions that its product contracts; 0 where it takes part in none.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    layers: int
    in_dims: int

    @property
    def copies(self) -> int:
        return max(1, self.layers)

    def stored(self) -> int:
        """Elements of all layers on one device of the current mesh."""
        return self.copies * math.prod(self.shape) // split(self.axes, self.shape)

    def used(self) -> int:
        """Elements of one layer on one device once gathered for its product."""
        return math.prod(self.shape) // split(tuple(None if a == "embed" else a for a in self.axes), self.shape)

    def width(self, side: str) -> int:
        """Elements per token of what its product takes (`in`) or makes (`out`), on one device."""
        dims = slice(0, self.in_dims) if side == "in" else slice(self.in_dims, None)
        axes = tuple(None if a == "embed" else a for a in self.axes[dims])
        return math.prod(self.shape[dims]) // split(axes, self.shape[dims])

    def width_of(self, axis: str) -> int:
        """Size of the dimension with this logical axis, on one device."""
        size = self.shape[self.axes.index(axis)]
        return size // split((axis,), (size,))

    def is_gathered(self) -> bool:
        """Whether it is stored in parts that its product needs together."""
        return self.stored() < self.copies * self.used()

    def splits(self, side: str) -> bool:
        """Whether the tensor axis splits what its product takes or makes."""
        dims = slice(0, self.in_dims) if side == "in" else slice(self.in_dims, None)
        return self.width(side) < math.prod(self.shape[dims])


def split(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> int:
    """Into how many parts the current mesh splits such an array: by the rules of `parallel.spec` itself."""
    return _parts(spec(*axes, shape=shape))


def _parts(partition: Any) -> int:
    sizes = mesh_axis_sizes()
    entries = ((entry,) if isinstance(entry, str) else entry or () for entry in partition or ())
    return math.prod(sizes[axis] for entry in entries for axis in entry)


@contextlib.contextmanager
def abstract_mesh(sizes: dict[str, int]) -> Iterator[None]:
    """The current mesh, of devices that need not exist."""
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Explicit,) * len(sizes))
    with jax.sharding.use_abstract_mesh(mesh):
        yield


@functools.lru_cache(maxsize=64)
def weights(model: ModelConfig) -> dict[str, Weight]:
    """Every parameter by name, as `models.layout` names them; nothing is allocated."""
    found: dict[str, Weight] = {}
    pieces = model.layer_pieces()
    with abstract_mesh({}):
        rngs = nnx.Rngs(params=0)
        found |= _weights("", nnx.eval_shape(lambda: nnx.Dict(model.build_parts(rngs=rngs))), 0)
        for kind in dict.fromkeys(pieces):
            block = nnx.eval_shape(lambda kind=kind: model.build_block(kind, rngs=rngs))
            for name, weight in _weights("layers.", block, pieces.count(kind)).items():
                before = found[name].layers if name in found else 0
                found[name] = dataclasses.replace(weight, layers=weight.layers + before)
    return found


def _weights(prefix: str, module: nnx.Module, layers: int) -> dict[str, Weight]:
    contracts = {
        ".".join(map(str, (*path, "weight"))): len(node.in_shape)
        for path, node in nnx.iter_graph(module)
        if isinstance(node, Projection)
    }
    return {
        prefix + name: Weight(node.shape, node.get_metadata("axes"), layers, contracts.get(name, 0))
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Param) and (name := ".".join(map(str, path)))
    }


def cache_bytes(model: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> int:
    """Bytes of the caches of all layers on one device of the current mesh, when `batch` rows hold `length` positions."""
    total = 0
    pieces = model.layer_pieces()

    def make(kind):
        return model.build_block(kind, rngs=nnx.Rngs(params=0)).attention.init_cache(batch, length, dtype)

    for kind in dict.fromkeys(pieces):
        for array in jax.tree.leaves(jax.eval_shape(functools.partial(make, kind))):
            total += pieces.count(kind) * array.size * array.dtype.itemsize // _parts(array.sharding.spec)
    return total


def local_tokens(workload: Workload) -> int:
    """Tokens that one device of the current mesh computes at a time."""
    sizes = mesh_axis_sizes()
    rows = workload.global_batch_size // workload.optimizer.accumulation_steps
    return (rows // (sizes["data"] * sizes["fsdp"])) * (workload.sequence_length // sizes["context"])


def itemsize(workload: Workload) -> int:
    """Bytes of an activation."""
    return workload.dtype.itemsize


def splits_sequence(workload: Workload) -> bool:
    """Whether the current mesh splits the sequence."""
    return mesh_axis_sizes()["context"] > 1
