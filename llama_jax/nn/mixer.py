"""What a piece has to be: the base classes of the configs, and the contracts of what they build."""

from typing import Any

import jax
from flax import nnx

from llama_jax.config import Component
from llama_jax.nn.masks import AttentionMask


class MixerModule(nnx.Module):
    """Mixes information along the sequence: attention, or a recurrence."""

    def __call__(
        self, x: jax.Array, *, positions: jax.Array, mask: AttentionMask, cache: Any = None
    ) -> tuple[Any, ...]:
        """[B, T, D] -> ([B, T, D], cache). With a cache, `mask.q_index` says where in it the T inputs go.

        One that has something to tell training returns auxiliary arrays third, as a feed-forward does.
        """
        raise NotImplementedError

    def init_cache(self, batch: int, length: int, dtype: Any) -> Any:
        """An empty cache: any pytree of arrays with a leading batch dimension."""
        raise NotImplementedError


class Mixer(Component):
    """Config of a mixer."""

    def build(self, width: int, *, rngs: nnx.Rngs) -> MixerModule:
        raise NotImplementedError

    def score_flops(self, context: float) -> float:
        """FLOPs of one token's forward pass beyond its parameters' products, when it sees `context` keys."""
        return 0.0

    @property
    def needs_rng(self) -> bool:
        """Whether training draws random numbers in it (dropout)."""
        return getattr(self, "dropout", 0.0) > 0


class FeedForwardModule(nnx.Module):
    """Acts on every position alone."""

    def __call__(self, x: jax.Array, *, mask: AttentionMask) -> tuple[jax.Array, dict[str, jax.Array]]:
        """[B, T, D] -> ([B, T, D], auxiliary arrays by name; {} where there are none).

        `loss.NAME` is a scalar that training adds to the mean cross-entropy, weighted already; a mean over the rows, so
        that parts of a batch add up. `statistic.NAME` is what the module's `buffer` NAME is updated with. Others are
        metrics: scalars or vectors, whose mean over the layers is logged.
        """
        raise NotImplementedError


class FeedForward(Component):
    """Config of a feed-forward."""

    def build(self, width: int, *, rngs: nnx.Rngs) -> FeedForwardModule:
        raise NotImplementedError

    def idle_parameters(self, width: int) -> int:
        """Matrix parameters that one token does not meet: those of experts that it is not sent to."""
        return 0

    @property
    def needs_rng(self) -> bool:
        """Whether training draws random numbers in it (dropout, jitter)."""
        return getattr(self, "dropout", 0.0) > 0
