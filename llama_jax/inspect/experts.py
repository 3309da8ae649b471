"""The load of experts: over a run's steps, or over a model's layers on a text."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import numpy as np

from llama_jax.config import UserError
from llama_jax.figures import clean, color_of, new_figure
from llama_jax.inspect.recorded import Arrays, Inputs, Pass, Source, Text
from llama_jax.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOAD, DROPPED = "experts_load", "dropped_share"


@dataclasses.dataclass(frozen=True, repr=False)
class ExpertLoad(Arrays):
    """Each expert's share of the assignments of tokens, by step or by layer.

    axis: step or layer.
    places: [n], the steps (means over the layers) or the layers that have experts.
    load: [n, E], shares that sum to 1.
    dropped: [n], share of the assignments for which the expert had no slot.
    """

    axis: str
    places: np.ndarray
    load: np.ndarray
    dropped: np.ndarray

    @property
    def entropy(self) -> np.ndarray:
        """[n], the entropy of the load relative to that of equal shares: 1 where all experts work alike, 0 for one."""
        terms = np.where(self.load > 0, self.load * np.log(np.where(self.load > 0, self.load, 1)), 0)
        return -terms.sum(1) / max(np.log(self.load.shape[1]), 1e-9)

    def plot(self) -> "Figure":
        """Return a figure of the shares relative to equal ones, and of entropy and dropped share."""
        figure = new_figure(6.4, 4.6)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        experts = np.arange(self.load.shape[1])
        image = upper.pcolormesh(
            self.places, experts, self.load.T * len(experts), cmap="cividis", vmin=0, shading="nearest"
        )
        upper.set_ylabel("expert")
        upper.locator_params(axis="y", integer=True)
        figure.colorbar(image, ax=upper, label="load / equal share")
        clean(lower)
        for i, (name, values) in enumerate({"entropy (1: equal)": self.entropy, "dropped share": self.dropped}.items()):
            lower.plot(self.places, values, "os"[i] + "-", color=color_of(i), label=name, markersize=3)
        lower.set(xlabel=self.axis, ylim=(-0.03, 1.03))
        lower.locator_params(axis="x", integer=True)
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        return figure


def expert_load(source: Source, text: Text | None = None) -> ExpertLoad:
    """Return the load of the experts over the logged steps of a run, or with a `text` in each layer of a model.

    Raises UserError for a model without experts.
    """
    if text is not None:
        loads = Inputs.of(source, text).look(_loads)
        if not loads:
            raise UserError("the model has no experts: its feed-forwards are dense")
        columns = [np.stack([found[i] for found in loads.values()]) for i in range(2)]
        return ExpertLoad("layer", np.array(list(loads)), *columns)
    if not isinstance(source, Run):
        raise UserError("give a text for a loaded model, or a run, whose metrics have the load over its steps")
    lines = [line for line in source.metrics() if line.get(LOAD)]
    if not lines:
        raise UserError(f"'{source.directory}' has no {LOAD} among its metrics: its feed-forwards are dense")
    dropped = np.array([line.get(DROPPED) or 0.0 for line in lines])
    return ExpertLoad(
        "step", np.array([line["step"] for line in lines]), np.array([line[LOAD] for line in lines]), dropped
    )


def _loads(of: Pass) -> dict[int, tuple[jax.Array, jax.Array]]:
    layers = enumerate(of.of_stack("layers"))
    return {i: (layer.aux[LOAD], layer.aux[DROPPED]) for i, layer in layers if LOAD in layer.aux}
