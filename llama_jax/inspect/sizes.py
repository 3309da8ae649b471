"""Figures of a config alone: bytes of the cache, and how rotary scores decay with the distance."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError
from llama_jax.figures import as_html, clean, color_of, new_figure
from llama_jax.inspect.recorded import Arrays, draw_curves
from llama_jax.models import Model, ModelConfig, cache_bytes, cache_bytes_per_token
from llama_jax.nn import LatentAttention, Rope
from llama_jax.run import Run
from llama_jax.run_config import RunConfig

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def _named(source: Any) -> dict[str, Any]:
    """Return configs by name, of one or several models, runs or configs."""
    named = source if isinstance(source, Mapping) else {"model": source}
    configs = {str(k): v.config if isinstance(v, LanguageModel | Model | Run) else v for k, v in named.items()}
    return {k: v.model if isinstance(v, RunConfig) else v for k, v in configs.items()}


@dataclasses.dataclass(frozen=True, repr=False)
class CacheSizes(Arrays):
    """Exact bytes of the caches of models, computed from shapes.

    lengths: positions, [n].
    batch_sizes: rows, [m].
    bytes: by name, [n, m], of all layers.
    per_token: bytes by name of one more position of a row; 0 for recurrent states.
    """

    lengths: np.ndarray
    batch_sizes: np.ndarray
    bytes: dict[str, np.ndarray]
    per_token: dict[str, int]

    def records(self) -> list[dict[str, Any]]:
        """Return a row for each model, length and batch size."""
        sizes = {name: np.ndenumerate(values) for name, values in self.bytes.items()}
        return [
            {"model": name, "length": int(self.lengths[i]), "batch_size": int(self.batch_sizes[j]), "bytes": int(value),
             "bytes_per_token": self.per_token[name]}
            for name, values in sizes.items()
            for (i, j), value in values
        ]  # fmt: skip

    def to_pandas(self) -> "pd.DataFrame":
        """Return the records as a table of pandas."""
        import pandas as pd

        return pd.DataFrame(self.records())

    def _repr_html_(self) -> str:
        records = self.records()
        return as_html({key: [f"{r[key]:,}" if key != "model" else r[key] for r in records] for key in records[0]})

    def plot(self) -> "Figure":
        """Return a figure of the sizes over the length, a curve for each model and batch size."""
        curves = {
            name if len(self.batch_sizes) == 1 else f"{name}, batch {rows}": (self.lengths, values[:, j] / 2**20)
            for name, values in self.bytes.items()
            for j, rows in enumerate(self.batch_sizes)
        }
        figure, axes = draw_curves(curves, "length (tokens)", "cache (MiB)", xscale="log")
        axes.set_xticks(self.lengths, [f"{n:,}" for n in self.lengths])
        axes.minorticks_off()
        return figure


def kv_cache(
    source: Any,
    lengths: Sequence[int] = (1024, 4096, 16384, 65536),
    batch_sizes: Sequence[int] = (1,),
    *,
    dtype: str = "bfloat16",
) -> CacheSizes:
    """Return the exact bytes that decoding keeps, as `llama_jax.models.cache_bytes` has them.

    `source` is a config, a loaded model, a run, or several by name; nothing is allocated. Recurrent layers keep a state
    of one size, and layers with a window keep all positions. Raises UserError for a model that cannot continue a text.
    """
    found, per_token = {}, {}
    for name, config in _named(source).items():
        if not isinstance(config, ModelConfig):
            raise UserError(f"{name}={type(config).__name__} must be a model config or a loaded model")
        found[name] = np.array([[cache_bytes(config, n, m, dtype) for m in batch_sizes] for n in lengths])
        per_token[name] = cache_bytes_per_token(config, dtype)
    return CacheSizes(np.array(lengths), np.array(batch_sizes), found, per_token)


@dataclasses.dataclass(frozen=True, repr=False)
class RopeDecay(Arrays):
    """Scores of rotated queries and keys by their distance, relative to those of unrotated ones.

    distances: [n], positions between query and key.
    mean: by name, [n], the mean of q.k for a random vector q = k with independent components, which is that of a vector
      of ones: the mean cosine of the pairs' angles.
    spread: by name, [n], the standard deviation over such (normal) vectors.
    bound: by name, [n], mean of the |S_j| that bound the score's size up to a constant (Su et al. 2021, section 3.4.3).
    """

    distances: np.ndarray
    mean: dict[str, np.ndarray]
    spread: dict[str, np.ndarray]
    bound: dict[str, np.ndarray]

    def plot(self) -> "Figure":
        """Return a figure of the mean with its spread, and below it of the bound."""
        figure = new_figure(6.4, 5.0)
        upper, lower = figure.subplots(2, 1, sharex=True)
        for i, (name, mean) in enumerate(self.mean.items()):
            style: dict[str, Any] = {"color": color_of(i), "linewidth": 1.2}
            clean(upper).plot(self.distances, mean, label=name, **style)
            low, high = mean - self.spread[name], mean + self.spread[name]
            upper.fill_between(self.distances, low, high, color=color_of(i), alpha=0.15, linewidth=0)
            clean(lower).plot(self.distances, self.bound[name], **style)
        upper.set_ylabel("q·k / |q||k|, mean ± s.d.")
        lower.set(xlabel="distance (positions)", ylabel="bound: mean |S_j|", ylim=(0, None))
        if len(self.mean) > 1:
            figure.legend(loc="outside upper center", ncols=4, frameon=False)
        return figure


def rope_decay(
    source: Any, distances: int | Sequence[int] | np.ndarray = 512, *, head_dim: int | None = None
) -> RopeDecay:
    """Return how scores of rotary positions depend on the distance.

    `source` is a `Rope` with `head_dim`, a config, a loaded model, a run, or several by name. `distances` are from 0 up
    to a number, or a list. The magnitude of a scaling (YaRN) is in the scores. Raises UserError without a Rope.
    """
    places = np.arange(distances) if isinstance(distances, int) else np.asarray(distances)
    found: list[dict[str, np.ndarray]] = [{}, {}, {}]
    for name, of in _named(source).items():
        rope, size = _rope_of(name, of, head_dim)
        angles = places[:, None] * rope.frequencies(size)
        still = max(0, size - 2 * angles.shape[1]) // 2  # pairs that a smaller rotary_dim leaves as they are
        power = 1.0 if rope.scaling is None else rope.scaling.magnitude() ** 2
        cosines = np.concatenate([power * np.cos(angles), np.ones((len(places), still))], axis=1)
        sums = np.abs(np.cumsum(np.exp(1j * angles), axis=1))
        # The squared length of a pair of normal numbers has mean 2 and variance 4.
        spread = np.sqrt((cosines**2).sum(1)) / cosines.shape[1]
        for values, by_name in zip((cosines.mean(1), spread, sums.mean(1)), found, strict=True):
            by_name[name] = values
    return RopeDecay(places, *found)


def _rope_of(name: str, of: Any, head_dim: int | None) -> tuple[Rope, int]:
    if isinstance(of, Rope):
        size = head_dim or of.rotary_dim
        if size is None:
            raise UserError("a Rope needs head_dim=, the size of a head: 64, say")
        return of, size
    attention = getattr(of, "attention", of)
    rope = getattr(attention, "rope", None)
    if not isinstance(rope, Rope):
        raise UserError(f"{name}={type(of).__name__} has no rotary positions: give a Rope, or a config with one")
    return rope, attention.qk_rope_head_dim if isinstance(attention, LatentAttention) else attention.head_dim
