"""Jitted programs of a run, kept for the next runs of this process: the same config and code compile nothing.

A program is kept by what it is compiled for: the model, how it is computed, and the code of components from outside of
the package. `jax.jit` itself tells shapes, shardings and kinds of optimizers apart. Few are kept, so that the memory of
many different runs stays flat; `jax.clear_caches()` makes JAX compile all of them again.
"""

import contextlib
import dataclasses
import dis
import functools
import sys
import sysconfig
import types
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import jax

from llama_jax.models import Compute, ModelConfig, buffers
from llama_jax.parallel import platform
from llama_jax.run_config import RunConfig
from llama_jax.training import (
    Batch,
    PreflightFailed,
    check_pieces,
    compiler_options,
    init_state,
    make_eval_step,
    make_train_step,
    preflight,
)

KEPT = 8  # configs
# Code in these directories does not change while a process runs.
INSTALLED = (str(Path(__file__).parents[1]), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))


@dataclasses.dataclass(frozen=True)
class Programs:
    """Programs of a run: its steps, and `init_state` of parameters and hyper-parameters."""

    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]
    init_state: Callable[..., Any]


def programs(config: RunConfig) -> Programs:
    """Return the programs of a config, those of an earlier run where it has the same."""
    model, accumulation_steps = config.model, config.optimizer.accumulation_steps
    return _programs(model, config.compute, accumulation_steps, platform(), code_of(config))


@functools.lru_cache(KEPT)
def _programs(
    model: ModelConfig, compute: Compute, accumulation_steps: int, platform: str, code: frozenset[Hashable]
) -> Programs:
    options = compiler_options(model, platform)
    return Programs(
        make_train_step(model, compute, accumulation_steps=accumulation_steps, compiler_options=options),
        make_eval_step(model, compute),
        jax.jit(functools.partial(init_state, buffer_names=frozenset(buffers(model)))),
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
    """Return the code of the components from outside of the package, and of what it names, for comparison.

    A class that is defined again is another one, but a function that it calls may be defined again, and a class be
    changed in place, as notebooks do: programs of before would hide it.
    """
    found: set[Hashable] = set()
    seen: dict[int, Any] = {}
    todo = [("", kind) for kind in _kinds((config.model, config.optimizer))]
    while todo:
        name, value = todo.pop()
        if isinstance(value, str | int | float | tuple):
            with contextlib.suppress(TypeError):  # a tuple of what has no hash
                found.add((name, value))
        value = value.fget if isinstance(value, property) else value
        value = getattr(value, "__wrapped__", value) if callable(value) else value
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, type) and not _installed(sys.modules.get(value.__module__)):
            todo += [item for kind in value.__mro__[:-1] for item in vars(kind).items()]
        elif isinstance(value, functools.partial):
            todo += [(name, part) for part in (value.func, *value.args, *value.keywords.values())]
        elif isinstance(value, types.FunctionType) and not value.__code__.co_filename.startswith(INSTALLED):
            found.add(value.__code__)
            todo += _named(value)
    return frozenset(found)


def _named(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function uses from outside of it: its closure, globals, and attributes of modules that are not
    installed.
    """
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a variable without a value
            yield "", cell.cell_contents
    codes = [function.__code__]
    for code in codes:
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    instructions = [instruction for code in codes for instruction in dis.get_instructions(code)]
    attributes = {i.argval for i in instructions if i.opname in ("LOAD_ATTR", "LOAD_METHOD")}
    for name in {i.argval for i in instructions if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}:
        value = function.__globals__.get(name)
        yield name, value
        if isinstance(value, types.ModuleType) and not _installed(value):
            yield from ((attribute, vars(value)[attribute]) for attribute in attributes if attribute in vars(value))


def _kinds(value: Any) -> Iterator[type]:
    """Yield the classes of the dataclasses in a config."""
    if dataclasses.is_dataclass(value):
        yield type(value)
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, list | tuple):
        for part in value:
            yield from _kinds(part)


def _installed(module: types.ModuleType | None) -> bool:
    """Return whether a module is one of the package, of Python or installed."""
    file = getattr(module, "__file__", None) or ""
    return getattr(module, "__name__", None) in sys.builtin_module_names or file.startswith(INSTALLED)
