"""Checks for devices that compute wrong numbers without an error, and the memory that a process keeps.

A known program, a step taken twice, equal copies; the heap of glibc.
"""

import ctypes
import functools
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from llama_jax.config import UserError
from llama_jax.parallel import platform
from llama_jax.run.programs import RunFailed

SIZE = 512  # of the matrices of the known program
ROUNDS = 8  # of it on each device
FREEING = 5e-4  # seconds after a step in which its temporary arrays are freed
LARGE = 2**24  # bytes of a state whose steps take much longer than that


def check_devices() -> None:
    """Run a program with a known result on each of this process's devices. Raises UserError that names a wrong one."""
    rows, columns = np.indices((SIZE, SIZE))
    matrix = (7 * rows + 3 * columns) % 5 - 2  # its products and their sums are exact in bfloat16 and float32
    expected = int(((matrix @ matrix) % 1009).sum())
    program = jax.jit(lambda x: (jnp.dot(x, x, preferred_element_type=jnp.float32).astype(jnp.int32) % 1009).sum())
    for device in jax.local_devices():
        x = jax.device_put(jnp.asarray(matrix, jnp.bfloat16), device)
        found = {int(program(x)) for _ in range(ROUNDS)}
        if found != {expected}:
            raise UserError(
                f"device {device} computes {', '.join(map(str, sorted(found)))} where {expected} is right: replace it, "
                "or start without its host"
            )


def step_at(step: int, every: int | None, train_step: Callable[..., Any]) -> Callable[..., Any]:
    """Return the train step for the update to `step`: at multiples of `every` one that is checked."""
    return functools.partial(taken_twice, train_step) if every is not None and step % every == 0 else train_step


def taken_twice(train_step: Callable[..., Any], state: Any, batch: Any, hyper: Any) -> Any:
    """Return `train_step(state, batch, hyper)`, computed twice, with a copy of the state.

    Raises RunFailed where a bit of the two differs, or of two copies of an array, with the devices named.
    """
    first = hashes(train_step(jax.tree.map(lambda x: jnp.array(x, copy=True), state), batch, hyper))
    after = train_step(state, batch, hyper)
    second = hashes(after)
    for what, wrong in (
        ("the same step had two results", (first != second).any(1)),
        ("copies of the same array differ", different_copies(after, second)),
    ):
        if wrong.any():
            names = [f"{device} of process {device.process_index}" for device in np.array(_devices())[wrong]]
            raise RunFailed(
                f"{what} on {', '.join(names)} at step {int(after[0].step)}: continue from the latest checkpoint "
                "without the host"
            )
    return after


def settle(taken: int, train_step: Any, state: Any, batch: Any, hyper: Any) -> None:
    """Prepare a CPU's memory for a step after `taken` of this process; compiles the first.

    XLA:CPU takes the temporary arrays of a step as one block. Free blocks that the compiler left are too small for it,
    and are given back. It frees the block only after it says that the step has ended: a next step in the same moment
    would take a place of its own, and two or three blocks would stay resident.
    """
    if taken == 0:
        if isinstance(train_step, jax.stages.Wrapped):  # jitted
            train_step.lower(state, batch, hyper).compile()  # the call then compiles nothing
        release_freed_memory()
    elif platform() == "cpu" and sum(leaf.nbytes for leaf in jax.tree.leaves(state)) >= LARGE:
        time.sleep(FREEING)


def release_freed_memory() -> None:
    """Give the system back what this process has freed, on a CPU and where glibc keeps it, as the commands tell it."""
    if platform() == "cpu" and sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def different_copies(tree: Any, found: np.ndarray) -> np.ndarray:
    """Return for each device of the mesh whether its part of an array is another than most devices of that part have.

    Where as many have one as the other, it is true of all of them. `found` is `hashes(tree)`.
    """
    order = {device: i for i, device in enumerate(_devices())}
    wrong = np.zeros(len(order), bool)
    for column, leaf in enumerate(jax.tree.leaves(tree)):
        parts = defaultdict[str, list[int]](list)
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            parts[str(index)].append(order[device])
        for members in parts.values():
            usual, most = Counter(found[members, column].tolist()).most_common(1)[0]
            wrong[members] |= (found[members, column] != usual) | (2 * most == len(members))
    return wrong


def hashes(tree: Any) -> np.ndarray:
    """Return a hash of each device's part of each array: [devices in the mesh's order, arrays], the same everywhere."""
    return np.asarray(_hashes(jax.tree.leaves(tree)))


@jax.jit
def _hashes(leaves: list[jax.Array]) -> jax.Array:
    def of_device(*parts: jax.Array) -> jax.Array:
        axes = jax.sharding.get_abstract_mesh().axis_names
        return jax.lax.all_gather(jnp.stack([_hash(part) for part in parts]), axes)

    specs = tuple(jax.typeof(leaf).sharding.spec for leaf in leaves)
    return jax.shard_map(of_device, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)(*leaves)


def _hash(x: jax.Array) -> jax.Array:
    """Return the sum of all words, each times an odd number of its own, modulo 2**32: any flipped bit changes it."""
    words = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
    words = words.astype(jnp.uint32).reshape(-1)
    return (words * (jnp.arange(words.size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B2) + 1)).sum(dtype=jnp.uint32)


def _devices() -> list[Any]:
    return [*jax.sharding.get_mesh().devices.flat]  # type: ignore[union-attr]
