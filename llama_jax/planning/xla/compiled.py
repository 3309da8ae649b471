"""The real train step, compiled by XLA for a machine that is not here.

libtpu compiles for any TPU topology without one, JAX's CUDA plugin for any GPU that is described to it. Once they are
loaded they change what a process prints and which devices it looks for, so that happens in another process, JSON in and
out.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from llama_jax.chips import CHIPS
from llama_jax.config import UserError, from_json, to_json
from llama_jax.files import lock
from llama_jax.models import abstract_params, frozen
from llama_jax.parallel import make_mesh, spec
from llama_jax.planning.topology import Topology
from llama_jax.planning.xla.collectives import SLICE_IDS, Collective, read_collectives
from llama_jax.planning.xla.hlo import Cycles, Program
from llama_jax.run_config import RunConfig
from llama_jax.training import compiler_options, init_state, make_train_step

BATCH_DTYPES = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "weights": jnp.float32,
    "segment_ids": jnp.int32,
    "positions": jnp.int32,
}
# For the process that loads the compiler: do not look for an accelerator, do not mind that another process has it.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# JAX finds its CUDA plugin only where no platform is named; without visible GPUs it takes the CPU.
GPU_ENVIRONMENT = ENVIRONMENT | {
    "JAX_PLATFORMS": "",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


class DoesNotFit(RuntimeError):
    """The program needs more memory than a device has; the message is XLA's, with both figures."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a program needs on each device, by XLA's own count.

    arguments: parameters, moments and the batch.
    outputs: results.
    aliased: outputs in the place of an argument.
    temporaries: the most that is alive at one time besides.
    generated_code: the program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    generated_code: int

    @property
    def total(self) -> int:
        """Bytes that have to fit a device's memory."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.generated_code


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """XLA's figures of a compiled train step.

    num_devices: chips that it is compiled for.
    memory: bytes on each of them.
    flops: of the products of matrices in one step, on one device, with all that is computed again; Pallas kernels, into
      which XLA does not see, are not counted.
    collectives: exchanges between the devices.
    cycles: of a step on one device, as libtpu estimates them.
    seconds: how long the compilation took.
    """

    num_devices: int
    memory: Memory
    flops: int
    collectives: tuple[Collective, ...]
    cycles: Cycles
    seconds: float


def compile_step(config: RunConfig, topology: str) -> CompiledStep:
    """Compile the train step of a run for a topology, in another process.

    `topology`: chips of a TPU, `v5e:8x8`; of several slices, `2x v5e:8x8`; nodes and GPUs, `h100:4x8`. Waits while
    another such process of this machine runs. Raises UserError where the compiler is missing or does not have the
    topology, for a mesh that does not fit it, and for an attention kernel that needs its GPU to be compiled; DoesNotFit
    when a device's memory is too small; RuntimeError with XLA's message when it cannot compile.
    """
    target = gpu_target(topology)
    is_gpu = target is not None
    module, name, extra = "libtpu", "libtpu", "plan"
    if is_gpu:
        module, name, extra = "jax_cuda13_plugin", "JAX's CUDA plugin", "plan-gpu"
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"compiling for topology={topology!r} needs {name}, which is not installed: "
            f"pip install 'llama_jax[{extra}]'"
        )
    kernel = config.compute.attention_kernel
    if is_gpu and (kernel == "cudnn" or (kernel == "auto" and config.mesh.context == 1)):
        raise UserError(
            f"compute.attention_kernel={kernel!r}: cuDNN's kernel cannot be compiled where its GPU is not: "
            "--compute.attention-kernel blockwise can"
        )
    request = {"topology": topology, "target": target, "config": to_json(config)}
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    with _one_at_a_time():
        done = subprocess.run(
            [sys.executable, "-c", f"from {__name__} import main; main()"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=os.environ | (GPU_ENVIRONMENT if is_gpu else ENVIRONMENT) | {"PYTHONPATH": path},
        )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise RuntimeError(f"the step could not be compiled for {topology}:\n{done.stderr[-4000:]}")
    answer = json.loads(lines[-1])
    if error := {"UserError": UserError, "DoesNotFit": DoesNotFit}.get(answer["type"]):
        raise error(answer["message"])
    return from_json(CompiledStep, answer)


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Hold a lock of this machine: compilations take gigabytes, so that they wait for one another."""
    path = Path(tempfile.gettempdir()) / "llama_jax_compile.lock"
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock(path, timeout=0))
        except TimeoutError:
            print("waiting for another compilation on this machine", file=sys.stderr)
            held.enter_context(lock(path))
        yield


def gpu_target(topology: str) -> tuple[str, str] | None:
    """Return XLA's description of a topology's GPU and its shape (nodes x 1 x GPUs of a node), or None for TPUs.

    Raises UserError for a GPU without a description.
    """
    if (chip := CHIPS.get(topology.partition(":")[0])) is None or chip.platform != "gpu":
        return None
    if chip.target is None:
        raise UserError(
            f"topology={topology!r}: XLA has no description of this GPU: leave out --compile, or give its Chip a target"
        )
    machine = Topology.parse(topology)
    return chip.target.proto(), f"{machine.num_slices}x1x{machine.shape[0]}"


def get_devices(topology: str, target: Sequence[str] | None = None) -> list[Any]:
    """Return stand-ins for the devices of a topology; `target` is a GPU's `gpu_target`.

    Raises UserError for a topology that the compiler does not have.
    """
    if target is not None:
        proto, shape = target
        return topologies.get_topology_desc("", platform="cuda", target_config=proto, topology=shape).devices
    found = re.fullmatch(r"(?:(\d+)x )?([a-z]\w*:(\d+(?:x\d+)*))", topology)
    if found is None:
        raise UserError(f"topology={topology!r} is not of the form v5e:8x8, v5p:4x4x8 or 2x v5e:8x8")
    slices = {"num_slices": int(found[1])} if found[1] else {}
    refused = f"topology={topology!r} is none that libtpu can compile for"
    try:
        devices = topologies.get_topology_desc(found[2], platform="tpu", **slices).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise UserError(f"{refused}: {str(error).splitlines()[0]}") from None
    cores = len(devices) // (math.prod(map(int, found[3].split("x"))) * int(found[1] or 1))
    if cores != 1:
        raise UserError(f"{refused}: it has {cores} devices on a chip")
    return devices


def lower_step(config: RunConfig, devices: list[Any]) -> tuple[jax.stages.Lowered, jax.sharding.Mesh]:
    """Return the train step, traced on abstract arrays and lowered for a mesh of these devices, and that mesh."""
    mesh = make_mesh(config.mesh, devices)
    with jax.set_mesh(mesh):
        hyper = jax.eval_shape(lambda: config.optimizer.hyper(1))
        make = functools.partial(init_state, buffer_names=frozen(config.model))
        state = jax.eval_shape(make, abstract_params(config.model), hyper)
        shape = (config.global_batch_size, config.row_length)
        sharding = NamedSharding(mesh, spec("batch", "sequence", shape=shape))  # type: ignore[arg-type]
        batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in BATCH_DTYPES.items()}
        step: Any = make_train_step(
            config.model,
            config.compute,
            accumulation_steps=config.optimizer.accumulation_steps,
            compiler_options=compiler_options(config.model, devices[0].platform),
        )
        return step.lower(state, batch, hyper), mesh


def describe(compiled: jax.stages.Compiled, mesh: jax.sharding.Mesh, seconds: float) -> CompiledStep:
    """Return the memory, FLOPs and collectives of a compiled program."""
    stats: Any = compiled.memory_analysis()
    program = Program(compiled.as_text() or "")
    # The number of a TPU follows from its slice; that of a GPU does not depend on its node.
    ids = [d.id + (SLICE_IDS * (1 + d.process_index) if d.platform == "gpu" else 0) for d in mesh.devices.flat]
    return CompiledStep(
        num_devices=mesh.size,
        memory=Memory(
            arguments=stats.argument_size_in_bytes,
            outputs=stats.output_size_in_bytes,
            aliased=stats.alias_size_in_bytes,
            temporaries=stats.temp_size_in_bytes,
            generated_code=stats.generated_code_size_in_bytes,
        ),
        flops=program.product_flops(),
        collectives=read_collectives(program, dict(mesh.shape), ids),
        cycles=program.cycles(),
        seconds=seconds,
    )


def main() -> None:
    """Compile in this process: a request on stdin, the answer as the last line of stdout."""
    try:
        request = json.load(sys.stdin)
        start = time.perf_counter()
        devices = get_devices(request["topology"], request["target"])
        lowered, mesh = lower_step(from_json(RunConfig, request["config"]), devices)
        compiled = lowered.compile()
        answer = to_json(describe(compiled, mesh, time.perf_counter() - start))
    except UserError as error:
        answer = {"type": "UserError", "message": str(error)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        answer = {"type": "DoesNotFit", "message": str(error).splitlines()[0]}
    print(json.dumps(answer))
