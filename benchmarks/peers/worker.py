"""What every peer's process shares: the weights and tokens of the work, and the line protocol.

Imported by interpreters of several environments: the standard library and numpy only, Python >= 3.11.

One JSON object a line, on stdin and stdout:
    {"cmd": "setup", "work": {...}}  ->  {"parameters": n, "versions": {...}, "setup_seconds": s}
    {"cmd": "run", "steps": n}       ->  {"seconds": s, "cpu_seconds": s, "peak_bytes": n, "result": [...]}
A run of decoding may have `new_tokens`, in place of those of the work.
`result` is what the work computed (the losses of a training turn, the tokens of a decoding one). The weights, the
tokens and the optimizer's settings are the same for all, so that equal results prove equal work.
"""

import itertools
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np

Work = dict  # one entry of works.py, as JSON
Run = Callable[..., list]  # (steps) -> losses, or (steps, new_tokens) -> tokens of the last step

LEARNING_RATE = 3e-4
BETAS = (0.9, 0.95)
EPS = 1e-8
WEIGHT_DECAY = 0.1  # on matrices only
CLIP = 1.0
NORM_EPS = 1e-5
ROPE_THETA = 1_000_000.0  # tunix's Llama uses this value whatever its config says


def parameters(work: Work) -> dict[str, np.ndarray]:
    """All weights by name, layers stacked in front, projections as [in..., out...], reproducible by (name, shape)."""
    d, f, v = work["hidden_size"], work["intermediate_size"], work["vocab_size"]
    n, k, h, num_layers = work["num_heads"], work["num_kv_heads"], work["head_dim"], work["num_layers"]
    layer = {
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
        "attention.q_proj": (d, n, h),
        "attention.k_proj": (d, k, h),
        "attention.v_proj": (d, k, h),
        "attention.o_proj": (n, h, d),
        "feed_forward.gate_proj": (d, f),
        "feed_forward.up_proj": (d, f),
        "feed_forward.down_proj": (f, d),
    }
    shapes = {"embedding.weight": (v, d), "norm.weight": (d,)}
    shapes |= {f"layers.{name}.weight": (num_layers, *shape) for name, shape in layer.items()}
    if not work["tie_embeddings"]:
        shapes["lm_head.weight"] = (d, v)
    return {name: _values(name, shape, work) for name, shape in shapes.items()}


def _values(name: str, shape: tuple[int, ...], work: Work) -> np.ndarray:
    if "norm" in name:
        return np.ones(shape, np.float32)
    if name == "embedding.weight":
        scale = 0.02
    else:
        fan_in = {"o_proj": work["num_heads"] * work["head_dim"], "down_proj": work["intermediate_size"]}
        scale = 1 / math.sqrt(fan_in.get(name.split(".")[-2], work["hidden_size"]))
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    return noise * np.float32(scale)


def training_tokens(work: Work) -> Iterator[np.ndarray]:
    """Endless random batches int32 [B, T]; every token is predicted from the ones before it in its row."""
    rng = np.random.default_rng(0)
    shape = (work["batch_size"], work["sequence_length"])
    return itertools.cycle([rng.integers(1, work["vocab_size"], shape, np.int32) for _ in range(8)])


def prompt_tokens(work: Work) -> np.ndarray:
    """Return the prompts, int32 [B, P]: token 1 (as BOS), then random ones."""
    shape = (work["batch_size"], work["prompt_length"])
    tokens = np.random.default_rng(1).integers(3, work["vocab_size"], shape, np.int32)
    tokens[:, 0] = 1
    return tokens


def peak_bytes() -> int | None:
    """Return the largest resident memory of this process so far, where Linux tells."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def serve(packages: list[str], tasks: dict[str, Callable[[Work], tuple[int, Run]]]) -> None:
    """Answer requests until stdin closes. A task builds its model and returns (parameter count, run)."""
    # Libraries print: what they write to stdout goes to stderr, the protocol keeps the real one.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run: Run | None = None
    for line in sys.stdin:
        request = json.loads(line)
        start, cpu_start = time.perf_counter(), time.process_time()
        if request["cmd"] == "setup":
            num_parameters, run = tasks[request["work"]["task"]](request["work"])
            reply = {
                "parameters": num_parameters,
                "versions": {package: version(package) for package in packages},
                "setup_seconds": time.perf_counter() - start,
            }
        else:
            assert run is not None, "setup comes before run"
            more = {"new_tokens": request["new_tokens"]} if "new_tokens" in request else {}
            result = run(request["steps"], **more)
            reply = {
                "seconds": time.perf_counter() - start,
                "cpu_seconds": time.process_time() - cpu_start,
                "peak_bytes": peak_bytes(),
                "result": result,
            }
        channel.write(json.dumps(reply) + "\n")
        channel.flush()
