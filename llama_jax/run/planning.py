"""A run's plan: the `plan` command, and `llama_jax.plan`."""

import json
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console

from llama_jax.config import UserError
from llama_jax.parallel import MeshConfig
from llama_jax.planning import (
    CHIPS,
    CompiledStep,
    CompileRequest,
    DoesNotFit,
    Report,
    Topology,
    Workload,
    best_mesh,
    compile_step,
    estimate,
    estimate_sampling,
    remedy,
    search,
)
from llama_jax.run_config import RunConfig

# How JAX names the kinds of devices that the planner knows; the longer of two with one beginning first.
DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
PLAN_USAGE = """usage: python -m llama_jax plan CONFIG --topology TOPOLOGY [--compile] [--search] [--json]
           [--sample-batch N --sample-length N] [--key value ...]

Says whether CONFIG, a name in configs/ or a path, fits a machine and how fast it can be. Nothing of it is needed here.

  --topology         v5e:8x8, v5p:4x4x8 (chips of a TPU slice), '2x v6e:16x16' (slices), h100:4x8 (nodes x GPUs)
  --compile          compile the real step for it, too (extra `plan`; GPUs: `plan-gpu`): XLA's memory, what it sends
  --search           try all mesh shapes, accumulation steps and remat policies, and rank what fits
  --json             for programs
  --sample-batch     what sampling so many rows takes, of --sample-length positions each
  --key value        any key of the config: --mesh.tensor 4 --compute.remat full --global-batch-size 512

Exit code 0: fits; 1: does not fit; 2: a mistake.
"""


def workload_of(config: RunConfig) -> Workload:
    """What of a run its plan depends on."""
    return Workload(
        model=config.model,
        compute=config.compute,
        optimizer=config.optimizer,
        mesh=config.mesh,
        global_batch_size=config.global_batch_size,
        sequence_length=config.row_length,
        num_steps=config.num_steps,
    )


def topology_of(devices: Sequence[Any]) -> Topology | None:
    """The machine that these devices are; None for what the planner does not know, such as CPUs."""
    # By the whole name: boards of one chip (H100 SXM, PCIe, NVL) differ in speed and in what connects them.
    name = DEVICE_KINDS.get(devices[0].device_kind)
    if name is None:
        return None
    chip = CHIPS[name]
    if chip.platform == "gpu":
        # NVLink domains, where JAX knows them; there may be a process for each GPU.
        num_slices = len({getattr(device, "slice_index", device.process_index) for device in devices})
        shape: tuple[int, ...] = (len(devices) // num_slices,)
    else:
        num_slices = len({getattr(device, "slice_index", 0) for device in devices})
        places = zip(*(device.coords for device in devices), strict=True)
        shape = tuple(len(set(places_along)) for places_along in places)[: len(chip.max_shape)]
    found = Topology(chip, shape, num_slices)
    return found if found.num_chips == len(devices) else None


def mesh_of(config: RunConfig, devices: Sequence[Any]) -> MeshConfig:
    """The mesh of a run on these devices: the config's; where it says nothing, the fastest that fits by the planner."""
    unknown = config.model.has_source
    if config.mesh != MeshConfig() or unknown or (machine := topology_of(devices)) is None:
        return config.mesh
    return best_mesh(workload_of(config), machine) or config.mesh


def plan(
    config: RunConfig,
    topology: str,
    *,
    compile: bool = False,
    search_all: bool = False,
    sample_batch: int | None = None,
    sample_length: int | None = None,
) -> Report:
    """Memory, speed and remedy of a run on a machine such as `v5e:8x8`, which need not be here.

    With `compile`, XLA's own figures of the real step (extra `plan`). Raises UserError for an unknown topology, for an
    encoder-decoder, and a mesh that fits neither its chips nor the batch.
    """
    if config.model.has_source:
        raise UserError("the planner knows models of one sequence: of an encoder-decoder it can say nothing")
    machine, workload = Topology.parse(topology), workload_of(config)
    if (sample_batch is None) != (sample_length is None):
        given, missing = ("sample_batch", "sample_length")[:: 1 if sample_length is None else -1]
        raise UserError(f"{given} needs {missing} beside it")
    found = estimate(workload, machine)
    sampling = None
    if sample_batch is not None and sample_length is not None:
        sampling = estimate_sampling(workload, machine, sample_batch, sample_length)
    compiled, failure = _compile(workload, machine) if compile else (None, None)
    return Report(
        plan=found,
        remedy=remedy(workload, machine, found),
        sampling=sampling,
        candidates=tuple(search(workload, machine)) if search_all else None,
        compiled=compiled,
        compile_failure=failure,
    )


def _compile(workload: Workload, machine: Topology) -> tuple[CompiledStep | None, str | None]:
    """(the compiled step, None), or (None, XLA's words) where the machine's memory is too small for it."""
    names = ("model", "compute", "optimizer", "mesh", "global_batch_size", "sequence_length")
    try:
        step = CompileRequest(topology=str(machine), **{name: getattr(workload, name) for name in names})
        return compile_step(step), None
    except DoesNotFit as error:
        return None, str(error)


def plan_command(config: RunConfig, options: dict[str, str], console: Console | None = None) -> int:
    """Prints the plan of a config; `options` are the words of the command line that are no keys of it."""
    # Only shapes are computed here: the accelerators of this machine, and what libtpu says of their absence, are not
    # needed.
    jax.config.update("jax_platforms", "cpu")
    if "topology" not in options:
        raise UserError("plan needs --topology, such as v5e:8x8, '2x v5p:4x4x8' or h100:4x8")
    report = plan(
        config,
        options["topology"],
        compile=_switch(options, "compile"),
        search_all=_switch(options, "search"),
        sample_batch=_number(options, "sample_batch"),
        sample_length=_number(options, "sample_length"),
    )
    if _switch(options, "json"):
        print(json.dumps(report.to_json()))
    else:
        (console or Console(highlight=False)).print(report)
    return 0 if report.fits else 1


PLAN_OPTIONS = ("topology", "compile", "search", "json", "sample_batch", "sample_length")


def _switch(options: dict[str, str], name: str) -> bool:
    value = options.get(name, "false").lower()
    if value not in ("true", "false"):
        raise UserError(f"--{name} stands alone, and {value!r} follows it")
    return value == "true"


def _number(options: dict[str, str], name: str) -> int | None:
    try:
        return int(options[name]) if name in options else None
    except ValueError:
        raise UserError(f"{name}={options[name]!r} is not of type int") from None
