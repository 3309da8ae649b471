"""Write the tables of README.md and planning.md: `python docs/tables.py`."""

import dataclasses
import functools
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from compiled_plans import COMPILED, LONG, PLANS, README_PLANS, TUNED_ON, compiled_memory, plan
from markdown_table import markdown

import llama_jax
from llama_jax.chips import GIB
from llama_jax.data import DataConfig
from llama_jax.models import Compute
from llama_jax.parallel import MeshConfig
from llama_jax.planning import Topology, estimate
from llama_jax.planning.report import duration, gib, mesh_text
from llama_jax.run_config import RunConfig
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import AdamW, train_flops_per_token

ROOT = Path(__file__).resolve().parent.parent


def plans_table() -> str:
    """Return the planner's estimates for a few runs, with XLA's figure of memory."""
    rows = []
    for command, what in README_PLANS.items():
        found = plan(command).plan
        memory = (gib(found.total_bytes), gib(compiled_memory(command).total), gib(found.capacity))
        speed = (duration(found.step_seconds), found.bound, f"{found.mfu:.1%}", f"{found.tokens_per_second:,.0f}")
        chips = f"{found.topology} ({found.num_chips})"
        rows.append((what, chips, mesh_text(found.mesh), found.accumulation_steps, *memory, *speed))
    return markdown(
        "run|chips|mesh|micro-batches>|GiB a chip>|by XLA>|of>|step>|bound by|MFU>|tokens/s>",
        rows,
    )


def memory_table() -> str:
    """Return every estimate of memory with XLA's figure."""
    rows = []
    for command in PLANS:
        estimated, found = plan(command).plan.total_bytes, compiled_memory(command).total
        difference = f"{100 * (estimated / found - 1):+.1f} %"
        rows.append((f"`{command}`", "yes" if command in TUNED_ON else "", gib(estimated), gib(found), difference))
    return markdown("`python -m llama_jax plan` ...|tuned on|estimate, GiB>|XLA, GiB>|difference>", rows)


def context_table() -> str:
    """Return XLA's memory besides the arguments by the size of the context axis, with parameters over eight chips."""
    rows = []
    found = [(plan(c).plan, compiled_memory(c)) for c in PLANS if LONG in c]
    for estimated, memory in sorted(found, key=lambda pair: pair[0].mesh["context"]):
        if estimated.mesh["fsdp"] == 8:
            chips = f"{estimated.topology} ({estimated.num_chips})"
            beside = gib(memory.total - memory.arguments)
            rows.append((chips, mesh_text(estimated.mesh), gib(memory.arguments), beside))
    return markdown("chips|mesh|arguments, GiB>|other memory, GiB>", rows)


def collectives_table() -> str:
    """Return the bytes that XLA's programs of the README's plans send, and the share behind products."""
    rows = []
    for command, what in README_PLANS.items():
        found = plan(command).plan
        for kind, sent in COMPILED[command]["collectives"].items():
            if sent["bytes"] > GIB // 10:
                hidden = f"{sent['overlapped'] / sent['bytes']:.0%}"
                rows.append((what, found.topology, mesh_text(found.mesh), kind, gib(sent["bytes"]), hidden))
    return markdown("run|chips|mesh|collective|GiB a chip sends in a step>|behind products>", rows)


LARGE = "llama3_405b --topology '16x v5p:4x8x8'"
PIPELINES = (
    LARGE,
    f"{LARGE} --mesh.pipeline 2",
    f"{LARGE} --mesh.pipeline 2 --compute.pipeline-repeats 3",
    f"{LARGE} --mesh.pipeline 2 --compute.pipeline-repeats 9",
)


def pipeline_table() -> str:
    """Return plans of the largest model with and without a pipeline."""
    rows = []
    for command in PIPELINES:
        found = plan(command).plan
        memory = gib(found.total_bytes), gib(found.capacity)
        busy = (duration(found.seconds.get(name, 0.0)) for name in ("matrix units", "DCN"))
        speed = duration(found.step_seconds), f"{found.mfu:.1%}"
        rows.append((mesh_text(found.mesh), found.repeats, f"{found.bubble:.1%}", *memory, *busy, *speed))
    return markdown("mesh|repeats>|bubble>|GiB a chip>|of>|matrix units>|DCN>|step>|MFU>", rows)


@dataclasses.dataclass(frozen=True)
class Published:
    """A published run of MaxText, with its MFU (attention counted in full) or tokens/s a chip."""

    what: str
    preset: str
    topology: str
    batch_per_chip: int
    sequence_length: int
    mfu: float | None = None
    tokens_per_second: float | None = None


# MaxText's end_to_end/tpu/llama2/run_llama2.md (MFU) with the batches of benchmarks/maxtext_{v5e,v5p}_model_configs.py,
# of v4 none is given: as on v5p; and the logs in AI-Hypercomputer/tpu-recipes, training/trillium. v4-128 and v5p-128
# count cores. All are split by FSDP alone. By the same files they compute again what `projections` does here, and those
# that offload queries, keys and values (v5e, v6e) one product more: an efficiency that is fitted is rather too low.
PUBLISHED = [
    Published("Llama-2 70B, v4-128", "llama2_70b", "v4:4x4x4", 4, 4096, mfu=0.57),
    Published("Llama-2 70B, v5e-256", "llama2_70b", "v5e:16x16", 2, 2048, mfu=0.57),
    Published("Llama-2 70B, v5p-128", "llama2_70b", "v5p:4x4x4", 4, 4096, mfu=0.65),
    Published("Llama-2 70B, v6e-256", "llama2_70b", "v6e:16x16", 3, 4096, tokens_per_second=905.021),
    Published("Llama-3.1 8B, v6e-256", "llama3_8b", "v6e:16x16", 4, 8192, tokens_per_second=7207.336),
    Published("Llama-3.1 70B, v6e-256", "llama3_70b", "v6e:16x16", 5, 8192, tokens_per_second=960.248),
]


def published_mfu(run: Published) -> float:
    """Return the published MFU by this package's formula, which counts causal attention at half."""
    model, peak = llama_jax.presets()[run.preset], Topology.parse(run.topology).chip.peak_flops
    flops = train_flops_per_token(model, run.sequence_length)
    if run.tokens_per_second is not None:
        return run.tokens_per_second * flops / peak
    assert run.mfu is not None
    other_half = 3 * sum(mixer.score_flops(run.sequence_length / 2) for mixer, _ in model.layer_pieces())
    return run.mfu * flops / (flops + other_half)


def predicted_mfu(run: Published, efficiency: float) -> float:
    """Return the planner's MFU if matrix units reach this part of their peak."""
    topology = Topology.parse(run.topology)
    # MaxText's runs set options by which gathers overlap.
    topology = dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, overlaps=True))
    config = RunConfig(
        tokenizer=TokenizerConfig(
            path="tokenizer.model", kind="bpe", vocab_size=0
        ),  # neither this nor the data matters
        data=DataConfig(path=()),
        num_steps=1,
        model=llama_jax.presets()[run.preset],
        compute=Compute(remat="projections"),
        optimizer=AdamW(learning_rate=1e-4, warmup_steps=1),
        mesh=MeshConfig(fsdp=-1),
        global_batch_size=run.batch_per_chip * topology.num_chips,
        sequence_length=run.sequence_length,
    )
    return estimate(config, topology, efficiency=efficiency).mfu


@functools.cache
def fitting_efficiency(run: Published) -> float:
    """Return the efficiency at which the planner predicts this run exactly, by bisection."""
    published, low, high = published_mfu(run), 0.01, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if predicted_mfu(run, middle) < published else (low, middle)
    return low


def fitted_efficiency(runs: Sequence[Published]) -> float:
    """Return the geometric mean of the efficiencies that fit each of the runs."""
    return statistics.geometric_mean(map(fitting_efficiency, runs))


def published_table() -> str:
    """Return published MFU and the prediction with the efficiency fitted to others: on the same chip, or else all."""
    rows = []
    for run in PUBLISHED:
        others = [other for other in PUBLISHED if other != run]
        efficiency = fitted_efficiency([o for o in others if o.topology == run.topology] or others)
        published, predicted = published_mfu(run), predicted_mfu(run, efficiency)
        difference = f"{predicted / published - 1:+.0%}"
        rows.append((run.what, f"{published:.1%}", f"{efficiency:.2f}", f"{predicted:.1%}", difference))
    return markdown(
        "run of MaxText|published MFU>|efficiency fitted to the others>|predicted MFU>|difference>",
        rows,
    )


TRAINING = {"stories15m": "stories15M's shape, batch 8 x 256", "56m": "56M parameters, batch 4 x 512"}
PEERS = {
    "torch": "torch, eager",
    "torch-compiled": "`torch.compile`",
    "torch-compiled-bf16": "`torch.compile`",
    "tunix": "tunix",
}


def training_table() -> str:
    """Return the tokens a second of a train step that benchmarks/train_step.py measured last."""
    measured = json.loads((ROOT / "benchmarks" / "results" / "train_step.json").read_text())["outcomes"]
    rows = []
    for work, what in TRAINING.items():
        for dtype, suffix in (("float32", ""), ("bfloat16", "-bf16")):
            peers = measured[work]["peers"]
            cells: dict[str, str] = dict.fromkeys(PEERS.values(), "")
            for name, heading in PEERS.items():
                if name.endswith("-bf16") == bool(suffix):
                    found = peers[name]
                    cells[heading] = f"{found['tokens_per_second']:,.0f} ({found['ours_over_this']:.2f})"
            rows.append((what, dtype, f"{peers[f'llama_jax{suffix}']['tokens_per_second']:,.0f}", *cells.values()))
    return markdown("train step|in|llama_jax>|" + "|".join(f"{name}>" for name in dict.fromkeys(PEERS.values())), rows)


README, PLANNING = "README.md", "docs/planning.md"
TABLES = {
    README: {"plans": plans_table, "published runs": published_table, "training": training_table},
    PLANNING: {
        "memory": memory_table,
        "context": context_table,
        "collectives": collectives_table,
        "pipeline": pipeline_table,
    },
}


def with_tables(page: str, text: str) -> str:
    """Return the text of a page with its tables brought up to date."""
    for name, table in TABLES[page].items():
        block = f"<!-- {name}: written by docs/tables.py -->\n{table()}\n<!-- end of {name} -->"
        pattern = f"<!-- {name}: written by docs/tables.py -->.*<!-- end of {name} -->"
        text, count = re.subn(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
        assert count == 1, f"{page} has lost the marks of its {name} table"
    return text


if __name__ == "__main__":
    for page in TABLES:
        (ROOT / page).write_text(with_tables(page, (ROOT / page).read_text("utf-8")), encoding="utf-8")
    print(f"efficiency of matrix units fitted on all published runs: {fitted_efficiency(PUBLISHED):.3f}")
