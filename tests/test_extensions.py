"""One of each kind of thing is added from outside of the package, and used: what CONTRIBUTING.md promises."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from flax import nnx

import llama_jax
from llama_jax.data import Vocabulary
from llama_jax.data.objectives import Document, Example, Objective
from llama_jax.nn import (
    FeedForward,
    FeedForwardModule,
    Mixer,
    MixerModule,
    Norm,
    Positions,
    PositionsModule,
    Projection,
    child,
    parameter,
)
from llama_jax.training import Optimizer, Schedule


@dataclasses.dataclass(frozen=True)
class RunningMean(Mixer):
    """Each token reads the mean of a projection of all tokens so far.

    scale: factor of the mean.
    """

    scale: float = 1.0

    def build(self, width: int, *, rngs: nnx.Rngs) -> MixerModule:
        return RunningMeanModule(self, width, rngs=rngs)


class RunningMeanModule(MixerModule):
    def __init__(self, config: RunningMean, width: int, *, rngs: nnx.Rngs):
        self.config = config
        self.v_proj = Projection({"embed": width}, {"mlp": width}, bias=False, rngs=child(rngs, "v_proj"))
        self.o_proj = Projection({"mlp": width}, {"embed": width}, bias=False, rngs=child(rngs, "o_proj"))

    def __call__(self, x: jax.Array, *, positions: jax.Array, ctx: Any, cache: Any = None) -> tuple[Any, ...]:
        count = jnp.arange(1, x.shape[1] + 1)[:, None]
        return self.o_proj(jnp.cumsum(self.v_proj(x), axis=1) / count * self.config.scale), cache


@dataclasses.dataclass(frozen=True)
class MaxNorm(Norm):
    """Divide by the largest absolute value."""

    def build(self, width: int, *, rngs: nnx.Rngs) -> nnx.Module:
        return MaxNormModule(width, rngs=rngs)


class MaxNormModule(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.weight = parameter(rngs, "weight", (width,), (None,), std=None)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x / (jnp.abs(x).max(-1, keepdims=True) + 1e-6) * self.weight[...]


@dataclasses.dataclass(frozen=True)
class Ramp(Positions):
    """Add the position, scaled, to every entry of the embedding."""

    def build(self, width: int, *, rngs: nnx.Rngs) -> PositionsModule:
        return RampModule(width)


class RampModule(PositionsModule):
    def __init__(self, width: int):
        self.width = width

    def __call__(self, positions: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.broadcast_to(0.01 * positions[..., None].astype(dtype), (*positions.shape, self.width))


@dataclasses.dataclass(frozen=True)
class Square(FeedForward):
    """The square of a projection, projected back.

    size: width between the two.
    """

    size: int

    def build(self, width: int, *, rngs: nnx.Rngs) -> FeedForwardModule:
        return SquareModule(self, width, rngs=rngs)


class SquareModule(FeedForwardModule):
    def __init__(self, config: Square, width: int, *, rngs: nnx.Rngs):
        self.up_proj = Projection({"embed": width}, {"mlp": config.size}, bias=False, rngs=child(rngs, "up_proj"))
        self.down_proj = Projection({"mlp": config.size}, {"embed": width}, bias=False, rngs=child(rngs, "down_proj"))

    def __call__(self, x: jax.Array, *, ctx: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return self.down_proj(self.up_proj(x) ** 2), {"largest": jnp.abs(x).max()}


@dataclasses.dataclass(frozen=True)
class Backwards(Objective):
    """Every token from those after it.

    share: share of the targets that have a loss.
    """

    share: float = 1.0

    def lengths(self, num_tokens: Any, target_start: Any) -> tuple[np.ndarray, ...]:
        return (np.maximum(np.asarray(num_tokens) - 1, 0),)

    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        tokens = document.tokens[::-1].astype(np.int32)
        length = len(tokens) - 1
        weights = (rng.random(length) < self.share).astype(np.float32)
        return {
            "tokens": tokens[:-1], "targets": tokens[1:], "weights": weights,
            "positions": np.arange(length, dtype=np.int32),
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Halving(Schedule):
    """Halve the learning rate every `period` steps.

    period: steps between two halvings.
    """

    period: float = 2.0

    def factor(self, step: Any, warmup_steps: Any, num_steps: Any, final_fraction: Any) -> Any:
        return 0.5 ** jnp.floor((step - warmup_steps) / self.period)


@dataclasses.dataclass(frozen=True)
class SignDescent(Optimizer):
    """Step by the sign of the gradient, scaled.

    scale: size of a step before the learning rate.
    """

    scale: float = 1.0

    def transform(self) -> optax.GradientTransformation:
        return optax.stateless(lambda updates, _: jax.tree.map(lambda x: self.scale * jnp.sign(x), updates))


PIECES = {
    "model.attention": RunningMean(scale=2.0),
    "model.norm": MaxNorm(),
    "model.positions": Ramp(),
    "model.feed_forward": Square(size=24),
    "data.objective": Backwards(share=0.9),
    "optimizer": SignDescent(learning_rate=1e-2, warmup_steps=1, schedule=Halving(period=1.0)),
}
COMPONENTS = (*(type(piece) for piece in PIECES.values()), Halving)


def test_one_run_with_everything_of_ones_own(tmp_path: Path):
    texts = tiny_run.write_texts(tmp_path / "texts")
    config = llama_jax.override(
        tiny_run.get_config(),
        {
            "data.path": (str(texts),), "data.cache_dir": str(tmp_path / "cache"), "num_steps": 4,
            "logging.sample_prompts": (), "checkpoint.every_steps": 2, **PIECES,
        },
    )  # fmt: skip
    run = llama_jax.train(config, tmp_path / "run", components=COMPONENTS)
    rows = run.metrics()
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["largest"] > 0
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-2, 1e-2, 5e-3, 2.5e-3])

    # What was trained with classes from here is loaded with them, and refused without.
    lm = llama_jax.load(tmp_path / "run", components=COMPONENTS)
    assert lm.config == dataclasses.replace(config.model, vocab_size=lm.config.vocab_size)
    assert np.isfinite(lm.model(jnp.array([[3, 5, 7]]))).all()
    with pytest.raises(llama_jax.UserError, match=r"components=\("):
        llama_jax.load(tmp_path / "run")
    again = llama_jax.open_run(tmp_path / "run", components=COMPONENTS)
    assert again.config == run.config


def test_choices_are_named_on_the_command_line():
    config = llama_jax.override(
        tiny_run.get_config(),
        {
            "model.feed_forward": "Square", "model.feed_forward.size": "8",
            "optimizer": "SignDescent", "optimizer.schedule": "Halving", "optimizer.schedule.period": "3",
        },
        COMPONENTS,
    )  # fmt: skip
    assert config.model.feed_forward == Square(8)
    assert config.optimizer == SignDescent(learning_rate=1e-2, warmup_steps=3, schedule=Halving(3.0))
