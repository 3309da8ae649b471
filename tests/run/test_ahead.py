"""A run's first step is compiled once, while its text is prepared; a process that ends meanwhile ends in order."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from llama_jax.config import override
from llama_jax.run import RunConfig, train, training
from llama_jax.stopping import COMPILING

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ["jit(init_params)", "jit(init_state)", "jit(train_step)"]


def ahead() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == COMPILING]


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The programs that were compiled, or read from the disk, in this order."""
    names: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(kwargs.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mesh.fsdp": 4, "mesh.tensor": 2},
        {"data.objective": "SpanCorruption", "data.objective.source_length": 32, "tokenizer.vocab_size": 304,
         "data.objective.num_sentinels": 2, "data.packing": "best_fit", "data.objective.start_token": "bos"},
    ],
)  # fmt: skip
def test_the_step_is_compiled_once_before_the_data_is_there(
    changes: dict[str, Any],
    run_config: RunConfig,
    tmp_path: Path,
    compiled: list[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """The types that the thread assumes are those of the call, for every kind of batch and mesh."""
    jax.clear_caches()
    original, before = training.prepare, list[str]()

    def prepare(*args: Any) -> Any:
        for thread in ahead():
            thread.join()
        before.extend(name for name in compiled if name in PROGRAMS)
        return original(*args)

    monkeypatch.setattr(training, "prepare", prepare)
    config = override(run_config, changes | {"num_steps": 2, "logging.sample_prompts": ()})
    train(config, tmp_path / "run")
    assert before == PROGRAMS
    assert [name for name in compiled if name in PROGRAMS] == PROGRAMS
    # One that goes on compiles no first values, and the step that it has compiled before is found.
    del compiled[:], before[:]
    train(override(config, {"num_steps": 3}), tmp_path / "run")
    assert [name for name in compiled if name in PROGRAMS] == []


@pytest.mark.slow
@pytest.mark.parametrize("command", [True, False])
def test_the_end_of_a_process_while_it_compiles(command: bool, tmp_path: Path):
    """The command line leaves at once; a script ends in order when the program is compiled."""
    use = "main = lambda: console(['train', 'tests/tiny_run.py', '--run-dir', sys.argv[1]])"
    if not command:
        use = "main = lambda: train(load_config('tests/tiny_run.py'), sys.argv[1])"
    source = f"""
import sys, threading, time
from llama_jax.__main__ import console
from llama_jax.config import UserError
from llama_jax.run import load_config, train, training
import jax._src.compiler as compiler

original, begun = compiler.compile_or_get_cached, threading.Event()
def compile_slowly(*args, **kwargs):
    begun.set()
    time.sleep(5)
    result = original(*args, **kwargs)
    print("compiled", flush=True)
    return result
def prepare(*_):
    compiler.compile_or_get_cached = compile_slowly
    assert begun.wait(60)
    raise UserError("a mistake")
training.prepare = prepare
{use}
main()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": "", "JAX_COMPILATION_CACHE_DIR": ""}
    arguments = [sys.executable, "-c", source, str(tmp_path / "run")]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stderr.splitlines()[-1].endswith("a mistake")
    assert done.returncode == (2 if command else 1)
    assert ("compiled" in done.stdout) == (not command)
