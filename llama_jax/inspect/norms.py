"""Norms by layer: of activations, gradients and updates."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import UserError
from llama_jax.inspect.recorded import Arrays, Inputs, Pass, Source, Text, draw_curves
from llama_jax.models import Compute, ModelConfig, Params, is_stacked, layers_with
from llama_jax.parallel import shard
from llama_jax.training import AdamW, gradient

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        curves = {}
        for name, values in ({"residual stream": self.residual} | self.sublayers).items():
            mean = np.sqrt((values.reshape(len(values), -1) ** 2).mean(1))
            # The stream is between layers: its first value is before layer 0.
            places = np.arange(len(mean)) - (0.5 if len(mean) == len(self.residual) else 0)
            curves[name.replace("_", "-")] = places, mean
        return draw_curves(curves, "layer", "root mean square")[0]


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

    @property
    def by_layer(self) -> np.ndarray:
        """[L+1], the norm of all parameters of each layer, of one stack after another, and of those around them."""
        stacks: dict[str, Any] = {}
        for name, values in self.layers.items():
            stack = name.partition(".")[0] if is_stacked(name) else "layers"
            stacks[stack] = stacks.get(stack, 0.0) + np.nan_to_num(values) ** 2
        rest = [sum(value**2 for value in self.others.values())]
        return np.sqrt(np.concatenate([*stacks.values(), rest]))

    def plot(self, part: str = "") -> "Figure":
        """Return a figure of the values by layer, a curve for each kind whose name contains `part`.

        Parameters around the layers are at its sides.
        """
        last = max(map(len, self.layers.values()), default=1)
        curves: dict[str, Any] = {name: (np.arange(len(values)), values) for name, values in self.layers.items()}
        for name, value in self.others.items():
            before = name.startswith(("embedding", "positions", "token_type", "encoder_"))
            curves[name] = [-1 if before else last], [value]
        named = {name.removesuffix(".weight"): curve for name, curve in curves.items() if part in name}
        if not named:
            raise UserError(f"part={part!r} is in none of the names: {', '.join(curves)}")
        figure, axes = draw_curves(named, "layer", self.what, width=8.0)
        shown = range(0, last, -(-last // 12))
        axes.set_xticks([-1, *shown, last], ["before", *map(str, shown), "after"])
        return figure


def parameter_norms(config: ModelConfig, arrays: Mapping[str, Any], what: str) -> ParameterNorms:
    """Return the norms of arrays by parameter name, stacked over layers as parameters are."""
    squares = {name: np.asarray(value) for name, value in _squares(dict(arrays)).items()}
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


@jax.jit
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
    if isinstance(text, Mapping) and "branch" in text:
        raise UserError(
            "the batch has pairs of answers, whose loss needs the reference that only training keeps: give a text, or "
            "take grad_norm of the run's metrics"
        )
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
