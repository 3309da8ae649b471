"""The inputs of a model that is looked into, and records of its layers in a forward pass."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError
from llama_jax.figures import clean, color_of, new_figure
from llama_jax.models import Layers, Model
from llama_jax.nn import Call, recording, unzigzag
from llama_jax.run import Run
from llama_jax.sampling import encode_prompt
from llama_jax.tokenizers import Tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

type Source = LanguageModel | Model | Run
type Text = str | Sequence[Any] | np.ndarray | jax.Array | Mapping[str, Any]
VISIBLE = str.maketrans({" ": "·", "\n": r"\n", "\t": r"\t", "\r": r"\r"})
NO_TEXT = re.compile("[\0-\x1f\x7f\udc80-\udcff]")  # control characters, and bytes that are no UTF-8 (surrogateescape)
IDS = ("target", "tokens")  # arguments with the ids that the last stack reads


class Arrays:
    """Base of results: shown by names, types and shapes."""

    def __repr__(self) -> str:
        def shown(value: Any) -> str:
            if isinstance(value, np.ndarray):
                return f"{value.dtype}{list(value.shape)}"
            if isinstance(value, dict):
                return "{" + ", ".join([*map(str, value)][:3]) + (f", ... {len(value)}" if len(value) > 3 else "") + "}"
            return repr(value)

        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return (
            f"{type(self).__name__}({', '.join(f'{k}={shown(v)}' for k, v in values.items() if type(v) is not list)})"
        )


def check_row(row: int, num_rows: int) -> None:
    """Raise UserError for a row that the batch does not have."""
    if not 0 <= row < num_rows:
        raise UserError(f"row={row} must be from 0 to {num_rows - 1}")


@dataclasses.dataclass
class Layer:
    """Records of one block: calls of `attend` and results by sublayer, and its input, of a trace that is under way."""

    stack: str
    entered: jax.Array
    calls: dict[str, list[Call]] = dataclasses.field(default_factory=dict)
    results: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    aux: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Pass:
    """A forward pass that is traced: module, arguments of its call, result, and the layers of all stacks."""

    module: Any
    arguments: dict[str, jax.Array]
    result: jax.Array
    layers: list[Layer]

    def of_stack(self, stack: str) -> list[Layer]:
        """Return the layers of a stack."""
        return [layer for layer in self.layers if layer.stack == stack]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A model, the arguments of its call, and its tokenizer, which may be missing."""

    model: Model
    arguments: dict[str, Any]
    tokenizer: Tokenizer | None

    @staticmethod
    def of(source: Source, text: Text) -> "Inputs":
        """Return the inputs for a text, for ids [T] or [B, T], or for the arguments of a call by name.

        A text has the special tokens that the tokenizer's files put around a prompt. Raises UserError.
        """
        lm = source.load() if isinstance(source, Run) else source
        model, tokenizer = (lm.model, lm.tokenizer) if isinstance(lm, LanguageModel) else (lm, None)
        if not isinstance(model, Model):
            raise UserError(f"lm={type(lm).__name__} must be a loaded model or a run: llama_jax.load(...)")
        if isinstance(text, str):
            if tokenizer is None:
                raise UserError("a text needs a tokenizer, and the model has none: give token ids")
            if model.config.has_source:
                raise UserError("this model reads a source and a target: give {'source': ids, 'target': ids}")
            text = encode_prompt(model.config, tokenizer, text)
        arrays = {name: np.asarray(x) for name, x in (text if isinstance(text, Mapping) else {"tokens": text}).items()}
        arrays = {name: x[None] if x.ndim == 1 else x for name, x in arrays.items()}
        return Inputs(model, model.inputs(**arrays), tokenizer)

    def labels(self, name: str | None = None) -> list[list[str]]:
        """Return a short visible text for each id of the argument `name` (None: of the last stack's), by row."""
        name = name or next(name for name in IDS if name in self.arguments)
        return [texts_of(self.tokenizer, row) for row in np.asarray(self.arguments[name]).tolist()]

    def look[R](self, take: Callable[..., R], **static: Any) -> R:
        """Return `take(forward_pass, **static)`, jitted, in numpy."""
        return jax.tree.map(np.asarray, self.model.run(_look, self.arguments, take=take, **static))


def _look(module: Any, arguments: dict[str, Any], *, take: Callable[..., Any], **static: Any) -> Any:
    # What is recorded must be of this trace: not of one within it, of a scan or of rematerialization.
    module.compute = dataclasses.replace(module.compute, remat="none")
    for name in module.stack_names:
        setattr(module, name, Layers(name, list(getattr(module, name).blocks())))
    found: list[Layer] = []
    layer, calls = Layer("", jax.numpy.zeros(())), list[Call]()

    def keep(name: str, value: Any) -> None:
        nonlocal layer
        if name == "attend":
            calls.append(value)
        elif name == "stack":
            layer = Layer(value[0], unzigzag(value[1]))
        elif name == "block":
            x, layer.aux = value
            layer.results["block"] = unzigzag(x)
            found.append(layer)
            layer = Layer(layer.stack, layer.results["block"])
        else:
            layer.results[name], layer.calls[name] = unzigzag(value), [*calls]
            calls.clear()

    with recording(keep):
        result = module(**arguments)
    return take(Pass(module, arguments, result, found), **static)


def chosen_layers(layers: int | Sequence[int] | None, num_layers: int) -> tuple[int, ...] | None:
    """Return layer numbers from 0 on, of which negative ones count from the end. Raises UserError."""
    if layers is None:
        return None
    numbers = [layers] if isinstance(layers, int) else list(layers)
    if not numbers or any(not -num_layers <= i < num_layers for i in numbers):
        raise UserError(f"layers={layers!r} must be numbers from 0 to {num_layers - 1}")
    return tuple(i % num_layers for i in numbers)


def texts_of(tokenizer: Tokenizer | None, ids: Sequence[int], *, alone: bool = False) -> list[str]:
    """Return a visible text for each of the ids, each `alone` or one after another.

    Special tokens are their names. A character of several tokens is the text of the last one, and the bytes before it
    are written as `<0xE4>`, as are control characters.
    """
    if tokenizer is None:
        return list(map(str, ids))
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    before, texts = b"", list[str]()
    for i in ids:
        before = b"" if alone else before
        raw, text = (tokenizer.token_bytes[i] if i < tokenizer.vocab_size else str(i).encode()), names.get(i, "")
        if not text:
            try:
                text, before = (before + raw).decode(), b""
            except UnicodeDecodeError as error:
                text = raw.decode(errors="surrogateescape")
                before = (before + raw)[error.start :] if "end of data" in error.reason else b""
        text = NO_TEXT.sub(lambda found: f"<0x{ord(found[0]) & 0xFF:02X}>", text.translate(VISIBLE))
        texts.append(text or "�")
    return texts


def draw_curves(
    curves: Mapping[str, tuple[Any, np.ndarray]],
    xlabel: str,
    ylabel: str,
    *,
    width: float = 6.8,
    xscale: str = "linear",
) -> tuple["Figure", "Axes"]:
    """Return a figure and its axes with positive values over x on a logarithmic scale, a curve for each name."""
    columns = 1 + len(curves) // 24
    figure = new_figure(width + 2 * columns - 2, max(3.4, 0.6 + 0.17 * -(-len(curves) // columns)))
    axes = clean(figure.add_subplot(xlabel=xlabel, ylabel=ylabel, xscale=xscale, yscale="log"))
    for i, (name, (x, y)) in enumerate(curves.items()):
        style = {
            "color": color_of(i),
            "linestyle": ("-", "--", ":", "-.")[i // 7 % 4],
            "marker": "osD^vP*"[i % 7] if len(x) < 25 else "",
        }
        axes.plot(x, y, label=name, markersize=4, linewidth=1.2, **style)
    from matplotlib.ticker import LogLocator  # after `new_figure`, which says so where matplotlib is missing

    low, high = axes.get_ylim()
    if high < 100 * low:  # powers of 10 alone would be too few marks
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    if xscale == "linear":
        axes.locator_params(axis="x", integer=True)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False, ncols=columns)
    return figure, axes


def drawable(texts: Sequence[str], longest: int = 14) -> list[str]:
    """Return texts for matplotlib: short, without its markup, and with the codes of characters that its font lacks."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(None))  # type: ignore[arg-type]
    shown = ("".join(c if font.get_char_index(ord(c)) else ascii(c)[1:-1] for c in text) for text in texts)
    return [(text if len(text) <= longest else text[: longest - 1] + "…").replace("$", r"\$") for text in shown]
