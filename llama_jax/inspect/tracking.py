"""Norms of updates over a run: a callback that logs them, and their curves."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import UserError
from llama_jax.figures import clean, new_figure
from llama_jax.inspect.recorded import Arrays
from llama_jax.models import ModelConfig, Params, is_stacked, layers_with
from llama_jax.run import Event, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UPDATE, PARAMETER = "update_norm", "parameter_norm"


class log_updates:  # noqa: N801  # called like a function: callbacks=(log_updates(),)
    """Callback of `train` that logs `update_norm` and `parameter_norm`, lists over layers, with every logged step.

    An entry is for all parameters of a layer, the last one for those around the layers. The update is the change since
    the last logged step, so it needs a copy of the parameters; the first logged step of a start has none.
    """

    def __init__(self) -> None:
        self._before: Params = {}

    def __call__(self, event: Event) -> dict[str, list[float]]:
        params, config = event.params(), event.run.config.model
        before, self._before = self._before, params
        if not before:
            return {}
        found = jax.jit(_by_layer, static_argnums=0)(
            config, {name: params[name] - before[name] for name in params}, before
        )
        return {name: np.asarray(x).tolist() for name, x in zip((UPDATE, PARAMETER), found, strict=True)}


def _by_layer(config: ModelConfig, *of: Params) -> list[jax.Array]:
    """Return the norm of all arrays of each layer, of all stacks, and of the rest."""
    owners, stacks, found = layers_with(config), config.stacks(), []
    for arrays in of:
        squares = {stack: [jnp.float32(0)] * len(layers) for stack, layers in stacks.items()}
        rest = jnp.float32(0)
        for name, x in arrays.items():
            if not is_stacked(name):
                rest += jnp.square(x).sum()
                continue
            own = squares[name.partition(".")[0]]
            for place, layer in enumerate(owners[name]):
                own[layer] += jnp.square(jax.lax.index_in_dim(x, place, keepdims=False)).sum()
        found.append(jnp.sqrt(jnp.stack([*(x for own in squares.values() for x in own), rest])))
    return found


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
        import matplotlib as mpl

        figure = new_figure(6.4, 3.6)
        axes = clean(figure.add_subplot(xlabel="step", ylabel="update / parameter (norms)", yscale="log"))
        ratio, count = self.update / self.parameter, self.update.shape[1] - 1
        colors = mpl.colormaps["viridis"]
        for i in range(count):
            axes.plot(
                self.steps, ratio[:, i], color=colors(0.9 * i / max(1, count - 1)), linewidth=1.2, label=f"layer {i}"
            )
        axes.plot(self.steps, ratio[:, count], "--", color="gray", linewidth=1.2, label="around")
        figure.legend(loc="outside right upper", fontsize=8, frameon=False, ncols=1 + count // 16)
        return figure


def update_history(run: Run) -> UpdateHistory:
    """Return the norms of updates that `log_updates` logged. Raises UserError where there are none."""
    lines = [line for line in run.metrics() if line.get(UPDATE)]
    if not lines:
        raise UserError(f"'{run.directory}' has no {UPDATE}: train with callbacks=(llama_jax.inspect.log_updates(),)")
    columns = [np.array([line[name] for line in lines], float) for name in (UPDATE, PARAMETER)]
    return UpdateHistory(np.array([line["step"] for line in lines]), *columns)
