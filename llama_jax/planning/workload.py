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
from llama_jax.nn import ExpertsModule, Projection
from llama_jax.parallel import MeshConfig, batch_parts, mesh_axis_sizes, spec, split_over
from llama_jax.training import Optimizer


@dataclasses.dataclass(frozen=True)
class Workload:
    """A train step; its keys are those of a run's config, so that a change of one is a change of the other.

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
    optimizer: Optimizer
    mesh: MeshConfig
    global_batch_size: int
    sequence_length: int
    num_steps: int = 1

    @property
    def parts(self) -> int:
        """That the batch is computed in."""
        return self.optimizer.accumulation_steps

    @property
    def dtype(self) -> jnp.dtype:
        """Type of activations; on the accelerators that are planned for, auto is bfloat16."""
        return jnp.dtype("bfloat16" if self.compute.dtype == "auto" else self.compute.dtype)

    def problem(self, sizes: dict[str, int]) -> str | None:
        """Why a mesh of these sizes cannot take the batch, or None."""
        rows = batch_parts(sizes)
        if self.global_batch_size % (rows * self.parts):
            experts = " x mesh.expert" if sizes["expert"] > 1 else ""
            accumulated = f" x optimizer.accumulation_steps={self.parts}" if self.parts > 1 else ""
            return (
                f"global_batch_size={self.global_batch_size} is not divisible by mesh.data x mesh.fsdp{experts}={rows}"
                f"{accumulated}: take a multiple of {rows * self.parts}"
            )
        if self.sequence_length % sizes["context"]:
            return f"sequence_length={self.sequence_length} is not divisible by mesh.context={sizes['context']}"
        return None


@dataclasses.dataclass(frozen=True)
class LocalWeight:
    """A parameter, on one device of a mesh.

    name: as `models.layout` has it.
    layers: layers that have it; 0 for one around them.
    stored: elements, of all layers.
    used: elements of one layer's, gathered for its product.
    met: elements of one layer's that a token is multiplied with: of the experts on all devices, those it goes to.
    inputs: elements per token that its product takes; 0 where it takes part in none.
    outputs: that its product makes.
    sums: whether its product is a sum over the tensor axis.
    splits: whether the tensor axis splits what its product makes.
    returns: whether its product returns to the residual stream.
    experts: whether it is of experts, of which a token meets a few.
    """

    name: str
    layers: int
    stored: int
    used: int
    met: int
    inputs: int
    outputs: int
    sums: bool
    splits: bool
    returns: bool
    experts: bool

    @property
    def copies(self) -> int:
        return max(1, self.layers)

    @property
    def is_gathered(self) -> bool:
        """Whether it is stored in parts that its product needs together."""
        return self.stored < self.copies * self.used

    @property
    def module(self) -> str:
        """What it belongs to: `layers.attention`."""
        return self.name.rsplit(".", 2)[0]

    @property
    def of_feed_forward(self) -> bool:
        return self.name.split(".")[1] == "feed_forward"


@dataclasses.dataclass(frozen=True)
class LocalModel:
    """A model on one device of a mesh.

    weights: all of them.
    vocab: entries of the vocabulary, in the head.
    vocab_splits: whether the tensor axis splits them.
    heads: query heads of the layer that has most.
    head_parts: parts that the tensor axis splits query heads into.
    keys: elements per token of the caches of all layers.
    scores: FLOPs of all layers' attention scores, for one query and one key.
    """

    weights: tuple[LocalWeight, ...]
    vocab: int
    vocab_splits: bool
    heads: int
    head_parts: int
    keys: int
    scores: float

    def __getitem__(self, name: str) -> LocalWeight:
        return next(weight for weight in self.weights if weight.name == name)

    @property
    def products(self) -> list[LocalWeight]:
        """The weights of the layers that take part in products."""
        return [weight for weight in self.weights if weight.layers and weight.inputs]


@functools.lru_cache(maxsize=4096)
def _local_model(model: ModelConfig, fsdp: int, tensor: int, expert: int) -> LocalModel:
    """Of the axes that split parameters; the others make no difference."""
    heads = [getattr(mixer, "num_heads", 1) for mixer, _ in model.layer_pieces()]
    found, keys = _weights(model), _keys(model, tensor)  # before the mesh: they enter one of their own
    with abstract_mesh({"fsdp": fsdp, "tensor": tensor, "expert": expert}):
        vocab = split_over("vocab", model.vocab_size)
        # Where the axis does not divide the heads, every device has all of them.
        parts = tensor if all(n % tensor == 0 for n in heads) else 1
        return LocalModel(
            weights=tuple(_localized(name, weight) for name, weight in found.items()),
            vocab=model.vocab_size // (tensor if vocab else 1),
            vocab_splits=bool(vocab),
            heads=max(heads) // parts,
            head_parts=parts,
            keys=keys,
            scores=sum(mixer.score_flops(1.0) for mixer, _ in model.layer_pieces()) / parts,
        )


@functools.lru_cache(maxsize=256)
def _keys(model: ModelConfig, tensor: int) -> int:
    with abstract_mesh({"tensor": tensor}):
        return cache_bytes(model, 1, 1, jnp.dtype("bfloat16")) // 2


@dataclasses.dataclass(frozen=True)
class Local:
    """A workload on one device of a mesh.

    workload: all of it.
    sizes: of the mesh axes.
    model: the device's part of the model.
    tokens: that the device computes at a time.
    itemsize: bytes of an activation.
    """

    workload: Workload
    sizes: dict[str, int]
    model: LocalModel
    tokens: int
    itemsize: int

    @staticmethod
    def of(workload: Workload, num_chips: int) -> "Local":
        """Raises UserError for a mesh that takes other than so many chips, or cannot take the batch."""
        sizes = workload.mesh.sizes(num_chips)
        if problem := workload.problem(sizes):
            raise UserError(problem)
        rows = workload.global_batch_size // workload.parts // batch_parts(sizes)
        tokens = rows * (workload.sequence_length // sizes["context"])
        model = _local_model(workload.model, sizes["fsdp"], sizes["tensor"], sizes["expert"])
        return Local(workload, sizes, model, tokens, workload.dtype.itemsize)


@contextlib.contextmanager
def abstract_mesh(sizes: dict[str, int]) -> Iterator[None]:
    """The current mesh, of devices that need not exist."""
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Explicit,) * len(sizes))
    with jax.sharding.use_abstract_mesh(mesh):
        yield


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A parameter: its shape in one layer, its logical axes, how many dimensions its product contracts."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    layers: int
    in_dims: int
    choices: int
    """Experts that a token goes to, of those along the first dimension; 0 where there are none."""
    drops: bool
    """Whether experts have a capacity."""


@functools.lru_cache(maxsize=64)
def _weights(model: ModelConfig) -> dict[str, _Weight]:
    """Every parameter by name; nothing is allocated."""
    found: dict[str, _Weight] = {}
    with abstract_mesh({}):
        rngs = nnx.Rngs(params=0)
        found |= _of_module("", nnx.eval_shape(lambda: nnx.Dict(model.build_parts(rngs=rngs))), 0)
        for stack, pieces in model.stacks().items():
            for kind in dict.fromkeys(pieces):
                block = nnx.eval_shape(lambda kind=kind, stack=stack: model.build_block(stack, kind, rngs=rngs))
                for name, weight in _of_module(f"{stack}.", block, pieces.count(kind)).items():
                    before = found[name].layers if name in found else 0
                    found[name] = dataclasses.replace(weight, layers=weight.layers + before)
    return found


def _of_module(prefix: str, module: nnx.Module, layers: int) -> dict[str, _Weight]:
    nodes = [(".".join(map(str, path)), node) for path, node in nnx.iter_graph(module)]
    contracts = {f"{path}.weight": len(node.in_shape) for path, node in nodes if isinstance(node, Projection)}
    experts = {
        f"{path}.experts.{name}_proj.weight": (node.config.router.choices, node.config.drops)
        for path, node in nodes
        if isinstance(node, ExpertsModule)
        for name in node.experts.params()
    }
    contracts |= dict.fromkeys(experts, 1)
    return {
        prefix + path: _Weight(
            node.shape, node.get_metadata("axes"), layers, contracts.get(path, 0), *experts.get(path, (0, False))
        )
        for path, node in nodes
        if isinstance(node, nnx.Param)
    }


def _localized(name: str, weight: _Weight) -> LocalWeight:
    # Storage alone splits the model dimension; for a product it is gathered.
    gathered = tuple(None if axis == "embed" else axis for axis in weight.axes)

    def size(axes: tuple[str | None, ...], dims: slice = slice(None)) -> int:
        return math.prod(weight.shape[dims]) // _parts(spec(*axes[dims], shape=weight.shape[dims]))

    first, times = (1, weight.choices) if weight.choices else (0, 1)
    # Where nothing is dropped there is room for the tokens of all devices, since all may choose the experts of one.
    rows = times if weight.drops or not weight.choices else times * mesh_axis_sizes().get("expert", 1)
    ins, outs = slice(first, first + weight.in_dims), slice(first + weight.in_dims, None)
    return LocalWeight(
        name=name,
        layers=weight.layers,
        stored=max(1, weight.layers) * size(weight.axes),
        used=size(gathered),
        met=times * size(gathered, slice(first, None)),
        inputs=rows * size(gathered, ins) if weight.in_dims else 0,
        outputs=rows * size(gathered, outs) if weight.in_dims else 0,
        sums=weight.in_dims > 0 and size(gathered, ins) < math.prod(weight.shape[ins]),
        splits=weight.in_dims > 0 and size(gathered, outs) < math.prod(weight.shape[outs]),
        returns=weight.in_dims > 0 and weight.axes[outs] == ("embed",),
        experts=weight.choices > 0,
    )


def _parts(partition: Any) -> int:
    sizes = mesh_axis_sizes()
    entries = ((entry,) if isinstance(entry, str) else entry or () for entry in partition or ())
    return math.prod(sizes[axis] for entry in entries for axis in entry)


def cache_bytes(model: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> int:
    """Bytes of all layers' caches on one device of the current mesh, for `batch` rows of `length` positions."""
    pieces = model.stacks()["layers"]  # what an encoder keeps of its source is not counted

    def make(kind: Any) -> Any:
        block: Any = model.build_block("layers", kind, rngs=nnx.Rngs(params=0))
        return block.attention.init_cache(batch, length, dtype)

    return sum(
        pieces.count(kind) * array.size * array.dtype.itemsize // _parts(array.sharding.spec)
        for kind in dict.fromkeys(pieces)
        for array in jax.tree.leaves(jax.eval_shape(functools.partial(make, kind)))
    )
