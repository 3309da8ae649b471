"""Norms by layer: of activations, gradients and updates."""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint import CHECKPOINTS_DIRECTORY, CheckpointStore
from llama_jax.config import UserError
from llama_jax.figures import clean, color_of, new_figure
from llama_jax.inspect.recorded import Arrays, Inputs, Pass, Source, Text
from llama_jax.models import Compute, ModelConfig, Params, abstract_params, is_stacked, layers_with
from llama_jax.parallel import distributed, make_mesh, shard
from llama_jax.planning import mesh_of
from llama_jax.run import Run, programs
from llama_jax.training import AdamW, gradient

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES = ("-", "--", ":")
PLAIN_KEYS = ("logging.", "checkpoint.", "profile.", "compute.", "mesh.")  # they do not change a step


@dataclasses.dataclass(frozen=True, repr=False)
class ActivationNorms(Arrays):
    """Root mean squares of activations over the width, and over rows and positions where these are not asked for.

    residual: [L+1] or [L+1, B, T], the residual stream, from the embeddings (0) to the last layer's result.
    sublayers: by name (attention, feed_forward): [L] or [L, B, T], the result that joins the stream; NaN where a layer
      has none.
    """

    residual: np.ndarray
    sublayers: dict[str, np.ndarray]

    def plot(self) -> "Figure":
        """Return a figure of the values by layer, as means (quadratic) over rows and positions."""
        figure = new_figure(6.4, 3.6)
        axes = clean(figure.add_subplot(xlabel="layer", ylabel="root mean square", yscale="log"))
        for i, (name, values) in enumerate(({"residual stream": self.residual} | self.sublayers).items()):
            mean = np.sqrt((values.reshape(len(values), -1) ** 2).mean(1))
            # The stream is between layers: its first value is before layer 0.
            places = np.arange(len(mean)) - (0.5 if len(mean) == len(self.residual) else 0)
            axes.plot(places, mean, "osD^"[i] + "-", color=color_of(i), label=name.replace("_", "-"), markersize=4)
        axes.locator_params(axis="x", integer=True)
        figure.legend(loc="outside upper center", ncols=4, frameon=False)
        return figure


def activation_norms(lm: Source, text: Text, *, by_position: bool = False) -> ActivationNorms:
    """Return the root mean squares of the residual stream and of the sublayers' results, of the decoder's stack.

    The results are those of `attention` and `feed_forward`, before norms after them and the sum with the stream.
    `text` is a text, token ids [T] or [B, T], or the arguments of a call by name.
    """
    inputs = Inputs.of(lm, text)
    residual, sublayers = inputs.look(_activations, by_position=by_position)
    shape, count = residual.shape[1:], len(residual) - 1
    filled = {name: np.full((count, *shape), np.nan, np.float32) for name in sublayers}
    for name, found in sublayers.items():
        for layer, values in found.items():
            filled[name][layer] = values
    return ActivationNorms(np.asarray(residual), filled)


def _activations(of: Pass, *, by_position: bool) -> tuple[jax.Array, dict[str, dict[int, jax.Array]]]:
    def size(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1 if by_position else None))

    layers, found = of.of_stack("layers"), {}
    for i, layer in enumerate(layers):
        for name, x in layer.results.items():
            if name != "block":
                found.setdefault(name, {})[i] = size(x)
    stream = [layers[0].entered, *(layer.results["block"] for layer in layers)]
    return jnp.stack([size(x) for x in stream]), found


@dataclasses.dataclass(frozen=True, repr=False)
class ParameterNorms(Arrays):
    """Euclidean norms by layer and kind of parameter, or their ratios.

    what: the quantity.
    layers: [L] by kind (`attention.q_proj.weight`), NaN in layers without it; other stacks have their name before it.
    others: the norm of each parameter around the layers.
    """

    what: str
    layers: dict[str, np.ndarray]
    others: dict[str, float]

    @property
    def total(self) -> float:
        """The norm of all of it together: of a gradient, the `grad_norm` of the metrics."""
        squares = sum(float(np.nansum(values**2)) for values in self.layers.values())
        return float(np.sqrt(squares + sum(value**2 for value in self.others.values())))

    def over(self, other: "ParameterNorms") -> "ParameterNorms":
        """Return the ratios to the norms of `other`; NaN where these are 0."""
        ratio = lambda a, b: np.divide(a, b, out=np.full_like(a, np.nan), where=np.asarray(b) > 0)  # noqa: E731
        layers = {name: ratio(values, other.layers[name]) for name, values in self.layers.items()}
        others = {name: float(ratio(np.array(value), other.others[name])) for name, value in self.others.items()}
        return ParameterNorms(f"{self.what} / {other.what}", layers, others)

    def plot(self) -> "Figure":
        """Return a figure of the values by layer, a curve for each kind; those around the layers are at its sides."""
        figure = new_figure(8.0, max(3.4, 0.9 + 0.17 * (len(self.layers) + len(self.others))))
        axes = clean(figure.add_subplot(xlabel="layer", ylabel=self.what, yscale="log"))
        last, i = max(map(len, self.layers.values()), default=1), -1
        for i, (name, values) in enumerate(self.layers.items()):
            style = STYLES[i // 7 % 3] + "osD^v"[i % 5]
            axes.plot(values, style, color=color_of(i), label=name.removesuffix(".weight"), markersize=3.5, linewidth=1)
        for j, (name, value) in enumerate(self.others.items(), i + 1):
            place = -1 if name.startswith(("embedding", "positions", "token_type", "encoder_")) else last
            label = name.removesuffix(".weight")
            axes.plot([place], [value], "xP*dh"[j % 5], color=color_of(j), label=label, markersize=6)
        axes.set_xticks(
            [-1, *range(0, last, -(-last // 12)), last], ["before", *range(0, last, -(-last // 12)), "after"]
        )
        figure.legend(loc="outside right upper", fontsize=7, frameon=False)
        return figure


def parameter_norms(config: ModelConfig, arrays: Mapping[str, Any], what: str) -> ParameterNorms:
    """Return the norms of arrays by parameter name, stacked over layers as parameters are."""
    squares = {name: np.asarray(value) for name, value in jax.jit(_squares)(dict(arrays)).items()}
    owners, layers, others = layers_with(config), dict[str, np.ndarray](), dict[str, float]()
    for name, values in squares.items():
        stack, _, own = name.partition(".")
        if not is_stacked(name):
            others[name] = float(np.sqrt(values))
            continue
        kind = own if stack == "layers" else name
        layers[kind] = np.full(len(config.stacks()[stack]), np.nan)
        layers[kind][list(owners[name])] = np.sqrt(values)
    return ParameterNorms(what, layers, others)


def _squares(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the sum of squares of each array, of a stacked one by layer."""
    return {
        name: jnp.square(x.astype(jnp.float32)).sum(tuple(range(int(is_stacked(name)), x.ndim)))
        for name, x in arrays.items()
    }


def gradient_norms(lm: Source, text: Text) -> ParameterNorms:
    """Return the norms of the gradient of the mean loss, without dropout and before clipping.

    `text` is a text, token ids [T] or [B, T], or a batch such as `run.batch(step)`, with which `total` is the
    `grad_norm` that the run logs with the step after it (where it has neither dropout nor z-loss).
    """
    if isinstance(text, Mapping) and "targets" in text:
        inputs, batch = Inputs.of(lm, np.zeros((1, 1), np.int32)), dict(text)
    else:
        inputs = Inputs.of(lm, text)
        ids = np.asarray(inputs.arguments.get("tokens", np.zeros((1, 0))))
        if ids.shape[1] < 2 or not inputs.model.config.generates:
            raise UserError("the loss of a text is for decoders, and needs 2 tokens: give a batch of a run")
        batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": np.ones(ids[:, 1:].shape, np.float32)}
        batch["segment_ids"] = np.ones_like(batch["tokens"])
        batch["positions"] = np.broadcast_to(np.arange(ids.shape[1] - 1, dtype=np.int32), batch["tokens"].shape)
    config, compute = inputs.model.config, inputs.model.module.compute
    batch = {name: x for name, x in batch.items() if name in config.batch_fields or name.startswith("source_")}
    with inputs.model.on_mesh():
        found = _gradient(inputs.model.params(), batch, config, compute)
        return parameter_norms(config, found, "gradient norm")


@functools.partial(jax.jit, static_argnums=(2, 3))
def _gradient(params: Params, batch: dict[str, jax.Array], config: ModelConfig, compute: Compute) -> Params:
    batch = {name: shard(x, "batch", "sequence") for name, x in batch.items()}
    return gradient(params, batch, config, compute, AdamW(learning_rate=1.0, warmup_steps=0).hyper(1))


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

    def plot(self) -> "Figure":
        """Return a figure of the ratio by layer."""
        return self.ratio.plot()


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
        update = parameter_norms(config.model, change, "norm of the update")
        parameter = parameter_norms(config.model, before, "norm of the parameter")
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
