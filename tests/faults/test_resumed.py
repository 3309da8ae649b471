"""A run that stops anywhere and goes on, on whatever devices, is the run that never stopped."""

import contextlib
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llama_jax.checkpoint import CheckpointConfig, CheckpointStore
from llama_jax.config import override
from llama_jax.data import Source, Stage
from llama_jax.models import Compute, abstract_params
from llama_jax.nn import Experts, SigmoidTopK
from llama_jax.parallel import make_mesh
from llama_jax.run import Run, RunConfig, train
from llama_jax.run.training import to_devices
from llama_jax.training import AdamW, init_state, make_train_step

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


EXPERTS: list[dict[str, int]] = [
    {},
    {"expert": 2},
    {"expert": 4},
    {"expert": 8},
    {"fsdp": 8},
    {"expert": 2, "fsdp": 2},
    {"expert": 2, "data": 2, "tensor": 2},
    {"expert": 2, "context": 4},
]


@pytest.mark.slow
def test_experts_saved_on_some_devices_and_restored_on_others(tiny_config, tmp_path: Path, tally: Any, num_trials: Any):
    """A mixture with shared experts and a buffer, on 1, 2, 4 and 8 devices: its state and the next loss."""
    router = SigmoidTopK(top_k=2, normalize=True, scaling=2.5, num_groups=4, top_groups=2, bias_update_rate=0.1)
    experts = Experts(8, 16, router, "silu", gated=True, num_shared=1, load_balance_loss=0.1)
    config = dataclasses.replace(tiny_config, feed_forward=experts)
    hyper, rng = AdamW(learning_rate=1e-3, warmup_steps=0).hyper(10), np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, (8, 17), dtype=np.int32)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": np.ones((8, 16), np.float32)}
    batch |= {"segment_ids": np.ones((8, 16), np.int32), "positions": np.tile(np.arange(16, dtype=np.int32), (8, 1))}

    def mesh(number: int) -> Any:
        layout = EXPERTS[number]
        return jax.set_mesh(make_mesh(layout, jax.devices()[: math.prod(layout.values())]))

    def loss(step: Any, state: Any) -> float:
        return float(step(state, to_devices(batch, range(8), 8), hyper)[1]["loss"])

    saved, steps = [], [make_train_step(config, Compute()) for _ in EXPERTS]
    for number in range(len(EXPERTS)):
        with mesh(number), contextlib.closing(CheckpointStore(tmp_path / str(number), CheckpointConfig())) as store:
            state = jax.jit(init_state)(jax.tree.map(zeros, abstract_params(config)), hyper)
            values = jax.tree.map(lambda x: rng.uniform(0, 0.5, x.shape).astype(x.dtype), state)
            state = dataclasses.replace(jax.tree.map(jax.device_put, values, jax.tree.map(lambda x: x.sharding, state)),
                                        step=state.step + 7)  # fmt: skip
            store.save(state)
            store.wait()
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
            saved.append((leaves, loss(steps[number], state)))
    pairs = [*itertools.product(range(len(EXPERTS)), repeat=2)]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))[: num_trials(12, len(pairs))]]
    same, near, furthest = 0, 0, 0.0
    for origin, target in pairs:
        with mesh(target), contextlib.closing(CheckpointStore(tmp_path / str(origin))) as store:
            loaded = store.load(7, jax.eval_shape(init_state, abstract_params(config), hyper))
            same += all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(loaded), saved[origin][0], strict=True))
            off = abs(loss(steps[target], loaded) - saved[origin][1])
            near, furthest = near + (off < 1e-5), max(furthest, off)
    where = "a mixture saved on 1, 2, 4 or 8 devices, restored on others"
    tally(where, "the same bits", tried=len(pairs), held=same)
    figures = f"at most {furthest:.1e}"
    tally(f"{where}: the next loss", "within 1e-5", tried=len(pairs), held=near, figures=figures)


def on(layout: dict[str, int] | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if layout is None else jax.set_mesh(make_mesh(layout))


def zeros(abstract: Any) -> jax.Array:
    return jax.device_put(np.zeros(abstract.shape, abstract.dtype), abstract.sharding)
