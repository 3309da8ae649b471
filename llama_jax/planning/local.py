"""A train step on one device of a mesh: its weights, caches and tokens. Nothing is allocated."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from llama_jax.config import UserError
from llama_jax.data import Preference
from llama_jax.models import ModelConfig, cache_shapes, frozen, layer_rngs, num_microbatches
from llama_jax.nn import ExpertsModule, Projection, sends_assignments, taken_rows
from llama_jax.parallel import batch_parts, mesh_axis_sizes, spec, split_over
from llama_jax.run_config import RunConfig
from llama_jax.training import Optimizer, state_bytes


@dataclasses.dataclass(frozen=True)
class LocalWeight:
    """A parameter, on one device of a mesh.

    name: as `models.layout` has it.
    layers: layers that have it; 0 for one around them.
    stored: elements, of all layers; with a pipeline, those of its stage.
    used: elements of one layer, gathered for its product.
    met: elements of one layer that a token is multiplied with; of experts, only those that it is sent to.
    inputs: elements per token that its product takes; 0 where it takes part in none.
    outputs: elements per token that its product makes.
    sums: True where its product is a sum over the tensor axis.
    splits: True where the tensor axis splits the result of its product.
    returns: True where its product returns to the residual stream.
    choices: experts that a token goes to, where it is a weight of experts, of which a token meets a few; else 0.
    is_gathered: True where it is stored in parts that its product needs together.
    exchanged: True for experts to whose devices assignments are sent, not all tokens to all devices.
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
    choices: int
    is_gathered: bool
    exchanged: bool

    @property
    def experts(self) -> bool:
        """Return whether it is a weight of experts."""
        return self.choices > 0

    @property
    def copies(self) -> int:
        """Return the number of layers that have it, 1 for one around them."""
        return max(1, self.layers)

    @property
    def module(self) -> str:
        """Return the module that it belongs to: `layers.attention`."""
        return self.name.rsplit(".", 2)[0]

    @property
    def is_up(self) -> bool:
        """Return whether it makes what a feed-forward's activation multiplies, of experts only the shared ones'."""
        return self.of_feed_forward and self.name.endswith("up_proj.weight") and not self.experts

    @property
    def of_feed_forward(self) -> bool:
        """Return whether it belongs to a feed-forward."""
        return self.name.split(".")[1] == "feed_forward"


@dataclasses.dataclass(frozen=True)
class LocalModel:
    """A model on one device of a mesh.

    weights: all of them.
    vocab: entries of the vocabulary, in the head.
    vocab_splits: True where the tensor axis splits them.
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
        """Return the weights of the layers that take part in products."""
        return [weight for weight in self.weights if weight.layers and weight.inputs]


@functools.lru_cache(maxsize=4096)
def _local_model(model: ModelConfig, pipeline: int, fsdp: int, tensor: int, expert: int) -> LocalModel:
    """Return one device's part by the axes that split parameters; the others make no difference."""
    heads = [getattr(mixer, "num_heads", 1) for mixer, _ in model.layer_pieces()]
    found, keys = _weights(model), _keys(model, tensor)  # before the mesh: they set another one
    with abstract_mesh({"fsdp": fsdp, "tensor": tensor, "expert": expert}):
        vocab = split_over("vocab", model.vocab_size)
        # Where the axis does not divide the heads, every device has all of them.
        parts = tensor if all(n % tensor == 0 for n in heads) else 1
        return LocalModel(
            weights=tuple(_localized(name, weight, pipeline) for name, weight in found.items()),
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
class Schedule:
    """What a device computes in the layers of one batch, in ticks of a pipeline.

    stages: of the pipeline; with one there is no pipeline, and one tick.
    repeats: rounds of each microbatch.
    microbatches: that the batch is cut into.
    """

    stages: int = 1
    repeats: int = 1
    microbatches: int = 1

    @property
    def ticks(self) -> int:
        """Number of times that a stage applies a round's part of its layers."""
        return self.repeats * self.microbatches + self.stages - 1

    @property
    def bubble(self) -> float:
        """Share of the ticks in which a stage has no microbatch to work on."""
        return (self.stages - 1) / self.ticks

    @property
    def work(self) -> float:
        """Computation of the layers, by that of the batch's own tokens: more than 1 by the bubble."""
        return self.ticks / (self.repeats * self.microbatches)

    @property
    def of_stage(self) -> int:
        """Microbatches that a stage holds: parts of a device's tokens that it computes at a tick."""
        return self.microbatches // self.stages

    @property
    def gathers(self) -> float:
        """Number of times that a device gathers weights, by all of the model's layers once."""
        return self.of_stage * self.work


@dataclasses.dataclass(frozen=True)
class Local:
    """A run's train step on one device of a mesh.

    config: the run.
    sizes: of the mesh axes.
    model: the device's part of the model.
    tokens: tokens of a micro-batch on the device.
    schedule: of the pipeline.
    """

    config: RunConfig
    sizes: dict[str, int]
    model: LocalModel
    tokens: int
    schedule: Schedule = Schedule()

    @staticmethod
    def of(config: RunConfig, num_chips: int) -> "Local":
        """Return one device's part. Raises UserError where mesh and chips, or mesh and batch, do not fit."""
        config.check_mesh(num_chips)
        sizes = config.mesh.sizes(num_chips)
        rows = config.global_batch_size // config.optimizer.accumulation_steps // batch_parts(sizes)
        model = _local_model(config.model, sizes["pipeline"], sizes["fsdp"], sizes["tensor"], sizes["expert"])
        tokens, schedule, stages = rows * (config.row_length // sizes["context"]), Schedule(), sizes["pipeline"]
        if stages > 1:
            count = num_microbatches(config.compute, stages, rows)
            schedule = Schedule(stages, config.compute.pipeline_repeats, count)
        return Local(config, sizes, model, tokens, schedule)

    @property
    def micro_batches(self) -> int:
        """Number of gradient-accumulation micro-batches."""
        return self.config.optimizer.accumulation_steps

    @property
    def pairs(self) -> bool:
        """Whether the batch is pairs of answers, which a frozen reference computes, too (DPO)."""
        return isinstance(self.config.data.objective, Preference)

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return compute_dtype(self.config).itemsize


def compute_dtype(config: RunConfig) -> jnp.dtype:
    """Return the type of activations; on the accelerators that are planned for, auto is bfloat16."""
    return jnp.dtype("bfloat16" if config.compute.dtype == "auto" else config.compute.dtype)


@contextlib.contextmanager
def abstract_mesh(sizes: dict[str, int]) -> Iterator[None]:
    """Set the current mesh, of devices that need not exist."""
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
    """True where experts have a capacity."""


@functools.lru_cache(maxsize=64)
def _weights(model: ModelConfig) -> dict[str, _Weight]:
    """Return every parameter by name."""
    found: dict[str, _Weight] = {}
    with abstract_mesh({}):
        rngs, of_layers = nnx.Rngs(params=0), layer_rngs(model, jax.random.key(0))
        found |= _of_module("", nnx.eval_shape(lambda: nnx.Dict(model.build_parts(rngs=rngs))), 0)
        for stack, pieces in model.stacks().items():
            for kind in dict.fromkeys(pieces):
                block = nnx.eval_shape(lambda kind=kind, stack=stack: model.build_block(stack, kind, rngs=of_layers))
                for name, weight in _of_module(f"{stack}.", block, pieces.count(kind)).items():
                    before = found[name].layers if name in found else 0
                    found[name] = dataclasses.replace(weight, layers=weight.layers + before)
    return found


@functools.lru_cache(maxsize=1024)
def optimizer_bytes(
    optimizer: Optimizer, model: ModelConfig, pipeline: int, fsdp: int, tensor: int, expert: int
) -> int:
    """Return the bytes of the optimizer's state on one device of a mesh of these axes, the others being 1."""
    params: dict[str, jax.ShapeDtypeStruct] = {}
    fixed, found = frozen(model), _weights(model)  # before the mesh: they enter one, too
    with abstract_mesh({"pipeline": pipeline, "fsdp": fsdp, "tensor": tensor, "expert": expert}):
        for name, weight in found.items():
            layers = (weight.layers,) if weight.layers else ()
            shape = (*layers, *weight.shape)
            partition = spec(*("layers" for _ in layers), *weight.axes, shape=shape)
            assert partition is not None
            sharding = NamedSharding(jax.sharding.get_abstract_mesh(), partition)
            params[name] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        return state_bytes(optimizer, {name: value for name, value in params.items() if name not in fixed})


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


def _localized(name: str, weight: _Weight, stages: int) -> LocalWeight:
    # Storage alone splits the model dimension; for a product it is gathered.
    gathered = tuple(None if axis == "embed" else axis for axis in weight.axes)

    def size(axes: tuple[str | None, ...], dims: slice = slice(None)) -> int:
        return math.prod(weight.shape[dims]) // _parts(spec(*axes[dims], shape=weight.shape[dims]))

    first, times = (1, weight.choices) if weight.choices else (0, 1)
    devices = mesh_axis_sizes().get("expert", 1)
    rows = times if weight.drops or not weight.choices else taken_rows(times, devices)
    ins, outs = slice(first, first + weight.in_dims), slice(first + weight.in_dims, None)
    return LocalWeight(
        name=name,
        layers=weight.layers,
        stored=max(1, weight.layers // stages) * size(weight.axes),
        used=size(gathered),
        met=times * size(gathered, slice(first, None)),
        inputs=math.ceil(rows * size(gathered, ins)) if weight.in_dims else 0,
        outputs=math.ceil(rows * size(gathered, outs)) if weight.in_dims else 0,
        sums=weight.in_dims > 0 and size(gathered, ins) < math.prod(weight.shape[ins]),
        splits=weight.in_dims > 0 and size(gathered, outs) < math.prod(weight.shape[outs]),
        returns=weight.in_dims > 0 and weight.axes[outs] == ("embed",),
        choices=weight.choices,
        is_gathered=size(weight.axes) < size(gathered),
        exchanged=not weight.drops and weight.choices > 0 and sends_assignments(weight.choices, devices),
    )


def _parts(partition: Any) -> int:
    sizes = mesh_axis_sizes()
    entries = ((entry,) if isinstance(entry, str) else entry or () for entry in partition or ())
    return math.prod(sizes[axis] for entry in entries for axis in entry)


def cache_bytes(model: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> int:
    """Return the bytes of all layers' caches on one device of the current mesh, for `batch` x `length` positions.

    It is 0 for a model with a mixer that does not decode.
    """
    try:
        caches = cache_shapes(model, length, batch, dtype)
    except UserError:  # a mixer that does not decode: nothing is cached
        return 0
    return sum(x.size * x.dtype.itemsize // _parts(x.sharding.spec) for x in jax.tree.leaves(caches))
