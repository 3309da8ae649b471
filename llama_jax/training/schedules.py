"""Learning-rate schedules as components: the factor of the peak after the warm-up.

The formulas are those of optax, which takes its numbers as Python's: here they are traced, so that a sweep over them
compiles once. A schedule of one's own is a frozen dataclass that derives from `Schedule`.
"""

import abc
import dataclasses
from typing import override

import jax
import jax.numpy as jnp

from llama_jax.config import Component, UserError

type Scalar = jax.Array | float


class Schedule(Component, abc.ABC):
    """Base of the schedules. All have the optimizer's linear warm-up before them."""

    @abc.abstractmethod
    def factor(self, step: Scalar, warmup_steps: Scalar, num_steps: Scalar, final_fraction: Scalar) -> Scalar:
        """Return the learning rate of the update from `step` to `step + 1`, as a fraction of the peak.

        All are float32 scalars, and so are the fields of the schedule that are numbers; results before `warmup_steps`
        are not used.
        """


def progress(step: Scalar, warmup_steps: Scalar, num_steps: Scalar) -> Scalar:
    """Return the fraction of the steps after the warm-up that lie behind, from 0 to 1."""
    return jnp.clip((step - warmup_steps) / jnp.maximum(num_steps - warmup_steps, 1), 0, 1)


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine down to the final fraction (Loshchilov and Hutter 2017, without restarts)."""

    @override
    def factor(self, step: Scalar, warmup_steps: Scalar, num_steps: Scalar, final_fraction: Scalar) -> Scalar:
        done = progress(step, warmup_steps, num_steps)
        return final_fraction + (1 - final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * done))


@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
    """A line down to the final fraction."""

    @override
    def factor(self, step: Scalar, warmup_steps: Scalar, num_steps: Scalar, final_fraction: Scalar) -> Scalar:
        return 1 - (1 - final_fraction) * progress(step, warmup_steps, num_steps)


@dataclasses.dataclass(frozen=True)
class InverseSqrt(Schedule):
    """The inverse square root of the step, without an end (Vaswani et al. 2017, equation 3)."""

    @override
    def factor(self, step: Scalar, warmup_steps: Scalar, num_steps: Scalar, final_fraction: Scalar) -> Scalar:
        return jnp.sqrt(jnp.maximum(warmup_steps, 1) / (step + 1))


@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
    """The peak, without an end."""

    @override
    def factor(self, step: Scalar, warmup_steps: Scalar, num_steps: Scalar, final_fraction: Scalar) -> Scalar:
        return jnp.ones_like(step)


@dataclasses.dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """The peak, and at the end a line down to the final fraction (Hu et al. 2024, section 4).

    decay_fraction: of the steps after the warm-up, those of the decay.
    """

    decay_fraction: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.decay_fraction <= 1:
            raise UserError(f"decay_fraction={self.decay_fraction} must be above 0 and at most 1")

    @override
    def factor(self, step: Scalar, warmup_steps: Scalar, num_steps: Scalar, final_fraction: Scalar) -> Scalar:
        before = 1 - self.decay_fraction
        decayed = jnp.clip((progress(step, warmup_steps, num_steps) - before) / self.decay_fraction, 0, 1)
        return 1 - (1 - final_fraction) * decayed


def schedule_of_name(name: str) -> Schedule:
    """Return the schedule that a config names in lower case, as all did before schedules were components.

    Raises UserError for an unknown name.
    """
    known: dict[str, type[Schedule]] = {
        "cosine": Cosine, "linear": Linear, "inverse_sqrt": InverseSqrt, "constant": Constant
    }  # fmt: skip
    if name not in known:
        raise UserError(f"schedule={name!r} must be a schedule, such as Cosine() or Linear()")
    return known[name]()
