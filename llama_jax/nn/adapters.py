"""Low-rank adapters of projections: their config, and the context that their dropout draws from."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

from llama_jax.config import Component, UserError
from llama_jax.nn.base import ForwardContext, check_above_zero, check_at_least, check_rate

ALL_PROJECTIONS = "all-linear"

_context: contextvars.ContextVar[ForwardContext | None] = contextvars.ContextVar("adapters", default=None)


@dataclasses.dataclass(frozen=True)
class LoRA(Component):
    """Low-rank adapters: y = x W + (alpha / rank) (x A) B with W frozen (Hu et al. 2022, "LoRA").

    Only A and B are trained. A begins random and B at zero, so that training begins with the model as it is.

    rank: columns of A and rows of B.
    alpha: numerator of the scale.
    targets: projections of the layers, by the end of their dotted name (q_proj, feed_forward.up_proj), or all-linear.
    dropout: rate on the inputs of A, in training.
    rslora: divide alpha by the root of the rank instead (Kalajdzievski 2023).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        check_at_least(self, 1, "rank")
        check_above_zero(self, "alpha")
        check_rate("dropout", self.dropout)
        if isinstance(self.targets, str) or not self.targets:
            raise UserError(f'targets={self.targets!r} must name projections, as in ("q_proj", "v_proj")')

    @property
    def scale(self) -> float:
        """Factor of the product of an adapter's two matrices."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def covers(self, path: str) -> bool:
        """Return whether the projection with this dotted name gets an adapter."""
        return any(target == ALL_PROJECTIONS or f".{path}".endswith(f".{target}") for target in self.targets)


@contextlib.contextmanager
def drawing_from(ctx: ForwardContext) -> Iterator[None]:
    """Let the adapters' dropout draw from this context: projections get activations alone."""
    token = _context.set(ctx)
    try:
        yield
    finally:
        _context.reset(token)


def current_context() -> ForwardContext:
    """Return the context of the layer that is being traced, or one without random numbers."""
    return _context.get() or ForwardContext()
