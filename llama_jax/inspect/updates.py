"""Norms of updates: of a step of a run, between checkpoints, and logged while training."""

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint import CHECKPOINTS_DIRECTORY, CheckpointStore
from llama_jax.config import UserError
from llama_jax.inspect.norms import ParameterNorms, parameter_norms
from llama_jax.inspect.recorded import Arrays, draw_curves
from llama_jax.models import Params, abstract_params
from llama_jax.parallel import distributed, make_mesh
from llama_jax.planning import mesh_of
from llama_jax.run import Event, Run, programs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN_KEYS = ("logging.", "checkpoint.", "checks.", "profile.", "compute.", "mesh.")  # they do not change a step
LOGGED = ("update_norm", "parameter_norm")


@dataclasses.dataclass(frozen=True, repr=False)
class UpdateNorms(Arrays):
    """Norms of the change of each parameter, and of the parameter before it.

    steps: between which updates it is.
    update: norms of the change.
    parameter: norms before it.
    """

    steps: tuple[int, int]
    update: ParameterNorms
    parameter: ParameterNorms

    @property
    def ratio(self) -> ParameterNorms:
        """The change relative to the parameter; about 1e-3 a step is usual for matrices."""
        return self.update.over(self.parameter)

    def plot(self, part: str = "") -> "Figure":
        """Return a figure of the ratio by layer, of the kinds whose names contain `part`."""
        return self.ratio.plot(part)


def update_norms(run: Run, step: int, until: int | None = None) -> UpdateNorms:
    """Return the norms of a run's update from the checkpoint of `step`, or of all updates up to that of `until`.

    Without `until` the one step is taken again: state of the checkpoint, the run's exact batch and its optimizer.
    Raises UserError where a checkpoint is missing, and for a step that was taken with other keys than the run has now.
    """
    config = run.config
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(contextlib.closing(CheckpointStore(run.directory / CHECKPOINTS_DIRECTORY)))
        stack.enter_context(jax.set_mesh(make_mesh(mesh_of(config, jax.devices()))))
        hyper = config.optimizer.hyper(config.num_steps, config.seed)
        abstract = jax.eval_shape(programs(config).init_state, abstract_params(config.model), hyper)
        state = store.load(step, abstract)
        before: Params = jax.tree.map(jnp.copy, state.params)
        after = store.load(until, abstract).params if until is not None else _stepped(run, step, state, hyper)
        change = {name: after[name] - value for name, value in before.items()}
        update = parameter_norms(config.model, change, "update norm")
        parameter = parameter_norms(config.model, before, "parameter norm")
    return UpdateNorms((step, step + 1 if until is None else until), update, parameter)


def _stepped(run: Run, step: int, state: Any, hyper: Any) -> Params:
    """Return the parameters after one more step of the run."""
    changes = {key for entry in run.history if entry["step"] > step for key in entry["changes"]}
    if changed := sorted(key for key in changes if not key.startswith(PLAIN_KEYS)):
        raise UserError(f"step={step} was taken with another {changed[0]} than the run has now: give until=")
    batch = run.batch(step)
    rows = next(iter(batch.values())).shape[0]
    placed = {name: distributed.place_rows(x, range(rows), rows) for name, x in batch.items()}
    return programs(run.config).train_step(state, placed, hyper)[0].params


class log_updates:  # a function to its users: callbacks=(log_updates(),)
    """Callback of `train` that logs `update_norm` and `parameter_norm`, lists over layers, with every logged step.

    An entry is for all parameters of a layer, the last one for those around the layers. The update is the change since
    the last logged step, so it needs a copy of the parameters; the first logged step of a start has none.
    """

    def __init__(self) -> None:
        self._before: Params = {}

    def __call__(self, event: Event) -> dict[str, list[float]]:
        config, before, self._before = event.run.config.model, self._before, event.params()
        if not before:
            return {}
        change = {name: value - before[name] for name, value in self._before.items()}
        norms = (parameter_norms(config, arrays, "norm").by_layer.tolist() for arrays in (change, before))
        return dict(zip(LOGGED, norms, strict=True))


@dataclasses.dataclass(frozen=True, repr=False)
class UpdateHistory(Arrays):
    """What `log_updates` logged in a run.

    steps: [n].
    update: [n, L+1], norms of the changes since the logged step before, by layer, last those around the layers.
    parameter: [n, L+1], norms of the parameters before them.
    """

    steps: np.ndarray
    update: np.ndarray
    parameter: np.ndarray

    def plot(self) -> "Figure":
        """Return a figure of the relative update of each layer over the steps."""
        ratio = (self.update / self.parameter).T
        curves = {f"layer {i}": (self.steps, values) for i, values in enumerate(ratio[:-1])}
        return draw_curves(curves | {"others": (self.steps, ratio[-1])}, "step", "norm of update / parameter")[0]


def update_history(run: Run) -> UpdateHistory:
    """Return the norms of updates that `log_updates` logged. Raises UserError where there are none."""
    lines = [line for line in run.metrics() if line.get(LOGGED[0])]
    if not lines:
        raise UserError(
            f"'{run.directory}' has no {LOGGED[0]}: train with callbacks=(llama_jax.inspect.log_updates(),)"
        )
    return UpdateHistory(*(np.array([line[name] for line in lines]) for name in ("step", *LOGGED)))
