"""Jitted programs of a run, kept for the next runs of this process: the same config and code compile nothing.

A program is kept by what it is compiled for: the model, how it is computed, and the code of components from outside of
the package. `jax.jit` itself tells shapes, shardings and kinds of optimizers apart. Few are kept, so that the memory of
many different runs stays flat; `jax.clear_caches()` makes JAX compile all of them again.
"""

import dataclasses
import functools
import sys
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax

from llama_jax.data import Preference
from llama_jax.models import Compute, ModelConfig, frozen
from llama_jax.parallel import platform
from llama_jax.run_config import RunConfig
from llama_jax.training import (
    Batch,
    PreflightFailed,
    check_pieces,
    compiler_options,
    copies_reference,
    init_state,
    make_eval_step,
    make_train_step,
    preflight,
)

KEPT = 8  # configs


@dataclasses.dataclass(frozen=True)
class Programs:
    """Programs of a run: its steps, and `init_state` of parameters and hyper-parameters."""

    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]
    init_state: Callable[..., Any]


def programs(config: RunConfig) -> Programs:
    """Return the programs of a config, those of an earlier run where it has the same."""
    model, accumulation_steps = config.model, config.optimizer.accumulation_steps
    return _programs(model, config.compute, accumulation_steps, preference_of(config), platform(), code_of(config))


def preference_of(config: RunConfig) -> Preference | None:
    """Return the objective where it is a loss of pairs, else None."""
    objective = config.data.objective
    return objective if isinstance(objective, Preference) else None


@functools.lru_cache(KEPT)
def _programs(
    model: ModelConfig,
    compute: Compute,
    accumulation_steps: int,
    preference: Preference | None,
    platform: str,
    code: frozenset[Hashable],
) -> Programs:
    options, of_pairs = compiler_options(model, platform), {"preference": preference}
    reference = copies_reference(model, preference)
    return Programs(
        make_train_step(model, compute, accumulation_steps=accumulation_steps, compiler_options=options, **of_pairs),
        make_eval_step(model, compute, **of_pairs),
        jax.jit(functools.partial(init_state, buffer_names=frozen(model), reference=reference)),
    )


class RunFailed(RuntimeError):
    """The run cannot go on; the command line exits with 1."""


def checked(config: RunConfig, batch: Batch) -> list[str]:
    """Return lines for the log about the checks of a model on a batch of this shape, which are done once.

    Raises UserError as `check_pieces` does, and RunFailed where `preflight` fails.
    """
    shapes = tuple((name, jax.typeof(value)) for name, value in batch.items())
    samples = bool(config.logging.sample_prompts)
    found = _found(config.model, config.compute, samples, shapes, jax.sharding.get_mesh(), code_of(config))
    if not found:
        lines = check_pieces(config.model, config.compute, batch, samples=samples)
        try:
            agreements = preflight(config.model, config.compute, batch)
        except PreflightFailed as error:
            raise RunFailed(str(error)) from error
        for agreement in agreements:
            error = max(agreement.errors.values())
            lines.append(f"attention kernel '{agreement.kernel}' agrees with the reference: relative error {error:.1e}")
        found.append(lines)
    return found[0]


@functools.lru_cache(KEPT)
def _found(*key: Hashable) -> list[list[str]]:
    """Return the list for the lines of a check."""
    return []


def code_of(config: RunConfig) -> frozenset[Hashable]:
    """Return the code of the modules that the config's components come from, without the package's, for comparison.

    A class that is defined again is another one, but a function that it calls may be defined again in a notebook, and a
    class be changed in place: programs of before would hide it.
    """
    codes: list[types.CodeType] = []
    names: dict[str, Any] = {}
    for kind in set(_kinds((config.model, config.optimizer))):
        if not kind.__module__.startswith("llama_jax."):
            # What its methods see; a class may be of a file that was executed and is no module (`runpy`).
            functions = [part for part in vars(kind).values() if isinstance(part, types.FunctionType)]
            for seen in (vars(sys.modules.get(kind.__module__, kind)), *(f.__globals__ for f in functions)):
                names |= seen
            names[kind.__name__] = kind
    for value in [*names.values()]:
        for part in vars(value).values() if isinstance(value, type) else (value,):
            function = getattr(part, "fget", getattr(part, "__wrapped__", part)) if callable(part) else part
            codes += [function.__code__] if isinstance(function, types.FunctionType) else []
    for code in codes:
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    used = {name: names.get(name) for code in codes for name in code.co_names}
    return frozenset([*codes, *((name, x) for name, x in used.items() if isinstance(x, str | int | float))])


def _kinds(value: Any) -> Iterator[type]:
    """Yield the classes of the dataclasses in a config."""
    if dataclasses.is_dataclass(value):
        yield type(value)
        value = tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    for part in value if isinstance(value, tuple) else ():
        yield from _kinds(part)
