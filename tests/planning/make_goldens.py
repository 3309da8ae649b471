"""Compiles for TPUs what the tests of the planner compare with; run where libtpu is installed (extra `plan`).

`python tests/planning/make_goldens.py [NAME...]` writes `programs/NAME.txt`, small programs whose collectives are known
because they are written out here, and `goldens/NAME.json`, what XLA makes of the train step in each layout.
"""

import dataclasses
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import (  # noqa: E402
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec as P,
)

from llama_jax.config import to_json  # noqa: E402
from llama_jax.data import DataConfig  # noqa: E402
from llama_jax.models import Compute, DecoderConfig  # noqa: E402
from llama_jax.nn import Experts, GroupedQuery, RMSNorm, Rope, SoftmaxTopK, SwiGLU  # noqa: E402
from llama_jax.parallel import MeshConfig  # noqa: E402
from llama_jax.planning import CompiledStep, compile_step  # noqa: E402
from llama_jax.planning.xla.compiled import ENVIRONMENT, get_devices  # noqa: E402
from llama_jax.run_config import RunConfig  # noqa: E402
from llama_jax.tokenizers import TokenizerConfig  # noqa: E402
from llama_jax.training import AdamW  # noqa: E402

MODEL = DecoderConfig(
    vocab_size=32000,
    hidden_size=1024,
    num_layers=4,
    max_positions=4096,
    attention=GroupedQuery(
        num_heads=8, num_kv_heads=8, head_dim=128, rope=Rope(10000.0, None), qkv_bias=False, out_bias=False
    ),
    feed_forward=SwiGLU(intermediate_size=2816, bias=False),
    norm=RMSNorm(eps=1e-5),
    tie_embeddings=False,
)


# libtpu makes a reduce-scatter only where more than 128 elements of the last dimension are left on a device.
WIDE = dataclasses.replace(
    MODEL,
    hidden_size=2048,
    num_layers=2,
    attention=dataclasses.replace(MODEL.attention, num_heads=16, num_kv_heads=16),
    feed_forward=SwiGLU(intermediate_size=5632, bias=False),
)


def planned(**fields: Any) -> RunConfig:
    """A run to plan, whose tokenizer and text do not matter."""
    anything = {
        "tokenizer": TokenizerConfig(path="tokenizer.model", kind="bpe", vocab_size=0),
        "data": DataConfig(path=()),
        "optimizer": AdamW(learning_rate=1e-3, warmup_steps=10),
        "num_steps": 1,
    }
    return RunConfig(**(anything | fields))


def layout(
    mesh: dict[str, int], batch: int, length: int, kernel: str = "reference", model: DecoderConfig = MODEL
) -> RunConfig:
    return planned(
        model=model,
        compute=Compute(dtype="bfloat16", remat="full", attention_kernel=kernel),
        mesh=MeshConfig(**({"fsdp": 1} | mesh)),
        global_batch_size=batch,
        sequence_length=length,
    )


LAYOUTS = {
    "data": layout({"data": 8}, 16, 256),
    "fsdp": layout({"fsdp": 8}, 16, 256, model=WIDE),
    "tensor": layout({"tensor": 8}, 16, 256),
    "fsdp_tensor": layout({"fsdp": 2, "tensor": 4}, 16, 256),
    "context": layout({"context": 8}, 4, 2048, "blockwise"),
    "fsdp_torus": layout({"fsdp": 16}, 32, 256, model=WIDE),
    "fsdp_tensor_torus": layout({"fsdp": 4, "tensor": 4}, 32, 256),
    "two_slices": layout({"data": 2, "fsdp": 4}, 16, 256),
}
# Without `minimum`: what experts send is compared with the planner's formulas.
EXPERTS = layout(
    {"fsdp": 2, "expert": 4},
    16,
    256,
    model=dataclasses.replace(
        MODEL, num_layers=2, feed_forward=Experts(8, 1024, SoftmaxTopK(2, normalize=True), "silu", gated=True)
    ),
)
TOPOLOGIES = dict.fromkeys([*LAYOUTS, "experts"], "v5e:2x4") | {"fsdp_torus": "v5e:4x4", "fsdp_tensor_torus": "v5e:4x4"}
TOPOLOGIES["two_slices"] = "2x v5e:2x2"


def totals(step: CompiledStep) -> dict[str, dict[str, int]]:
    """Executions in a step, and bytes on the wire, of each kind of collective over each set of mesh axes."""
    found: dict[str, dict[str, int]] = {}
    for collective in step.collectives:
        entry = found.setdefault(collective.label, {"count": 0, "bytes": 0})
        entry["count"] += collective.count
        entry["bytes"] += collective.count * collective.wire_bytes
    return dict(sorted(found.items()))


def compile_layout(name: str) -> CompiledStep:
    return compile_step(EXPERTS if name == "experts" else LAYOUTS[name], TOPOLOGIES[name])


def make_golden(name: str) -> None:
    step = compile_layout(name)
    golden = {
        "libtpu": importlib.metadata.version("libtpu"),
        "memory": to_json(step.memory),
        "flops": step.flops,
        "collectives": totals(step),
    }
    (FOLDER / "goldens" / f"{name}.json").write_text(json.dumps(golden, indent=2) + "\n")


def kinds() -> tuple[Callable, Mesh, list[jax.ShapeDtypeStruct]]:
    """One collective of each kind, on a mesh (a: 2, b: 4)."""
    mesh = Mesh(np.array(get_devices("v5e:2x4")).reshape(2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    sharding = NamedSharding(mesh, P(("a", "b")))

    def local(x):
        return (
            jax.lax.psum(x, "a"),
            jax.lax.all_gather(2 * x, "b", tiled=True),
            jax.lax.psum_scatter(3 * x, ("a", "b"), tiled=True),
            jax.lax.all_to_all(4 * x, "b", 0, 1, tiled=True),
            jax.lax.ppermute(5 * x, "b", [(i, (i + 1) % 4) for i in range(4)]),
        )

    out_specs = (P(("a", "b")),) * 5
    arguments = [jax.ShapeDtypeStruct((8 * 512, 1024), jnp.float32, sharding=sharding)]
    return jax.shard_map(local, mesh=mesh, out_specs=out_specs, check_vma=False), mesh, arguments


def layers() -> tuple[Callable, Mesh, list[jax.ShapeDtypeStruct]]:
    """The gradient of six scanned layers; their two weights [1024, 1024] are split over fsdp: 8, gathered for use."""
    mesh = Mesh(np.array(get_devices("v5e:2x4")), ("fsdp",), axis_types=(AxisType.Explicit,))

    def loss(weights, x):
        def layer(x, pair):
            for weight in pair:
                x = jnp.sin(x @ jax.sharding.reshard(weight.astype(jnp.bfloat16), P(None, None)))
            return x, None

        return jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, weights)[0].astype(jnp.float32).sum()

    weight = jax.ShapeDtypeStruct((6, 1024, 1024), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    x = jax.ShapeDtypeStruct((8 * 1024, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp")))
    return jax.grad(loss), mesh, [(weight, weight), x]


def ring() -> tuple[Callable, Mesh, list[jax.ShapeDtypeStruct]]:
    """Keys that travel seven times around eight devices, in a loop, while they are multiplied with."""
    mesh = Mesh(np.array(get_devices("v5e:2x4")), ("context",), axis_types=(AxisType.Explicit,))

    def local(q, k):
        def hop(_, carry):
            k, total = carry
            return jax.lax.ppermute(k, "context", [(i, (i + 1) % 8) for i in range(8)]), total + q @ k.T

        return jax.lax.fori_loop(0, 7, hop, (k, jnp.zeros((q.shape[0], k.shape[0]), jnp.float32)))[1]

    x = jax.ShapeDtypeStruct((8 * 512, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, P("context")))
    return jax.shard_map(local, mesh=mesh, out_specs=P("context"), check_vma=False), mesh, [x, x]


def slices() -> tuple[Callable, Mesh, list[jax.ShapeDtypeStruct]]:
    """Four slices as a mesh (a: 2, b: 2), each of four chips (c)."""
    devices = sorted(get_devices("4x v5e:2x2"), key=lambda d: d.id)
    mesh = Mesh(np.array(devices).reshape(2, 2, 4), ("a", "b", "c"), axis_types=(AxisType.Explicit,) * 3)
    sharding = NamedSharding(mesh, P(("a", "b", "c")))

    def local(x):
        return (
            jax.lax.psum(x, "a"),
            jax.lax.psum(2 * x, ("a", "b")),
            jax.lax.all_gather(3 * x, "b", tiled=True),
            jax.lax.psum_scatter(4 * x, "b", tiled=True),
            jax.lax.ppermute(5 * x, "a", [(0, 1), (1, 0)]),
            jax.lax.all_gather(6 * x, "c", tiled=True),
        )

    arguments = [jax.ShapeDtypeStruct((16 * 1024, 1024), jnp.float32, sharding=sharding)]
    return jax.shard_map(local, mesh=mesh, out_specs=(P(("a", "b", "c")),) * 6, check_vma=False), mesh, arguments


PROGRAMS = {"kinds": kinds, "layers": layers, "ring": ring, "slices": slices}


def make_program(name: str) -> None:
    function, mesh, arguments = PROGRAMS[name]()
    with jax.set_mesh(mesh):
        text = jax.jit(function).lower(*arguments).compile().as_text() or ""
    # What nothing reads, and what says where this was compiled.
    text = re.sub(r", backend_config=\{.*\}$", "", text, flags=re.M)
    text = re.sub(r" stack_frame_id=\d+", "", text)
    text = re.sub(r"^(FileNames|FunctionNames|FileLocations|StackFrames)\n(.+\n)*\n?", "", text, flags=re.M)
    (FOLDER / "programs" / f"{name}.txt").write_text(text)


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    for name in sys.argv[1:] or [*PROGRAMS, *TOPOLOGIES]:
        print(name, flush=True)
        make_program(name) if name in PROGRAMS else make_golden(name)
