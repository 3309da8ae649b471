"""The logit lens: what the head reads from the hidden states between the layers."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import UserError
from llama_jax.figures import new_figure
from llama_jax.inspect.recorded import Arrays, Inputs, Pass, Source, Text, check_row, drawable, texts_of
from llama_jax.nn import ForwardContext
from llama_jax.parallel import replicate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW = 12  # at most so many tokens of the text in one row of a figure


@dataclasses.dataclass(frozen=True, repr=False)
class LogitLens(Arrays):
    """The next token by the final norm and the head, from the embeddings (row 0) and from the result of each layer.

    The last row has the model's own predictions.

    token_ids: [L+1, B, T, k], the most probable tokens, best first.
    probabilities: [L+1, B, T, k], theirs.
    target_probabilities: [L+1, B, T-1], that of the token that follows in the text.
    target_ranks: [L+1, B, T-1], the number of tokens that are more probable than that; 0 is the best.
    inputs: texts of the tokens read, by row of the batch.
    texts: texts of `token_ids`, [L+1, B, T, k].
    """

    token_ids: np.ndarray
    probabilities: np.ndarray
    target_probabilities: np.ndarray
    target_ranks: np.ndarray
    inputs: list[list[str]]
    texts: np.ndarray

    def plot(self, *, row: int = 0) -> "Figure":
        """Return a figure with the best token of each layer and position, coloured by its probability.

        A frame is around those that follow in the text. Long texts have several rows of panels.
        """
        check_row(row, len(self.inputs))
        num_rows, length = self.token_ids.shape[0], self.token_ids.shape[2]
        width = -(-length // (panels := -(-length // ROW)))  # rows of equal length
        figure = new_figure(1.6 + 0.52 * max(width, 8), panels * (0.9 + 0.25 * num_rows) + 0.3)
        grid, image = figure.subplots(panels, 1, squeeze=False)[:, 0], None
        for panel, start in zip(grid, range(0, length, width), strict=True):
            end = min(start + width, length)
            best = self.probabilities[:, row, start:end, 0]
            image = panel.imshow(best, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
            panel.set_xlim(-0.5, width - 0.5)
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_xticks(range(end - start), drawable(self.inputs[row][start:end], 9), fontsize=8, rotation=35)
            panel.set_yticks(range(num_rows), ["embedding", *range(num_rows - 1)], fontsize=8)
            for layer, place in np.ndindex(best.shape):
                text = drawable([self.texts[layer, row, start + place, 0]], 7)[0]
                color = "white" if best[layer, place] > 0.6 else "black"
                panel.text(place, layer, text, ha="center", va="center", fontsize=7.5, color=color)
                at = start + place
                if at < length - 1 and self.target_ranks[layer, row, at] == 0:
                    box = {"fill": False, "edgecolor": (0.84, 0.37, 0), "linewidth": 1.2}
                    panel.add_patch(_rectangle((place - 0.47, layer - 0.45), 0.94, 0.9, **box))
        figure.supylabel("layer", fontsize=9)
        figure.supxlabel("token read (framed: the best is the one that follows)", fontsize=9)
        assert image is not None
        figure.colorbar(image, ax=list(grid), label="probability", shrink=0.9 / panels, anchor=(0.0, 1.0))
        return figure


def _rectangle(*arguments: Any, **options: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(*arguments, **options)


def logit_lens(lm: Source, text: Text, *, top_k: int = 5) -> LogitLens:
    """Return the predictions of every layer's hidden states for a text (nostalgebraist 2020, "the logit lens").

    `text` is a text, token ids [T] or [B, T], or the arguments of a call by name. Raises UserError for an encoder.
    """
    inputs = Inputs.of(lm, text)
    config = inputs.model.config
    if not config.generates:
        raise UserError(f"{type(config).__name__} does not predict the next token: a logit lens is for decoders")
    if not 1 <= top_k <= config.vocab_size:
        raise UserError(f"top_k={top_k} must be from 1 to {config.vocab_size}")
    found: Any = inputs.look(_predictions, top_k=top_k, name="target" if config.has_source else "tokens")
    ids = found[0]
    texts = np.array(texts_of(inputs.tokenizer, ids.ravel().tolist(), alone=True), object).reshape(ids.shape)
    return LogitLens(*found, inputs=inputs.labels(), texts=texts)


def _predictions(of: Pass, *, top_k: int, name: str) -> tuple[jax.Array, ...]:
    """Return ids and probabilities of the best, and probability and rank of the next token, of every layer."""
    own = of.of_stack("layers")
    hidden = [own[0].entered, *(layer.results["block"] for layer in own[:-1])]
    found = []
    for states in (*hidden, None):
        # The last is the call's own result.
        scores = of.result if states is None else of.module.logits(of.module.final(states, ForwardContext()))
        chances = jax.nn.softmax(replicate(scores))
        best, ids = jax.lax.top_k(chances, top_k)
        target = jnp.take_along_axis(chances[:, :-1], replicate(of.arguments[name])[:, 1:, None], axis=2)
        found.append((ids, best, target[..., 0], (chances[:, :-1] > target).sum(-1)))
    return tuple(jnp.stack(values) for values in zip(*found, strict=True))
