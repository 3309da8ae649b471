# ruff: noqa: E402
"""Write one artifact of each kind, and what it reads and continues to: `python make_artifacts.py DIR`.

Each run stops after 4 of its 6 steps; `expected.json` has what reading gives and what the last steps then come to.
The archive beside this file was written with the library of commit 932ad47 (version 0.1.0), which this program needs:
later versions read the archive and never write it again.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the tests
os.environ |= {"JAX_PLATFORMS": "cpu", "LLAMA_JAX_CACHE": "/nowhere"}
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_parallel_codegen_split_count=1"
)
sys.path.insert(0, str(ROOT))

import numpy as np
import tiny_run
from before.reading import LAST, STOPPED, digests, read_stopped

import llama_jax
from llama_jax import zoo
from llama_jax.data import DataConfig
from llama_jax.data.objectives import ParallelText
from llama_jax.models import Compute
from llama_jax.nn import SinusoidalPositions
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import OptimizerConfig
from llama_jax.zoo.transformer import transformer

GOLDENS = ROOT / "parity" / "goldens"


def configs(folder: Path):
    base = tiny_run.get_config()
    small = {"num_layers": 1, "hidden_size": 16}
    llama = dataclasses.replace(
        base.model,
        **small,
        attention=dataclasses.replace(base.model.attention, num_heads=2, num_kv_heads=1),
        feed_forward=dataclasses.replace(base.model.feed_forward, intermediate_size=24),
    )
    base = dataclasses.replace(
        base,
        model=llama,
        num_steps=LAST,
        data=DataConfig(path=("texts",), validation_fraction=0.2, cache_dir="cache"),
        checkpoint=dataclasses.replace(base.checkpoint, every_steps=2),
        logging=dataclasses.replace(base.logging, validate_every_steps=LAST),
    )
    yield "llama", base
    data = json.loads((GOLDENS / "deepseek_v3" / "config.json").read_text())
    data |= {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    experts = dataclasses.replace(zoo.family("deepseek_v3").from_hf(data), vocab_size=llama.vocab_size)
    yield "experts", dataclasses.replace(base, model=experts, data=dataclasses.replace(base.data, packing="best_fit"))
    pairs = transformer(
        vocab_size=16, hidden_size=16, num_encoder_layers=1, num_layers=1, encoder_heads=2, num_heads=2,
        encoder_intermediate_size=24, intermediate_size=24, max_positions=24, positions=SinusoidalPositions(),
        decoder_start_id=13, scale_embedding=True, dropout=0.1,
    )  # fmt: skip
    yield (
        "translation",
        dataclasses.replace(
            base,
            model=pairs,
            tokenizer=TokenizerConfig(path=None, kind="whitespace", vocab_size=15, special_tokens=("<s>", "</s>")),
            data=DataConfig(
                path=("pairs.jsonl",), fields=("source", "target"), objective=ParallelText(source_length=24),
                packing="best_fit", validation_fraction=0.2, cache_dir="cache",
            ),
            optimizer=OptimizerConfig(
                learning_rate=1e-2, warmup_steps=2, schedule="inverse_sqrt", label_smoothing=0.1, weight_decay=0.0
            ),
            sequence_length=24,
            compute=Compute(scan_layers=False),
            logging=dataclasses.replace(base.logging, sample_prompts=()),
        ),
    )  # fmt: skip


def write_texts(name: str, folder: Path) -> None:
    if name != "translation":
        tiny_run.write_texts(folder / "texts")
        return
    words = [f"w{i}" for i in range(12)]
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(60):
        source = [words[i] for i in rng.integers(12, size=rng.integers(2, 8))]
        lines.append(json.dumps({"source": " ".join(source), "target": " ".join(reversed(source))}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")


def main(target: Path) -> None:
    expected = {}
    target.mkdir(parents=True)
    for name, config in configs(target):
        folder = target / name
        folder.mkdir()
        os.chdir(folder)
        write_texts(name, folder)
        run = llama_jax.train(config, "run")
        expected[name] = {
            "stopped": read_stopped(run, STOPPED),
            "means": {k: float(np.abs(np.asarray(v)).mean()) for k, v in run.load(step=LAST).model.params().items()},
            "metrics": [
                {k: v for k, v in line.items() if k in ("step", "loss", "val_loss", "grad_norm", "learning_rate")}
                for line in run.metrics()
            ],
        }
        for path in Path("run/checkpoints").iterdir():
            if path.name.isdigit() and int(path.name) != STOPPED:
                shutil.rmtree(path)
        (folder / "run" / "samples.txt").unlink(missing_ok=True)
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line).get("step", 0) <= STOPPED]
        (folder / "run" / "metrics.jsonl").write_text("".join(kept))
    os.chdir(target)
    lm = llama_jax.load("llama/run")
    llama_jax.save(lm, "native", format="native")
    llama_jax.save(lm, "hf", format="hf")
    tokens = np.array([[1, 5, 9, 40]], np.int32)
    ids = np.asarray(llama_jax.generate(lm, tokens, max_new_tokens=8))
    expected["native"] = {"params": digests(lm.model.params()), "greedy": ids.tolist()}
    expected["files"] = {
        str(p.relative_to(target)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(target.rglob("*"))
        if p.is_file() and "cache" in p.parts
    }
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
