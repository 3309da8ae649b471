"""Optimizers as components, with their numbers traced: another learning rate compiles nothing.

An optimizer of one's own is a frozen dataclass that derives from `Optimizer` and returns an optax transformation. Its
state follows the parameters' sharding; the planner reads the memory of the state from it.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, override

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.sharding import PartitionSpec, auto_axes

from llama_jax.config import Component, UserError, field_types
from llama_jax.models import Params, is_stacked
from llama_jax.nn import PyTree, seed_value
from llama_jax.parallel import axes_of, mesh_axis_sizes
from llama_jax.training.matrices import dimension_numbers, is_matrix, matrix_axes, on_matrices
from llama_jax.training.schedules import Cosine, Schedule, schedule_of_name

Numbers = dict[str, PyTree]  # numbers or arrays by field name; one more dict for each component in a component

STATIC = {"static": True}
"""Metadata of an `int` or `float` field that is compiled into the step: one that shapes or loops depend on."""


@dataclasses.dataclass(frozen=True)
class Optimizer(Component, abc.ABC):
    """Base of the optimizers: gradients are clipped and transformed, weights decayed, and both scaled by the rate.

    A field of one name has one meaning in all of them: its value is kept where a config changes the optimizer.

    learning_rate: peak.
    warmup_steps: steps of linear warm-up to the peak.
    weight_decay: on matrices only, not on norms and biases; decoupled, as in AdamW.
    clip_norm: largest global norm of the gradient.
    final_fraction: end of the schedules that have one, as a fraction of the peak.
    z_loss: weight of logsumexp(logits)^2 in the loss.
    accumulation_steps: micro-batches that a global batch is computed in; the result is that of the whole.
    schedule: learning rate after the warm-up.
    label_smoothing: share of a target's probability that is spread evenly over the vocabulary.
    """

    learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    final_fraction: float = 0.1
    z_loss: float = 0.0
    accumulation_steps: int = dataclasses.field(default=1, metadata=STATIC)
    schedule: Schedule = Cosine()
    label_smoothing: float = 0.0

    positive: ClassVar[tuple[str, ...]] = ("learning_rate", "clip_norm")
    """Names of the fields that must be above 0."""
    not_negative: ClassVar[tuple[str, ...]] = ("warmup_steps", "weight_decay", "z_loss")
    elementwise: ClassVar[bool] = True
    """False where `transform` does more than elementwise operations, such as products of matrices or sums of rows."""
    decays: ClassVar[tuple[str, ...]] = ("label_smoothing",)
    """Names of the fields that must be at least 0 and below 1."""

    def __post_init__(self) -> None:
        for names, holds, rule in (
            (self.positive, lambda x: x > 0, "be above 0"),
            (self.not_negative, lambda x: x >= 0, "not be below 0"),
            (self.decays, lambda x: 0 <= x < 1, "be at least 0 and below 1"),
            (("final_fraction",), lambda x: 0 <= x <= 1, "lie between 0 and 1"),
            (("accumulation_steps",), lambda x: x >= 1, "be at least 1"),
        ):
            for name in names:
                if not holds(value := getattr(self, name)):
                    raise UserError(f"{name}={value} must {rule}")

    @abc.abstractmethod
    def transform(self) -> optax.GradientTransformation:
        """Return the transformation of clipped gradients, by parameter name, to updates.

        Weight decay and the learning rate follow it. The fields that are numbers hold traced arrays here.
        """

    def hyper(self, num_steps: int, seed: int = 0) -> "Hyper":
        """Return the traced numbers of a train step; a decay ends at `num_steps`, dropout draws from `seed`."""
        numbers = _numbers(self)
        kind = _with_numbers(self, jax.tree.map(lambda _: None, numbers))
        arrays = jax.tree.map(jnp.float32, numbers)
        return Hyper(arrays, jnp.float32(num_steps), jnp.asarray(seed_value(seed)), kind)


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019); the defaults are the Llama recipe.

    beta1: decay of the first moment.
    beta2: decay of the second moment.
    eps: added to the root of the second moment.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    positive = (*Optimizer.positive, "eps")
    decays = (*Optimizer.decays, "beta1", "beta2")

    @override
    def transform(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(b1=self.beta1, b2=self.beta2, eps=self.eps)


@dataclasses.dataclass(frozen=True)
class Lion(Optimizer):
    """Lion: the sign of an interpolated momentum (Chen et al. 2023). Its learning rates are 3 to 10 times lower than
    AdamW's, and its weight decay is higher by as much.

    interpolation: weight of the momentum in the update, against the gradient.
    momentum: decay of the momentum.
    """

    interpolation: float = 0.9
    momentum: float = 0.99

    decays = (*Optimizer.decays, "interpolation", "momentum")

    @override
    def transform(self) -> optax.GradientTransformation:
        return optax.scale_by_lion(b1=self.interpolation, b2=self.momentum)


@dataclasses.dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum (Sutskever et al. 2013).

    momentum: decay of the sum of gradients.
    nesterov: take the gradient after the momentum's step.
    """

    momentum: float = 0.9
    nesterov: bool = False

    decays = (*Optimizer.decays, "momentum")

    @override
    def transform(self) -> optax.GradientTransformation:
        return optax.trace(decay=self.momentum, nesterov=self.nesterov)


@dataclasses.dataclass(frozen=True)
class Adafactor(Optimizer):
    """Adafactor: second moments of a matrix by its rows and columns, updates relative to the parameter's size (Shazeer
    and Stern 2018); each layer's matrix is one.

    decay_rate: second moments decay by 1 - step^-decay_rate.
    clip_update: largest root mean square of a parameter's update, before its scale.
    min_square: added to squared gradients.
    min_factored: smallest side of a matrix whose second moments are factored.
    """

    decay_rate: float = 0.8
    clip_update: float = 1.0
    min_square: float = 1e-30
    min_factored: int = dataclasses.field(default=128, metadata=STATIC)

    elementwise = False
    positive = (*Optimizer.positive, "decay_rate", "clip_update", "min_square", "min_factored")

    @override
    def transform(self) -> optax.GradientTransformation:
        of_matrix = optax.chain(
            optax.scale_by_factored_rms(
                decay_rate=self.decay_rate, min_dim_size_to_factor=self.min_factored, epsilon=self.min_square
            ),
            optax.clip_by_block_rms(self.clip_update),
            optax.scale_by_param_block_rms(),
        )
        return on_matrices(of_matrix)


@dataclasses.dataclass(frozen=True)
class Muon(Optimizer):
    """Muon: the momentum of a layer's matrices orthogonalised by Newton-Schulz (Jordan et al. 2024); AdamW for the
    embedding, the head, norms and biases.

    Updates are scaled to the root mean square of AdamW's (Liu et al. 2025, section 2.2), so that one learning rate and
    weight decay are right for both.

    momentum: decay of the matrices' momentum.
    num_iterations: of Newton-Schulz.
    update_rms: root mean square of a matrix's update, before the learning rate.
    beta1: decay of AdamW's first moment.
    beta2: decay of AdamW's second moment.
    eps: added to the root of AdamW's second moment.
    """

    momentum: float = 0.95
    num_iterations: int = dataclasses.field(default=5, metadata=STATIC)
    update_rms: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    elementwise = False
    positive = (*Optimizer.positive, "num_iterations", "update_rms", "eps")
    decays = (*Optimizer.decays, "momentum", "beta1", "beta2")

    @override
    def transform(self) -> optax.GradientTransformation:
        orthogonal = optax.contrib.scale_by_muon(
            beta=self.momentum, ns_steps=self.num_iterations, weight_dimension_numbers=dimension_numbers
        )

        def scale(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
            first, split = matrix_axes(path[0].key, update.shape)
            sides = math.prod(update.shape[first:split]), math.prod(update.shape[split:])
            # Rows or columns are orthonormal: the root mean square of the elements is 1 / sqrt(longer side).
            return self.update_rms * math.sqrt(max(sides)) * update

        def groups(params: Params) -> dict[str, str]:
            return {n: "muon" if is_stacked(n) and is_matrix(n, value) else "adamw" for n, value in params.items()}

        adam = optax.scale_by_adam(b1=self.beta1, b2=self.beta2, eps=self.eps)
        scaled = optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))
        muon = optax.chain(orthogonal, scaled)
        return optax.partition({"muon": muon, "adamw": adam}, groups)


def OptimizerConfig(
    learning_rate: float, warmup_steps: int, *, schedule: str | Schedule = "cosine", **fields: Any
) -> AdamW:
    """Return the `AdamW` of a config file from before optimizers and schedules were components."""
    schedule = schedule_of_name(schedule) if isinstance(schedule, str) else schedule
    return AdamW(learning_rate, warmup_steps, schedule=schedule, **fields)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["numbers", "num_steps", "seed"], meta_fields=["kind"])
@dataclasses.dataclass(frozen=True)
class Hyper:
    """Numbers of a train step, traced, and the kind of optimizer that it is compiled for.

    numbers: of the optimizer and its schedule, by field name.
    num_steps: of the run, where a decay ends.
    seed: of dropout, as `seed_value` gives it.
    kind: the optimizer with None in place of its numbers.
    """

    numbers: Numbers
    num_steps: PyTree
    seed: PyTree
    kind: Optimizer

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer with arrays in place of its numbers."""
        return _with_numbers(self.kind, self.numbers)


def _numbers(config: Component) -> Numbers:
    """Return the numbers of a component and of the components in it, by field name: int and float fields, if not
    static.
    """
    found: Numbers = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if isinstance(value, Component):
            found[field.name] = _numbers(value)
        elif field_types(type(config))[field.name] in (int, float) and not field.metadata.get("static"):
            found[field.name] = value
    return found


def _with_numbers[C: Component](config: C, numbers: Numbers) -> C:
    """Return a copy of `config` with `numbers`, as `_numbers` gives them, in place of its own.

    Nothing is checked: arrays under a trace have no values to compare.
    """
    copy = object.__new__(type(config))
    for name in field_types(type(config)):
        value = getattr(config, name)
        new = _with_numbers(value, numbers[name]) if isinstance(value, Component) else numbers.get(name, value)
        object.__setattr__(copy, name, new)
    return copy


def learning_rate(step: jax.Array | int, hyper: Hyper) -> jax.Array:
    """Return the rate of the update from `step` to `step + 1`: the warm-up's last update has the peak."""
    step, optimizer = jnp.float32(step), hyper.optimizer
    warmup = optimizer.warmup_steps
    after = optimizer.schedule.factor(step, warmup, hyper.num_steps, optimizer.final_fraction)
    return optimizer.learning_rate * jnp.where(step < warmup, (step + 1) / jnp.maximum(warmup, 1), after)


def make_optimizer(hyper: Hyper) -> optax.GradientTransformation:
    """Return clipping, the optimizer's transformation and decoupled decay.

    `update` requires the parameters; the caller scales its result by minus the learning rate.
    """

    def decayed(params: Params) -> dict[str, bool]:
        return {name: is_matrix(name, value) for name, value in params.items()}

    return optax.chain(
        optax.clip_by_global_norm(hyper.optimizer.clip_norm),
        hyper.optimizer.transform() if hyper.optimizer.elementwise else _across_devices(hyper),
        optax.add_decayed_weights(hyper.optimizer.weight_decay, mask=decayed),
    )


def state_bytes(optimizer: Optimizer, params: Mapping[str, Any]) -> int:
    """Return the bytes of the optimizer's state on one device of the current mesh; `params` may be abstract."""
    state = jax.eval_shape(lambda params: make_optimizer(optimizer.hyper(1)).init(params), params)
    local = lambda x: x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)  # noqa: E731
    return sum(math.prod(local(x)) * x.dtype.itemsize for x in jax.tree.leaves(state))


def _across_devices(hyper: Hyper) -> optax.GradientTransformation:
    """Return the optimizer's transformation for arrays that a mesh splits, with XLA to place its products and sums.

    State of a parameter's shape is split like the parameter, other state along the dimensions that it shares with it.
    """

    def layout(params: Params) -> tuple[PyTree, PyTree]:
        """Return the partition specs of (updates, state)."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        result = shapes, jax.eval_shape(hyper.optimizer.transform().init, shapes)
        return jax.tree_util.tree_map_with_path(lambda path, x: _like_parameter(path, x, params), result)

    def run(method: str, specs: PyTree, *args: PyTree) -> PyTree:
        def function(hyper: Hyper, *args: PyTree) -> PyTree:
            return getattr(hyper.optimizer.transform(), method)(*args)

        # The numbers are arguments, too: a function of automatic axes may not close over arrays of explicit ones.
        placed: Any = auto_axes(function, out_sharding=specs) if mesh_axis_sizes() else function
        return placed(hyper, *args)

    def init(params: PyTree) -> PyTree:
        return run("init", layout(params)[1], params)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        return run("update", layout(params), updates, state, params)

    return optax.GradientTransformation(init, update)


def _like_parameter(path: tuple[Any, ...], x: jax.ShapeDtypeStruct, params: Params) -> PartitionSpec:
    """Return the partition spec of an array of the optimizer's state: of the parameter whose name is in its path."""
    keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    name = next((key for key in keys if key in params), None)
    if name is None:
        return PartitionSpec()
    # In order, each dimension with the next of the parameter's that has its size: sums over rows or columns lack one.
    of_param = list(zip(params[name].shape, axes_of(params[name]), strict=True))
    entries: list[tuple[str, ...] | None] = []
    for size in x.shape:
        match = next((i for i, (other, _) in enumerate(of_param) if other == size), None)
        entries.append(None if match is None else of_param[match][1] or None)
        of_param = of_param if match is None else of_param[match + 1 :]
    return PartitionSpec(*entries)
