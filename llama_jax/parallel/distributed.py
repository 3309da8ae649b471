"""Several processes, one on each host or GPU, that run one program: their start, and what they have to agree on.

All of them run the same code on one mesh. Arrays are shared through it; other values (a path, a mistake) go through the
service that connects the processes, which waits as long as it takes and needs no device.
"""

import bisect
import contextlib
import importlib.util
import itertools
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np

# The service's key-value store and barriers have no public name. The only file that imports from `jax._src`.
from jax._src import distributed as _distributed
from jax.sharding import Mesh, NamedSharding

from llama_jax.config import UserError
from llama_jax.parallel.mesh import spec

JAX_TRIED = ("0.12",)  # versions of JAX whose private service was tried
PATIENCE = 7 * 24 * 3600  # seconds that a process waits for the others: tokenizing a corpus takes hours
IMPATIENCE = 60  # the same for a process that has a mistake to report
HEARTBEAT = 60  # seconds after which JAX itself takes a process for lost, where nothing else has noticed it before
ALIVE, ENDED = "llama_jax/alive", "llama_jax/ended"  # directories of keys: signs of life, and why a process has ended
_service: Any = _distributed.global_state
_exchanges = itertools.count()


class AgreedError(UserError):
    """A user's mistake that is raised on every process, so that process 0 prints it and all end in order."""


def start(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the processes of this program, by the three arguments or the cluster's variables; else do nothing.

    `coordinator_address` is HOST:PORT of process 0. Call it before JAX touches a device. Raises UserError for some of
    the arguments without the others and for impossible ones.
    """
    given = {"coordinator-address": coordinator_address, "num-processes": num_processes, "process-id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if coordinator_address is None or num_processes is None or process_id is None:
        if len(missing) < len(given):
            raise UserError(
                f"--{missing[0]} is missing: give --coordinator-address, --num-processes and --process-id, or none"
            )
        if in_cluster(os.environ):
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
        return
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator-address='{coordinator_address}' must be HOST:PORT of process 0")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process-id={process_id} must be less than --num-processes={num_processes}, and not below 0")
    # Nothing is left to detect, and on Kubernetes the attempt would need a package and rights.
    jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=HEARTBEAT,
    )


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Return whether this process is one of several whose number and addresses JAX detects."""
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # of this `srun`; a batch script itself has none
        return "SLURM_PROCID" in environment
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        if "OMPI_MCA_orte_hnp_uri" not in environment and importlib.util.find_spec("mpi4py") is None:
            raise UserError(
                "Open MPI 5 and newer need a package: pip install mpi4py, or give --coordinator-address, "
                "--num-processes and --process-id"
            )
        return True
    if "tpu" in (jax.config.jax_platforms or "tpu"):
        if environment.get("MEGASCALE_COORDINATOR_ADDRESS"):
            return True
        if "TPU_WORKER_HOSTNAMES" in environment:
            return "," in environment["TPU_WORKER_HOSTNAMES"]
        if environment.get("TPU_ML_PLATFORM") == "JAX":  # JAX has found TPU chips; its host's metadata has the number
            from jax._src.clusters import GceTpuCluster

            return bool(GceTpuCluster.is_env_present() and GceTpuCluster.get_process_count() > 1)
    # Without the package of `jax[k8s]` the processes of an indexed job are programs that run alone.
    return "JOB_COMPLETION_INDEX" in environment and importlib.util.find_spec("kubernetes") is not None


def several() -> bool:
    """Return whether `start` (or `jax.distributed.initialize`) has joined this process to others."""
    return jax.distributed.is_initialized()


def is_main() -> bool:
    """Return whether this is process 0, which prints and writes; it needs no devices, and is true of one process."""
    return _service.process_id == 0


def leave(code: int) -> int:
    """Return `code`, or exit at once with it if there are several processes: an orderly shutdown would deadlock."""
    if several():
        sys.stdout.flush()
        sys.stderr.flush()
        announce(f"{own_name()} has ended with exit code {code}, after a message of its own")
        os._exit(code)
    return code


def end(code: int) -> int:
    """Return `code`, with which all processes end, and part from the others.

    At the end of Python that comes after its threads: those of a save that another process could not write wait long.
    """
    jax.distributed.shutdown()
    return code


def own_name() -> str:
    """Return the name of this process in messages."""
    several_of = f"process {_service.process_id} of {_service.num_processes}" if several() else "this process"
    return f"{several_of} (host {socket.gethostname()})"


def give_sign(text: str) -> None:
    """Publish `text`, another one each time, as the sign of life of this process. Raises JaxRuntimeError."""
    _service.client.key_value_set(f"{ALIVE}/{_service.process_id:08}/now", f"{own_name()}|{text}", True)


def published(directory: str) -> dict[str, str]:
    """Return the texts under `ALIVE` or `ENDED`, or a directory in it, by key. Raises JaxRuntimeError."""
    return dict(_service.client.key_value_dir_get(f"{directory}/"))


def announce(why: str) -> None:
    """Publish why a process ends, where none was published before; wait for it two seconds at most."""

    def publish() -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _service.client.key_value_set(f"{ENDED}/why", why)

    if several():
        thread = threading.Thread(target=publish, daemon=True)
        thread.start()
        thread.join(2)


def all_agree[T](function: Callable[[], T]) -> T:
    """Call `function` on all processes at the same point; a UserError of one is raised on all, as AgreedError."""
    if not several():
        return function()
    result, mistake = None, None
    try:
        result = function()
    except UserError as error:
        mistake = error
    sentence = None if mistake is None else str(mistake)
    if sentence is not None and not is_main():
        sentence = f"{sentence} (on process {_service.process_id}, host {socket.gethostname()})"
    try:
        sentences = _exchange(sentence, PATIENCE if mistake is None else IMPATIENCE)
    except jax.errors.JaxRuntimeError:
        if mistake is None:
            raise
        # The others wait for this process somewhere else: it reports the mistake, and ends alone.
        raise mistake from None
    for sentence in sentences:
        if sentence is not None:
            raise AgreedError(sentence) from None
    return cast(T, result)


def broadcast_from_main[T](function: Callable[[], T]) -> T:
    """Call `function` on process 0 alone and return its result, a JSON value, on all; so is its UserError raised."""
    value = all_agree(lambda: function() if is_main() else None)
    return cast(T, exchange(value)[0])


def exchange(value: Any) -> list[Any]:
    """Return the JSON values of all processes, in their order, on all; they call it at the same point."""
    return _exchange(value, PATIENCE) if several() else [value]


def _exchange(value: Any, seconds: int) -> list[Any]:
    """Return the values of all processes, in their order; raise JaxRuntimeError where one does not come in time."""
    number = next(_exchanges)  # all processes make the same exchanges in the same order
    key = f"llama_jax/{number}"
    _service.client.key_value_set(f"{key}/{_service.process_id:08}", json.dumps(value))
    _service.client.wait_at_barrier(key, seconds * 1000)
    if is_main():  # all have read the values of the one before
        _service.client.key_value_delete(f"llama_jax/{number - 1}/")
    return [json.loads(text) for _, text in sorted(_service.client.key_value_dir_get(f"{key}/"))]


def local_rows(shape: Sequence[int]) -> list[int]:
    """Return the rows of a global batch of `shape` [B, T] that this process's devices hold on the mesh, ascending.

    Processes that split another dimension than the batch (along a tensor or context axis) hold the same rows.
    """
    indices = _batch_sharding(shape).addressable_devices_indices_map(tuple(shape)).values()
    return sorted({row for index in indices if index is not None for row in range(shape[0])[index[0]]})


def place_rows(x: np.ndarray, rows: Sequence[int], num_rows: int) -> jax.Array:
    """Return the global array [`num_rows`, T] on the mesh whose `rows` are `x`; other processes have the others."""
    shape = (num_rows, *x.shape[1:])
    if not several():  # all rows are here
        return jax.device_put(x, _batch_sharding(shape))

    def part(index: Any) -> np.ndarray:  # a tuple of slices
        wanted = range(num_rows)[index[0]]
        first = bisect.bisect_left(rows, wanted[0])
        assert list(rows[first : first + len(wanted)]) == list(wanted), "a device's rows are its process's"
        return x[(slice(first, first + len(wanted)), *index[1:])]

    return jax.make_array_from_callback(shape, _batch_sharding(shape), part)


def _batch_sharding(shape: Sequence[int]) -> NamedSharding:
    mesh, partition = jax.sharding.get_mesh(), spec("batch", "sequence", shape=shape)
    assert isinstance(mesh, Mesh)
    assert partition is not None
    return NamedSharding(mesh, partition)
