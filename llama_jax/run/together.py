"""Runs of one program in lock step: vectorised over runs on a device, and runs split over the devices.

Measured on 2 CPU cores (docs/decisions.md): of a step of 28 MFLOP, 3 runs take 0.5 and 12 runs 0.4 times the processor
time of one after another; of a step of 261 MFLOP 1.4 times. On 8 virtual devices, 6 runs of 28 MFLOP take 0.17 times
the time of one after another, each split over all devices.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llama_jax.parallel import MeshConfig, make_mesh, platform
from llama_jax.planning import device_memory
from llama_jax.run.lanes import Lane, memory_of
from llama_jax.run.programs import KEPT
from llama_jax.run.training import Preempted
from llama_jax.run_config import RunConfig
from llama_jax.training import TrainState, compiler_options

SMALL_FLOPS = 1e8  # of a step; above, runs of one device are faster one after another
MOST_LANES = 16  # of a device


def lanes_at_once(config: RunConfig, num_runs: int) -> int:
    """Return how many of so many runs of one program are trained in lock step; 1: one after another.

    Several devices take a run each where there are enough runs for them, or steps are small, and one device has the
    memory for it. A CPU takes several on a device where steps are small.
    """
    devices = jax.devices()
    small = config.flops_per_token * config.global_batch_size * config.row_length <= SMALL_FLOPS
    if num_runs < 2 or config.mesh != MeshConfig() or config.profile.start_step is not None or jax.process_count() > 1:
        return 1
    if platform() == "cpu":
        most = MOST_LANES * len(devices) if small else len(devices)
    else:
        most = len(devices)
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None and device_memory(config, devices[:1]) > limit:
        return 1
    return min(num_runs, most) if small or num_runs >= len(devices) > 1 else 1


def lane_mesh() -> Mesh:
    """Return the mesh of one run among those in lock step: the first device."""
    return make_mesh({}, jax.devices()[:1])


def train_together(
    lanes: Sequence[Lane],
    num_lanes: int,
    stopping: Callable[[int], bool],
    *,
    measured: bool = False,
) -> None:
    """Train runs of one program in lock step, as `Lane.train` trains one; `lanes` were made on `lane_mesh()`.

    The program is that of `num_lanes`, also where some of them were finished by an earlier call: so all numbers are the
    same. The speed that is logged is that of all lanes together.
    """
    devices = jax.devices()[: min(num_lanes, jax.device_count())]
    size = -(-num_lanes // len(devices)) * len(devices)
    mesh = Mesh(np.array(devices), ("lane",), axis_types=(AxisType.Explicit,))
    sharding = NamedSharding(mesh, PartitionSpec("lane"))
    first = lanes[0]
    options = compiler_options(first.config.model, platform())
    step = _program(first.programs.train_step, mesh, None if options is None else tuple(options.items()))

    def on_devices(trees: Sequence[Any]) -> Any:
        """Return trees of host arrays as one, [lanes, ...]; the places of no run repeat the last."""
        filled = [*trees, *[trees[-1]] * (size - len(trees))]
        return jax.device_put(jax.tree.map(lambda *x: np.stack(x), *filled), sharding)

    with contextlib.ExitStack() as stack:
        states = [jax.device_get(lane.begin(stack)) for lane in lanes]
        steps = [int(state.step) for state in states]
        batches = _Shared(lanes, steps)
        for lane in lanes:
            lane.tokens_per_step *= len(lanes)
        with jax.set_mesh(mesh):
            state, hyper = on_devices(states), on_devices([jax.device_get(lane.hyper) for lane in lanes])
            batch = on_devices(batches.next())
            if measured:
                sizes = memory_of(step, state, batch, hyper)  # of a device
                first.memory = sizes[0] * len(devices) // size, sizes[1] * len(devices) // size
        ends: list[TrainState | None] = [None] * len(lanes)
        running = [lane.until > at for lane, at in zip(lanes, steps, strict=True)]
        while any(running):
            with jax.set_mesh(mesh):
                state, metrics = step(state, batch, hyper)
                batch = on_devices(batches.next())  # of the next step, while the devices compute
            metrics = jax.device_get(metrics)
            steps = [at + 1 for at in steps]
            preempted = stopping(max(steps))
            ready = [on and (preempted or lane.due(at)) for lane, at, on in zip(lanes, steps, running, strict=True)]
            host = jax.device_get(state) if any(ready) else None
            for i, lane in enumerate(lanes):
                if not running[i]:
                    continue
                lane.bar.advance(steps[i])
                own = jax.device_put(_pick(host, i), lane_sharding()) if ready[i] else None
                lane.log({"step": steps[i], **_pick(metrics, i)}, own, saves=preempted)
                running[i] = lane.failure is None and steps[i] < lane.until
                if lane.failure is None and (preempted or not running[i]):
                    ends[i] = own
            if not preempted and any(running):
                continue
            for lane, end in zip(lanes, ends, strict=True):
                if end is not None:
                    lane._end_saving(end)
            if preempted:
                raise Preempted(f"stopped at step {max(steps)} with a checkpoint saved: start again to continue")


def lane_sharding() -> NamedSharding:
    """Return the sharding of arrays on `lane_mesh()`, the current mesh."""
    mesh = jax.sharding.get_mesh()
    assert isinstance(mesh, Mesh)
    return NamedSharding(mesh, PartitionSpec())


def _pick(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


class _Shared:
    """Batches of lanes in lock step: runs with the same data and seed read them once."""

    def __init__(self, lanes: Sequence[Lane], steps: Sequence[int]):
        keys = [(id(lane.dataset), step) for lane, step in zip(lanes, steps, strict=True)]
        self._keys = keys
        self._iterators: dict[Any, Iterator[Any]] = {}
        for key, lane, step in zip(keys, lanes, steps, strict=True):
            if key not in self._iterators:
                self._iterators[key] = lane.batches.iterate(step)

    def next(self) -> list[Any]:
        """Return the next batch of each lane."""
        found = {key: next(iterator) for key, iterator in self._iterators.items()}
        return [found[key] for key in self._keys]


@functools.lru_cache(KEPT)
def _program(train_step: Any, mesh: Mesh, options: tuple[tuple[str, Any], ...] | None) -> Any:
    """Return a train step of arrays [lanes, ...], jitted: each device has its part of the lanes."""
    lanes = PartitionSpec("lane")
    # The step without its own `jit`: inside of another one, its compiler options are an error.
    mapped = jax.shard_map(
        jax.vmap(train_step.__wrapped__), mesh=mesh, in_specs=lanes, out_specs=lanes, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=0, compiler_options=None if options is None else dict(options))
