"""A run that stops anywhere and goes on, on whatever devices, is the run that never stopped."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llama_jax.checkpoint import CheckpointConfig, CheckpointStore
from llama_jax.config import override
from llama_jax.data import Source, Stage
from llama_jax.models import abstract_params
from llama_jax.parallel import make_mesh
from llama_jax.run import Run, RunConfig, train
from llama_jax.training import AdamW, init_state

STEPS = 12
PATTERNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"optimizer.accumulation_steps": 2, "global_batch_size": 16},
    "best fit": {"data.packing": "best_fit"},
    "prefixes": {"data.objective": "Prefix", "data.packing": "best_fit"},
    "dropout": {"model.dropout": 0.2},
    "Muon": {"optimizer": "Muon"},
    "stages": {},
}


def config_of(pattern: str, run_config: RunConfig) -> RunConfig:
    if pattern == "stages":
        (path,) = run_config.data.path
        even, odd = ((f"{path}/*[{digits}].txt",) for digits in ("02468", "13579"))
        sources = Source("even", even, share=0.9), Source("odd", odd, share=0.1)
        stages = (Stage(5, (0.2, 0.8)),)
        data = dataclasses.replace(run_config.data, path=(), sources=sources, stages=stages)
        run_config = dataclasses.replace(run_config, data=data)
    always = {"num_steps": STEPS, "checkpoint.every_steps": 100, "logging.sample_prompts": ()}
    return override(run_config, PATTERNS[pattern] | always)


class Watch:
    """Stops at given steps, and keeps the losses and the hashes of the batches."""

    def __init__(self, *stops: int):
        self.stops, self.seen = stops, dict[int, tuple[float, str]]()

    def __call__(self, event: Any) -> None:
        batch = event.run.batch(event.step - 1)
        digest = hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest()
        assert event.step not in self.seen, "a step was done twice"
        self.seen[event.step] = event["loss"], digest
        if event.step in self.stops:
            event.stop()


def state_of(run: Run) -> list[bytes]:
    """Return every array of the last checkpoint, in one order: parameters, optimizer, buffers, step."""
    config = run.config
    hyper = config.optimizer.hyper(config.num_steps)
    abstract = jax.eval_shape(init_state, abstract_params(config.model), hyper)
    names = CheckpointStore(run.directory / "checkpoints").load(STEPS, abstract)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(names)]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_stopped_twice(pattern: str, run_config: RunConfig, tmp_path: Path, tally: Any, num_trials: Callable):
    config = config_of(pattern, run_config)
    whole = Watch()
    expected = state_of(train(config, tmp_path / "whole", callbacks=(whole,)))
    assert sorted(whole.seen) == [*range(1, STEPS + 1)]
    trials, rng = num_trials(1, 6), np.random.default_rng(0)
    held = 0
    for number in range(trials):
        watch, run = Watch(*rng.choice(np.arange(1, STEPS), 2, replace=False).tolist()), None
        for _ in range(3):
            run = train(config, tmp_path / str(number), callbacks=(watch,))
        assert run is not None
        held += watch.seen == whole.seen and state_of(run) == expected
    tally(
        f"stopped at two random steps of {STEPS}: {pattern}",
        "parameters, optimizer, losses and the hashes of batches are bit for bit those of a run without a stop",
        tried=trials,
        held=held,
    )


LAYOUTS: list[dict[str, int] | None] = [
    None,
    {"data": 8},
    {"fsdp": 8},
    {"data": 2, "fsdp": 4},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "tensor": 4},
    {"fsdp": 2, "context": 4},
    {"context": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
]


@pytest.mark.slow
def test_saved_on_one_layout_and_restored_on_another(two_layers, tmp_path: Path, tally: Any, num_trials: Callable):
    hyper, rng, states = AdamW(learning_rate=1e-3, warmup_steps=0).hyper(10), np.random.default_rng(0), []
    for number, layout in enumerate(LAYOUTS):
        with on(layout), contextlib.closing(CheckpointStore(tmp_path / str(number), CheckpointConfig())) as store:
            state = jax.jit(init_state)(jax.tree.map(zeros, abstract_params(two_layers)), hyper)
            noise = jax.tree.map(lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding), state)
            store.save(dataclasses.replace(noise, step=state.step + 7))
            states.append([np.asarray(leaf) for leaf in jax.tree.leaves(dataclasses.replace(noise, step=7))])
    pairs = [(a, b) for a in range(len(LAYOUTS)) for b in range(len(LAYOUTS))]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))[: num_trials(12, len(pairs))]]
    held = 0
    for origin, target in pairs:
        with on(LAYOUTS[target]), contextlib.closing(CheckpointStore(tmp_path / str(origin))) as store:
            loaded = store.load(7, jax.eval_shape(init_state, abstract_params(two_layers), hyper))
            leaves = jax.tree.leaves(loaded)
            spread = all(len(leaf.sharding.device_set) == (8 if LAYOUTS[target] else 1) for leaf in leaves)
            held += spread and all(np.array_equal(*pair) for pair in zip(leaves, states[origin], strict=True))
    tally("saved on one layout of 8 devices, restored on another", "the same bits", tried=len(pairs), held=held)


def on(layout: dict[str, int] | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if layout is None else jax.set_mesh(make_mesh(layout))


def zeros(abstract: Any) -> jax.Array:
    return jax.device_put(np.zeros(abstract.shape, abstract.dtype), abstract.sharding)
