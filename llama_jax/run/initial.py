"""The first values of a run's parameters: drawn, or those of a model that is there."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.checkpoint import config_of, load
from llama_jax.config import UserError
from llama_jax.models import ModelConfig, Params, abstract_params, initialize
from llama_jax.run_config import RunConfig

EMBEDDING = "embedding.weight"
NAMED = 8  # parameters that a line names


@dataclasses.dataclass(frozen=True)
class Inheritance:
    """Of a model's parameters, by name: those taken from other weights, the rest, and what of the weights is not."""

    taken: tuple[str, ...]
    new: tuple[str, ...]
    left: tuple[str, ...]

    def describe(self, path: str) -> list[str]:
        """As lines of a run's log."""
        lines = [f"{len(self.taken)} parameters begin as in '{path}'"]
        for names, what in ((self.new, "are new"), (self.left, f"of '{path}' are left out")):
            if names:
                more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
                lines.append(f"{', '.join(names[:NAMED])}{more} {what}")
        return lines


def inheritance(config: RunConfig, components: Sequence[type] = ()) -> Inheritance:
    """What `config.model` takes of the weights of `config.init_from`: parameters of the same name and shape.

    Reads no weights. Raises UserError where there are none, and where the embedding is not among them.
    """
    assert config.init_from is not None
    found, wanted = (_shapes(c) for c in (config_of(config.init_from, components), config.model))
    taken = tuple(name for name in wanted if found.get(name) == wanted[name])
    if EMBEDDING not in taken:
        shapes = [shapes.get(EMBEDDING, "missing") for shapes in (found, wanted)]
        raise UserError(
            f"init_from='{config.init_from}' has another embedding than model ({shapes[0]}, not {shapes[1]}): give a "
            "model of its sizes"
        )
    new, left = (tuple(name for name in names if name not in taken) for names in (wanted, found))
    return Inheritance(taken, new, left)


def first_params(config: RunConfig, components: Sequence[type] = ()) -> tuple[Params, list[str]]:
    """The parameters before the first step, on the current mesh, and what there is to say of them."""
    params = initialize(config.model, config.seed)
    if config.init_from is None:
        return params, []
    inherited = inheritance(config, components)
    found = load(config.init_from, dtype="float32", components=components).model.params()
    return params | {name: found[name] for name in inherited.taken}, inherited.describe(config.init_from)


def _shapes(config: ModelConfig) -> Mapping[str, Any]:
    return {name: a.shape for name, a in abstract_params(config).items()}
