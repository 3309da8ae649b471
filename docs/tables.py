"""Writes the tables of the README that the package knows better: `python docs/tables.py`."""

import dataclasses
import functools
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_jax
from llama_jax.models import Compute, DecoderConfig
from llama_jax.nn import GroupedQuery, SwiGLU
from llama_jax.parallel import MeshConfig
from llama_jax.planning import Topology, Workload, estimate
from llama_jax.planning.report import duration, gib, mesh_text
from llama_jax.training import OptimizerConfig, train_flops_per_token

README = Path(__file__).resolve().parent.parent / "README.md"


def presets_table() -> str:
    """Every preset with its shape and exact number of parameters."""
    rows = ["| preset | layers | width | heads / kv heads | feed-forward | vocabulary | positions | parameters |"]
    rows.append("|---|---|---|---|---|---|---|---:|")
    for name, config in llama_jax.presets().items():
        assert isinstance(config, DecoderConfig)
        attention, feed_forward = config.attention, config.feed_forward
        assert isinstance(attention, GroupedQuery)
        assert isinstance(feed_forward, SwiGLU)
        heads = f"{attention.num_heads} / {attention.num_kv_heads}"
        shape = (config.num_layers, config.hidden_size, heads, feed_forward.intermediate_size)
        cells = (f"`{name}`", *shape, config.vocab_size, config.max_positions)
        rows.append(f"| {' | '.join(map(str, cells))} | {llama_jax.num_parameters(config):,} |")
    return "\n".join(rows)


# (what, config, topology, changes): a global batch of 4M tokens each.
PLANS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("Llama-2 7B", "llama2_7b", "v5e:8x8", {"optimizer.accumulation_steps": 4}),
    ("Llama-2 7B", "llama2_7b", "v5e:16x16", {}),
    ("Llama-2 70B", "llama2_70b", "v5p:4x4x8", {}),
    ("Llama-2 70B", "llama2_70b", "v6e:16x16", {"optimizer.accumulation_steps": 2}),
    *(
        (
            "Llama-3 8B, 131,072 positions",
            "llama3_8b",
            "v5p:4x4x8",
            {
                "model.max_positions": 131072,
                "sequence_length": 131072,
                "global_batch_size": 32,
                "mesh.context": context,
                "optimizer.accumulation_steps": context // 4,
            },
        )
        for context in (4, 8, 16)
    ),
]


def plans_table() -> str:
    """What the planner estimates of a few runs."""
    rows = ["| run | chips | mesh | parts of the batch | GiB a chip | of | step | bound by | MFU | tokens/s |"]
    rows.append("|---|---|---|---:|---:|---:|---:|---|---:|---:|")
    for what, name, topology, changes in PLANS:
        plan = llama_jax.plan(llama_jax.load_config(name, changes), topology).plan
        cells = (
            what, f"{plan.topology} ({plan.num_chips})", mesh_text(plan.mesh), plan.accumulation_steps,
            gib(plan.total_bytes), gib(plan.capacity), duration(plan.step_seconds), plan.bound, f"{plan.mfu:.1%}",
            f"{plan.tokens_per_second:,.0f}",
        )  # fmt: skip
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


@dataclasses.dataclass(frozen=True)
class Published:
    """A run that MaxText published: what it ran, and its MFU (attention counted in full) or tokens/s a chip."""

    what: str
    preset: str
    topology: str
    batch_per_chip: int
    sequence_length: int
    mfu: float | None = None
    tokens_per_second: float | None = None


# MaxText's end_to_end/tpu/llama2/run_llama2.md (MFU) with the batches of benchmarks/maxtext_{v5e,v5p}_model_configs.py,
# of v4 none is given: as on v5p; and the logs in AI-Hypercomputer/tpu-recipes, training/trillium. v4-128 and v5p-128
# count cores. All are split by FSDP alone. What they compute again (all but some projections, which some keep in the
# host's memory) is no policy here: `full` is the nearest.
PUBLISHED = [
    Published("Llama-2 70B, v4-128", "llama2_70b", "v4:4x4x4", 4, 4096, mfu=0.57),
    Published("Llama-2 70B, v5e-256", "llama2_70b", "v5e:16x16", 2, 2048, mfu=0.57),
    Published("Llama-2 70B, v5p-128", "llama2_70b", "v5p:4x4x4", 4, 4096, mfu=0.65),
    Published("Llama-2 70B, v6e-256", "llama2_70b", "v6e:16x16", 3, 4096, tokens_per_second=905.021),
    Published("Llama-3.1 8B, v6e-256", "llama3_8b", "v6e:16x16", 4, 8192, tokens_per_second=7207.336),
    Published("Llama-3.1 70B, v6e-256", "llama3_70b", "v6e:16x16", 5, 8192, tokens_per_second=960.248),
]


def published_mfu(run: Published) -> float:
    """By this package's formula, which counts causal attention at half."""
    model, peak = llama_jax.presets()[run.preset], Topology.parse(run.topology).chip.peak_flops
    flops = train_flops_per_token(model, run.sequence_length)
    if run.tokens_per_second is not None:
        return run.tokens_per_second * flops / peak
    assert run.mfu is not None
    other_half = 3 * sum(mixer.score_flops(run.sequence_length / 2) for mixer, _ in model.layer_pieces())
    return run.mfu * flops / (flops + other_half)


def predicted_mfu(run: Published, efficiency: float) -> float:
    """By the planner, when matrix units reach this part of their peak."""
    topology = Topology.parse(run.topology)
    workload = Workload(
        model=llama_jax.presets()[run.preset],
        compute=Compute(remat="full"),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=1),
        mesh=MeshConfig(fsdp=-1),
        global_batch_size=run.batch_per_chip * topology.num_chips,
        sequence_length=run.sequence_length,
    )
    return estimate(workload, topology, efficiency=efficiency).mfu


@functools.cache
def fitting_efficiency(run: Published) -> float:
    """The efficiency at which the planner predicts this run exactly, by bisection."""
    published, low, high = published_mfu(run), 0.01, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if predicted_mfu(run, middle) < published else (low, middle)
    return low


def fitted_efficiency(runs: Sequence[Published]) -> float:
    """The geometric mean of what fits each of the runs."""
    return statistics.geometric_mean(map(fitting_efficiency, runs))


def published_table() -> str:
    """Published MFU beside what is predicted with the efficiency that the other runs give."""
    rows = ["| run of MaxText | published MFU | efficiency fitted on the others | predicted MFU | difference |"]
    rows.append("|---|---:|---:|---:|---:|")
    for run in PUBLISHED:
        efficiency = fitted_efficiency([other for other in PUBLISHED if other != run])
        published, predicted = published_mfu(run), predicted_mfu(run, efficiency)
        cells = (
            run.what,
            f"{published:.1%}",
            f"{efficiency:.2f}",
            f"{predicted:.1%}",
            f"{predicted / published - 1:+.0%}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


TABLES = {"presets": presets_table, "plans": plans_table, "published runs": published_table}


def with_tables(text: str) -> str:
    """The README's text with its tables as they should be."""
    for name, table in TABLES.items():
        block = f"<!-- {name}: written by docs/tables.py -->\n{table()}\n<!-- end of {name} -->"
        pattern = f"<!-- {name}: written by docs/tables.py -->.*<!-- end of {name} -->"
        text, count = re.subn(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
        assert count == 1, f"README.md has lost the marks of its {name} table"
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text("utf-8")), encoding="utf-8")
    print(f"efficiency of matrix units fitted on all published runs: {fitted_efficiency(PUBLISHED):.3f}")
