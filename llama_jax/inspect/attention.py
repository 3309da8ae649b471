"""Attention maps: the weights with which every query reads every key."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import UserError
from llama_jax.figures import new_figure
from llama_jax.inspect.recorded import Arrays, Inputs, Pass, Source, Text, chosen_layers, drawable
from llama_jax.nn import attention_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {  # stack of blocks, and the sublayer
    "self": ("layers", "attention"),
    "cross": ("layers", "cross_attention"),
    "encoder": ("encoder_layers", "attention"),
}
LEAST_POINTS = 4.5  # of a label that can be read


@dataclasses.dataclass(frozen=True, repr=False)
class AttentionMaps(Arrays):
    """Attention weights of some layers; the rows of queries that see a key sum to 1.

    weights: float32 [L, B, N, T, S], without dropout.
    layers: their numbers, from 0 on.
    queries: texts of the T query tokens, by row of the batch.
    keys: texts of the S key tokens.
    """

    weights: np.ndarray
    layers: tuple[int, ...]
    queries: list[list[str]]
    keys: list[list[str]]

    def plot(self, layer: int | None = None, head: int | None = None, *, row: int = 0) -> "Figure":
        """Return a figure of the heads of a layer, of one `head`, or with neither the mean over heads of every layer.

        `layer` is one of `layers`. Where a panel is too small for its tokens, it has their numbers.
        """
        layer = self.layers[0] if layer is None and (len(self.layers) == 1 or head is not None) else layer
        if layer is None:
            maps = {f"layer {i}": w[row].mean(0) for i, w in zip(self.layers, self.weights, strict=True)}
        elif layer not in self.layers:
            raise UserError(f"layer={layer} must be one of {', '.join(map(str, self.layers))}")
        else:
            heads = self.weights[self.layers.index(layer), row]
            if head is not None and not 0 <= head < len(heads):
                raise UserError(f"head={head} must be from 0 to {len(heads) - 1}")
            chosen = range(len(heads)) if head is None else [head]
            maps = {f"layer {layer}, head {i}": heads[i] for i in chosen}
        return draw_maps(maps, self.queries[row], self.keys[row])


def draw_maps(maps: dict[str, np.ndarray], queries: Sequence[str], keys: Sequence[str]) -> "Figure":
    """Return a figure with a panel for each map [T, S]."""
    from matplotlib.colors import PowerNorm

    columns = 2 if len(maps) == 4 else min(len(maps), 4 if len(maps) > 6 else 3)
    rows, size = -(-len(maps) // columns), min(6.0, 9.0 / columns)
    figure = new_figure(size * columns + 1.2, size * rows + 0.6)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    top, image = max(float(values.max()) for values in maps.values()), None
    for panel, (title, values) in zip(grid.flat, maps.items(), strict=False):
        # A square root: many queries spread their weight over all keys.
        image = panel.imshow(values, cmap="Blues", norm=PowerNorm(0.5, 0, top), interpolation="nearest")
        panel.set_title(title, fontsize=9)
    for panel in grid.flat[len(maps) :]:
        panel.set_axis_off()
    points = min(9.0, 0.75 * 72 * size / max(len(queries), len(keys)))
    if points >= LEAST_POINTS:
        grid[0, 0].set_xticks(range(len(keys)), drawable(keys))
        grid[0, 0].set_yticks(range(len(queries)), drawable(queries))
    for place, panel in enumerate(grid.flat):
        panel.tick_params(labelsize=points if points >= LEAST_POINTS else 7.0)
        if points >= LEAST_POINTS:
            panel.tick_params(axis="x", labelrotation=90)
        if place + columns >= len(maps):  # no panel is below
            panel.tick_params(labelbottom=True)
    figure.supxlabel("key", fontsize=9)
    figure.supylabel("query", fontsize=9)
    assert image is not None
    figure.colorbar(image, ax=grid, shrink=0.6, label="attention weight")
    return figure


def attention_maps(
    lm: Source,
    text: Text,
    layers: int | Sequence[int] | None = None,
    *,
    kind: Literal["self", "cross", "encoder"] = "self",
) -> AttentionMaps:
    """Return the attention weights of a text in all layers, or in `layers`, from the arguments that `attend` receives.

    Mask, window, bias, scale, soft cap and the keys that sparse attention chooses are in them. `text` is a text, token
    ids [T] or [B, T], or the arguments of a call by name. `kind`, of an encoder-decoder, is the decoder's own
    attention, that to the source, or the encoder's. A layer that calls `attend` several times has the heads of all
    calls.

    Raises UserError for layers without attention weights, such as recurrent ones.
    """
    inputs = Inputs.of(lm, text)
    stack, part = KINDS[kind]
    config = inputs.model.config
    if stack not in config.stacks() or (part == "cross_attention" and not config.has_source):
        raise UserError(f"kind={kind!r} is for encoder-decoders: leave it out")
    mixers = [type(mixer).__name__ for mixer, _ in config.stacks()[stack]]
    chosen = chosen_layers(layers, len(mixers))
    found: dict[int, Any] = inputs.look(_weights, stack=stack, part=part, chosen=chosen)
    without = [i for i in chosen or range(len(mixers)) if i not in found]
    if without and (chosen is not None or not found):
        name = mixers[without[0]]
        raise UserError(f"layer {without[0]} has no attention weights: {name} does not call llama_jax.nn.attend")
    if len({weights.shape for weights in found.values()}) > 1:
        raise UserError("the layers have different numbers of heads: give layers= of one kind")
    numbers = tuple(found) if chosen is None else chosen
    weights = np.stack([found[i] for i in numbers])
    keys = {"cross": "source", "encoder": "source"}.get(kind)
    return AttentionMaps(weights, numbers, inputs.labels(keys if kind == "encoder" else None), inputs.labels(keys))


def _weights(of: Pass, *, stack: str, part: str, chosen: tuple[int, ...] | None) -> dict[int, jax.Array]:
    """Return the weights of the chosen layers that have some, by number."""
    own = [layer.calls[part] for layer in of.of_stack(stack)]
    calls = {i: own[i] for i in chosen or range(len(own)) if own[i]}
    return {i: jnp.concatenate([attention_weights(call) for call in found], axis=1) for i, found in calls.items()}
