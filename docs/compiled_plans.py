"""Compile train steps for machines that are not available, and keep XLA's figures in compiled_plans.json.

`python docs/compiled_plans.py` compiles the plans that compiled_plans.json lacks; with words on the command line, it
compiles again the plans whose command has all of them. It needs libtpu and JAX's CUDA plugin (extras `plan` and
`plan-gpu`), neither a TPU nor a GPU, and one to five minutes a plan.
"""

import importlib.metadata
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import llama_jax
from llama_jax.__main__ import parse
from llama_jax.config import from_json, to_json
from llama_jax.planning import CompiledStep, Memory, Report, Topology
from llama_jax.run_config import RunConfig

FILE = Path(__file__).with_suffix(".json")
COMPILED: dict[str, dict[str, Any]] = json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}  # by plan
BLOCKWISE = "--compute.attention-kernel blockwise"  # cuDNN's cannot be compiled without its GPU
LONG = "--sequence-length 131072 --model.max-positions 131072 --global-batch-size 32"
GATHERED = "--compute.context all_gather"

# Arguments of `python -m llama_jax plan`. The README's: 4M tokens a batch, and `remat full` as the configs have.
README_PLANS = {
    "llama2_7b --topology v5e:8x8 --optimizer.accumulation-steps 4": "Llama-2 7B",
    "llama2_7b --topology v5e:16x16": "Llama-2 7B",
    "llama2_70b --topology v5p:4x4x8": "Llama-2 70B",
    "llama2_70b --topology v6e:16x16 --optimizer.accumulation-steps 2": "Llama-2 70B",
    f"llama3_8b --topology v5p:4x4x8 {LONG} --mesh.context 4": "Llama-3 8B, 131,072 positions",
    f"llama3_8b --topology v5p:4x4x8 {LONG} --mesh.context 8 --optimizer.accumulation-steps 2": (
        "Llama-3 8B, 131,072 positions"
    ),
    f"llama3_8b --topology v5p:4x4x8 {LONG} --mesh.context 16 --optimizer.accumulation-steps 4": (
        "Llama-3 8B, 131,072 positions"
    ),
}
MORE_PLANS = [
    # A row in four and in eight parts (above: in sixteen), the parameters always over eight chips.
    f"llama3_8b --topology v5p:2x4x4 {LONG} --mesh.context 4 --optimizer.accumulation-steps 4",
    f"llama3_8b --topology v5p:4x4x4 {LONG} --mesh.context 8 --optimizer.accumulation-steps 4",
    # Splash attention, of gathered keys and values.
    f"llama3_8b --topology v5p:4x4x8 {LONG} --mesh.context 4 {GATHERED}",
    "llama3_8b --topology v5p:4x4x4",
    "llama3_8b --topology v5p:4x4x8 --global-batch-size 256 --compute.remat dots",
    "llama3_2_1b --topology v5e:4x4 --global-batch-size 64",
    "llama3_2_1b --topology v6e:4x4 --global-batch-size 16 --compute.remat none",
    "llama3_2_1b --topology v5p:2x2x2 --global-batch-size 64 --compute.remat attention --mesh.data 2",
    "llama3_2_1b --topology v5e:4x4 --global-batch-size 16 --mesh.tensor 4 --compute.remat dots",
    "llama1_7b --topology v5e:8x8 --global-batch-size 512 --compute.remat attention --optimizer.accumulation-steps 4",
    "llama1_7b --topology v5p:2x2x4 --global-batch-size 64 --mesh.tensor 4",
    "llama1_7b --topology '2x v5e:8x8' --global-batch-size 256 --mesh.data 2",
    f"llama2_7b --topology v5p:2x4x4 --global-batch-size 64 {BLOCKWISE}",
    "llama2_7b --topology v6e:4x8 --global-batch-size 32 --compute.remat dots --mesh.tensor 2",
    "llama2_7b --topology v5p:4x4x4 --global-batch-size 64 --compute.remat none",
    "llama2_70b --topology v5p:4x8x8 --global-batch-size 256 --mesh.tensor 4 --compute.remat attention",
    f"llama3_8b --topology h200:4x8 {BLOCKWISE}",
    f"llama3_8b --topology h200:4x8 --global-batch-size 256 --compute.remat attention {BLOCKWISE}",
    f"llama3_8b --topology h200:4x8 --global-batch-size 128 --compute.remat dots {BLOCKWISE}",
    f"llama3_8b --topology b200:4x8 --global-batch-size 32 --compute.remat none {BLOCKWISE}",
    f"llama3_2_1b --topology h100:8 --global-batch-size 64 {BLOCKWISE}",
    f"llama2_7b --topology h200:8 --global-batch-size 64 --mesh.tensor 2 {BLOCKWISE}",
]
# Those by which the constants of llama_jax/planning/memory.py were chosen; the others show how well they do.
TUNED_ON = {
    *list(README_PLANS)[:5],
    "llama3_2_1b --topology v5e:4x4 --global-batch-size 64",
    "llama3_2_1b --topology v6e:4x4 --global-batch-size 16 --compute.remat none",
    "llama1_7b --topology v5p:2x2x4 --global-batch-size 64 --mesh.tensor 4",
    "llama1_7b --topology '2x v5e:8x8' --global-batch-size 256 --mesh.data 2",
    "llama2_7b --topology v6e:4x8 --global-batch-size 32 --compute.remat dots --mesh.tensor 2",
}
PLANS = [*README_PLANS, *MORE_PLANS]
# Compiled before TPUs had their form of projections and rotary positions, and GPUs their options (2026-12-01).
EARLIER = {f"llama3_8b --topology v5p:4x4x8 {LONG} --mesh.context 4 {GATHERED}"}


def of_command(command: str) -> tuple[RunConfig, Topology]:
    """Return what `python -m llama_jax plan COMMAND` is about."""
    args = parse(["plan", *shlex.split(command)])
    return llama_jax.load_config(args.config, args.keys), Topology.parse(args.topology)


def plan(command: str, *, compile: bool = False) -> Report:
    """What `python -m llama_jax plan COMMAND` finds."""
    config, topology = of_command(command)
    return llama_jax.plan(config, str(topology), compile=compile)


def summary(step: CompiledStep) -> dict[str, Any]:
    """Return the kept figures of a compiled step; `collectives` are bytes that a chip sends in a step, by kind."""
    sent: dict[str, dict[str, int]] = {}
    for collective in step.collectives:
        entry = sent.setdefault(collective.label, {"bytes": 0, "overlapped": 0})
        size = collective.count * collective.wire_bytes
        entry["bytes"] += size
        entry["overlapped"] += size * collective.overlapped
    return {
        "seconds": round(step.seconds),
        "flops": step.flops,
        "memory": to_json(step.memory),
        "collectives": dict(sorted(sent.items())),
    }


def compiled_memory(command: str) -> Memory:
    """Return XLA's figures of a plan's memory."""
    return from_json(Memory, COMPILED[command]["memory"])


def main() -> None:
    """Compile and write, plan by plan."""
    chosen = [p for p in PLANS if all(word in p for word in sys.argv[1:])] if sys.argv[1:] else PLANS
    for command in chosen:
        if command in COMPILED and not sys.argv[1:]:
            continue
        print(command, flush=True)
        report = plan(command, compile=True)
        assert report.compiled is not None, report.compile_failure
        is_gpu = Topology.parse(report.plan.topology).chip.platform == "gpu"
        compiler = "jax-cuda13-plugin" if is_gpu else "libtpu"
        version = importlib.metadata.version(compiler)
        COMPILED[command] = {"compiler": f"{compiler} {version}"} | summary(report.compiled)
        print(COMPILED[command], flush=True)
        kept = {command: COMPILED[command] for command in PLANS if command in COMPILED}
        FILE.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
