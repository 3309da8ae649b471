"""Compiles the train step for more and more TPU chips at a constant batch per chip.

`python benchmarks/weak_scaling.py` needs libtpu (extra `plan`) and matplotlib (extra `notebooks`), and no TPU. Writes
docs/weak_scaling.json, what XLA says of each program, and docs/weak_scaling.png. FLOPs of a chip should not change with
their number, and what it sends should approach a limit.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from llama_jax.data import DataConfig
from llama_jax.models import Compute, DecoderConfig
from llama_jax.nn import GroupedQuery, RMSNorm, Rope, SwiGLU
from llama_jax.parallel import MeshConfig
from llama_jax.planning import compile_step
from llama_jax.run_config import RunConfig
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import AdamW

DOCS = Path(__file__).resolve().parent.parent / "docs"
# 512 chips are two slices: parameters are split within a slice, and gradients cross between them.
MACHINES = {
    8: ("v5e:2x4", {"fsdp": 8}),
    16: ("v5e:4x4", {"fsdp": 16}),
    32: ("v5e:4x8", {"fsdp": 32}),
    64: ("v5e:8x8", {"fsdp": 64}),
    128: ("v5e:8x16", {"fsdp": 128}),
    256: ("v5e:16x16", {"fsdp": 256}),
    512: ("2x v5e:16x16", {"data": 2, "fsdp": 256}),
}
MODEL = DecoderConfig(
    vocab_size=32000,
    hidden_size=1024,
    num_layers=4,
    max_positions=4096,
    attention=GroupedQuery(8, 8, 128, Rope(10000.0, None), qkv_bias=False, out_bias=False),
    feed_forward=SwiGLU(intermediate_size=2816, bias=False),
    norm=RMSNorm(eps=1e-5),
    tie_embeddings=False,
)
ROWS_PER_CHIP, LENGTH = 2, 1024


def measure(num_chips: int) -> dict[str, float]:
    topology, mesh = MACHINES[num_chips]
    step = compile_step(
        RunConfig(
            tokenizer=TokenizerConfig(
                path="tokenizer.model", kind="bpe", vocab_size=0
            ),  # neither this nor the data matters
            data=DataConfig(path=()),
            num_steps=1,
            model=MODEL,
            compute=Compute(dtype="bfloat16", remat="full", attention_kernel="reference"),
            optimizer=AdamW(learning_rate=1e-3, warmup_steps=10),
            mesh=MeshConfig(**mesh),
            global_batch_size=ROWS_PER_CHIP * num_chips,
            sequence_length=LENGTH,
        ),
        topology,
    )
    sent = {False: 0, True: 0}
    for collective in step.collectives:
        sent[collective.across_slices] += collective.count * collective.wire_bytes
    return {
        "chips": num_chips,
        "flops": step.flops,
        "bytes_sent_within_slice": sent[False],
        "bytes_sent_across_slices": sent[True],
        "memory_bytes": step.memory.total,
        "argument_bytes": step.memory.arguments,
    }


def plot(rows: list[dict[str, float]]) -> None:
    chips = [row["chips"] for row in rows]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    axes[0].plot(chips, [row["flops"] / 1e9 for row in rows], "o-")
    axes[0].set_title("matrix products per chip (GFLOP)")
    axes[1].plot(chips, [row["bytes_sent_within_slice"] / 2**20 for row in rows], "o-", label="within a slice")
    axes[1].plot(chips, [row["bytes_sent_across_slices"] / 2**20 for row in rows], "s--", label="between slices")
    axes[1].set_title("sent by a chip in a step (MiB)")
    axes[1].legend()
    axes[2].plot(chips, [row["memory_bytes"] / 2**20 for row in rows], "o-", label="all")
    axes[2].plot(chips, [row["argument_bytes"] / 2**20 for row in rows], "s--", label="parameters, optimizer, batch")
    axes[2].set_title("memory of a chip (MiB)")
    axes[2].legend()
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(chips, [str(n) for n in chips])
        axis.set_xlabel("chips")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.savefig(DOCS / "weak_scaling.png", dpi=110)


def main() -> None:
    rows = []
    for num_chips in MACHINES:
        rows.append(measure(num_chips))
        print(rows[-1], flush=True)
    (DOCS / "weak_scaling.json").write_text(json.dumps(rows, indent=2) + "\n")
    plot(rows)


if __name__ == "__main__":
    main()
