"""A run compiles what no run of this process has compiled: counted, for what may and what may not differ."""

import dataclasses
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

from llama_jax.config import override
from llama_jax.models import DecoderConfig
from llama_jax.nn import SwiGLU
from llama_jax.run import Run, RunConfig, hardware, train, training
from llama_jax.run.programs import KEPT, code_of, programs

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled() -> Iterator[Callable[[], int]]:
    """Number of programs that were compiled, or read from the disk, since the last call."""
    events: list[str] = []

    def count() -> int:
        number = events.count(COMPILED)
        events.clear()
        return number

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield count
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_run_like_one_before_compiles_nothing(
    run_config: RunConfig, finished_run: Run, tmp_path: Path, compiled: Callable[[], int]
):
    """Another seed, length, learning rate or period of reports changes nothing that is compiled."""
    config = override(run_config, {"num_steps": 2, "logging.validate_every_steps": 2})
    train(config, tmp_path / "first")
    compiled()
    changes = {"seed": 3, "num_steps": 3, "optimizer.learning_rate": 1e-4, "optimizer.warmup_steps": 1}
    changes |= {"optimizer.weight_decay": 0.0, "checkpoint.every_steps": 1, "logging.every_steps": 2}
    train(override(config, changes), tmp_path / "other")
    assert compiled() == 0


def test_freed_memory_goes_back_before_the_first_step_and_after_validations(
    run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    released: list[int] = []
    for module in (hardware, training):
        monkeypatch.setattr(module, "release_freed_memory", lambda: released.append(1))
    train(override(run_config, {"num_steps": 4, "logging.validate_every_steps": 2}), tmp_path / "run")
    assert len(released) == 1 + 2


def test_programs_belong_to_what_is_compiled(run_config: RunConfig):
    mine = programs(run_config)
    numbers = {"seed": 5, "optimizer.learning_rate": 3e-4, "num_steps": 7, "logging.every_steps": 3}
    assert programs(override(run_config, numbers)) is mine
    for key, value in {"model.hidden_size": 16, "compute.remat": "full", "optimizer.accumulation_steps": 2}.items():
        assert programs(override(run_config, {key: value})) is not mine
    for chunk in range(1, 1 + KEPT):  # a sweep holds few
        programs(override(run_config, {"compute.loss_chunk": chunk}))
    assert programs(run_config) is not mine


SOURCE = """
import dataclasses, functools, math
from llama_jax.nn import SwiGLU

SCALE = 2.0
_HIDDEN = []

def scaled(x):
    return inner(x) * SCALE

def inner(x):
    return x + 1.0

@dataclasses.dataclass(frozen=True)
class Own(SwiGLU):
    share: float = 1.0

    def build(self, *args, **kwargs):
        return (lambda: [scaled(part) for part in args])()
"""


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Callable[..., types.ModuleType]:
    """Run source as a notebook's cell, in the namespace of those before."""
    module = types.ModuleType("cells_of_a_notebook")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def run(source: str) -> types.ModuleType:
        exec(compile(source, "<cell>", "exec"), module.__dict__)
        return module

    return run


def with_own(config: RunConfig, kind: type[SwiGLU]) -> RunConfig:
    assert isinstance(config.model, DecoderConfig)
    piece = kind(intermediate_size=48, bias=False)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, feed_forward=piece))


@pytest.mark.parametrize(
    "change",
    [
        "SCALE = 3.0",
        "def scaled(x):\n    return x",
        "def inner(x):\n    return x + 2.0",
        "Own.build = lambda self, *args, **kwargs: None",
        "Own.build.__code__ = (lambda self, *args, **kwargs: 1).__code__",
        SOURCE,  # another class of the same name
    ],
)
def test_code_that_was_changed_is_not_hidden_by_programs_of_before(
    run_config: RunConfig, cell: Callable[..., types.ModuleType], change: str
):
    config = with_own(run_config, cell(SOURCE).Own)
    key = code_of(config), config.model
    cell("number = 1\n_HIDDEN.append(1)")
    assert (code_of(config), config.model) == key
    config = with_own(run_config, cell(change).Own)
    assert (code_of(config), config.model) != key


def test_code_of_the_package_is_not_looked_at(run_config: RunConfig):
    assert code_of(run_config) == frozenset()
