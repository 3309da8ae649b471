"""`SamplingConfig`: all that a user says about how a prompt is continued, as plain checked values."""

import dataclasses
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from llama_jax.config import UserError

if TYPE_CHECKING:
    from llama_jax.sampling.sampler import Control

LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How a prompt is continued.

    Whatever is given is applied in the order of transformers' `generate` (`sampler.py`).

    max_new_tokens: new tokens of a text, at most.
    temperature: divides the logits; 0 is greedy.
    top_k: only the K most probable tokens.
    top_p: only the most probable tokens that together make up P (Holtzman et al. 2020).
    seed: of the draws, 0 to 2**64 - 1.
    stop_ids: token ids that end a text, and are kept.
    controls: further functions `(logits [B, V], written) -> logits`, before temperature, top-k and top-p.
    """

    max_new_tokens: int = 64
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    controls: "tuple[Control, ...]" = ()

    @classmethod
    def of(cls, **values: Unpack["SamplingOptions"]) -> "SamplingConfig":
        """Return the config of a user's values, numbers of numpy and JAX among them. Raises UserError for others."""
        known: dict[str, Any] = dict(values)
        for name, whole in NUMBERS.items():
            if known.get(name) is not None:
                known[name] = number(name, known[name], whole=whole)
        known["stop_ids"] = token_ids("stop_ids", known.get("stop_ids", ()))
        known["controls"] = tuple(known.get("controls", ()))
        return cls(**known)

    def __post_init__(self) -> None:
        """Check the values. Raises UserError."""
        self._check("max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        self._check("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or above")
        self._check("top_k", self.top_k is None or self.top_k >= 1, "at least 1")
        self._check("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1")
        self._check("seed", 0 <= self.seed < 2**64, "from 0 to 2**64 - 1")

    def _check(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise UserError(f"{name}={getattr(self, name)} must be {what}")


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingConfig` as keyword arguments."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    stop_ids: Any
    controls: "Iterable[Control]"


NUMBERS = {"max_new_tokens": True, "temperature": False, "top_k": True, "top_p": False, "seed": True}


def number(name: str, value: Any, *, whole: bool = False) -> Any:
    """Return a user's number as Python's own, also of numpy's and JAX's scalars. Raises UserError for other values."""
    found = value.item() if getattr(value, "shape", None) == () else value
    if isinstance(found, bool) or not isinstance(found, int if whole else int | float):
        raise UserError(f"{name}={value!r} must be a {'whole ' if whole else ''}number")
    return found


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Return the ids of a value that is None, one id or several. Raises UserError for other values."""
    try:
        given = () if value is None else value if isinstance(value, Iterable) else (value,)
        found = tuple(operator.index(i.item() if hasattr(i, "item") else i) for i in given)
    except TypeError:
        found = (LARGEST + 1,)
    if not all(-LARGEST - 1 <= i <= LARGEST for i in found):
        raise UserError(f"{name}={value!r} must be a token id or a list of them")
    return found
