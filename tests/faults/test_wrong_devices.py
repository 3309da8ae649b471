"""A device that computes or holds a wrong bit is found and named, and no sound one is."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.config import UserError, override
from llama_jax.parallel import make_mesh
from llama_jax.run import RunConfig, RunFailed, hardware, train, training
from llama_jax.run.hardware import check_devices, different_copies, hashes
from llama_jax.run.programs import programs


def flipped(array: jax.Array, device: int, bit: int) -> jax.Array:
    """The array with one bit flipped in the part that the device of this number holds."""
    parts = []
    for shard in array.addressable_shards:
        host = np.array(shard.data)
        if shard.device.id == device:
            host.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
        parts.append(jax.device_put(host, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def test_any_bit_in_any_copy_is_found(num_trials: Callable[[int, int], int], tally: Callable[..., None]):
    """Arrays that are whole on all devices, split over some, and scalars; in 4, 2 and 1 bytes."""
    rng = np.random.default_rng(0)
    tried = held = 0
    with jax.set_mesh(make_mesh({"data": 4, "tensor": 2})):
        mesh = jax.sharding.get_mesh()
        specs = {"whole": PartitionSpec(), "split": PartitionSpec("tensor", None), "half": PartitionSpec()}
        tree = {
            name: jax.device_put(jnp.asarray(rng.normal(size=(6, 4)), dtype), NamedSharding(mesh, specs[name]))
            for name, dtype in (("whole", jnp.float32), ("split", jnp.float32), ("half", jnp.bfloat16))
        } | {"count": jax.device_put(jnp.int32(3), NamedSharding(mesh, PartitionSpec()))}
        sound = hashes(tree)
        assert not different_copies(tree, sound).any()
        for _ in range(num_trials(20, 400)):
            name, device = str(rng.choice([*tree])), int(rng.integers(8))
            size = next(s.data.nbytes for s in tree[name].addressable_shards if s.device.id == device)
            bad = tree | {name: flipped(tree[name], device, int(rng.integers(8 * size)))}
            found = hashes(bad)
            changed = np.argwhere(found != sound).tolist()
            position = [d.id for d in mesh.devices.flat].index(device)
            tried += 1
            held += changed == [[position, sorted(tree).index(name)]] and np.flatnonzero(
                different_copies(bad, found)
            ).tolist() == [position]
    tally("one bit of one device's copy of an array", "found, and the device named", tried=tried, held=held)


@pytest.mark.quick("copy")
@pytest.mark.parametrize("fault", ["once", "copy"])
def test_a_run_stops_at_the_next_check_with_the_device_named(
    run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
):
    """A bit that flips once in a step that is computed twice; and one that flips in a copy between two checks."""
    calls = [0]
    sound = programs(run_config).train_step

    def train_step(state: Any, batch: Any, hyper: Any) -> Any:
        after, metrics = sound(state, batch, hyper)
        calls[0] += 1
        if calls[0] == (2 if fault == "once" else 4):  # steps 2 and 4 are computed twice
            after.params["norm.weight"] = flipped(after.params["norm.weight"], 5, 77)
        return after, metrics

    made = training.programs
    monkeypatch.setattr(training, "programs", lambda config: dataclasses.replace(made(config), train_step=train_step))
    config = override(run_config, {"checks.every_steps": 2, "mesh.data": 8, "checkpoint.every_steps": 1})
    config = override(config, {"num_steps": 5, "data.validation_fraction": 0.0, "logging.sample_prompts": ()})
    step, what = (2, "the same step had two results") if fault == "once" else (4, "copies of the same array differ")
    with pytest.raises(RunFailed, match=rf"^{what} on cpu:5 of process 0 at step {step}: continue from the latest"):
        train(config, tmp_path / "run")
    monkeypatch.undo()
    run = train(config, tmp_path / "run")  # sound devices
    assert run.metrics()[-1]["step"] == 5


@pytest.mark.slow
def test_steps_that_are_checked_are_the_same_steps(run_config: RunConfig, finished_run: Any, tmp_path: Path):
    change = {"checks.every_steps": 3, "checks.hardware": True, "logging.sample_prompts": ()}
    run = train(override(run_config, change), tmp_path / "run")
    for ours, theirs in zip(run.metrics(), finished_run.metrics(), strict=True):
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])


def test_a_device_with_a_wrong_product_is_named(monkeypatch: pytest.MonkeyPatch):
    check_devices()

    def dot(x: jax.Array, y: jax.Array, **options: Any) -> jax.Array:
        return right(x, y, **options).at[7, 9].add(1)

    right = jnp.dot
    monkeypatch.setattr(hardware.jnp, "dot", dot)
    with pytest.raises(UserError, match=re.escape("device cpu:0 computes ")):
        check_devices()
