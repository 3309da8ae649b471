"""How many tokens a second a core makes batches of, from shards on disk to numpy arrays.

    python benchmarks/loader.py [--run runs/demo]

Every objective and packing, and a mixture of two sources, on the text of the config tiny_python (the interpreter's own
standard library), in batches of 32 rows of 1024 positions; medians over rounds that take turns. With `--run` the
training speed of that run, from its own metrics, is put beside them.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from llama_jax.data import Batches, DataConfig, Dataset, Source, Vocabulary, prepare_dataset, read_texts
from llama_jax.data.objectives import BlankFilling, Causal, Denoising, MaskedLM, Objective, Prefix, SpanCorruption
from llama_jax.run import load_config
from llama_jax.tokenizers import Tokenizer, train_tokenizer

ROWS, LENGTH = 32, 1024
WORKS: dict[str, tuple[Objective, str]] = {
    "causal, cut": (Causal(), "cut"),
    "causal, best fit": (Causal(), "best_fit"),
    "prefix, best fit": (Prefix(), "best_fit"),
    "blank filling, best fit": (BlankFilling(), "best_fit"),
    "masked LM with pairs, best fit": (MaskedLM(), "best_fit"),
    "span corruption, best fit": (SpanCorruption(source_length=LENGTH, start_token="bos"), "best_fit"),
    "BART's noise, best fit": (Denoising(source_length=LENGTH), "best_fit"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="directory of a run whose speed is to be compared with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of every turn")
    parser.add_argument("--cache-dir", help="where the corpora are kept (default: nowhere)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        batches = made(args.cache_dir or folder)
        speeds: dict[str, list[float]] = {name: [] for name in batches}
        for _ in range(args.rounds):
            for name, own in batches.items():
                speeds[name].append(speed(own, args.seconds))
    trained = training_speed(args.run) if args.run else None
    table = Table("rows of", "tokens/s of a core", "slowest to fastest", "times the run's speed")
    for name, values in speeds.items():
        median = statistics.median(values)
        times = "" if trained is None else f"{median / trained:,.0f}"
        table.add_row(name, f"{median:,.0f}", f"{min(values):,.0f} to {max(values):,.0f}", times)
    Console().print(table)
    if trained is not None:
        print(f"the run trained on {trained:,.0f} tokens/s (median of its metrics)")


def made(cache_dir: str) -> dict[str, Batches]:
    """Batches by the name of what is measured."""
    config = dataclasses.replace(load_config("tiny_python").data, cache_dir=cache_dir, document_chars=8000)
    names = {name for objective, _ in WORKS.values() for name in objective.special_tokens()}
    tokenizer = train_tokenizer(read_texts(config, "train"), vocab_size=4096, special_tokens=sorted(names))
    found = {
        name: opened(dataclasses.replace(config, objective=objective, packing=packing), tokenizer)
        for name, (objective, packing) in WORKS.items()
    }
    (path,) = config.path
    halves = tuple(Source(name, (path.replace("*.py", f"[{name}]*.py"),), share=0.5) for name in ("a-m", "n-z"))
    mixed = dataclasses.replace(config, path=(), sources=halves)
    return found | {"causal, cut, a mixture of two": opened(mixed, tokenizer)}


def opened(config: DataConfig, tokenizer: Tokenizer) -> Batches:
    directories = prepare_dataset(config, tokenizer, sequence_length=LENGTH)
    dataset = Dataset(config, directories, Vocabulary.of(tokenizer), sequence_length=LENGTH, seed=0)
    mixture = dataset.mixture(global_batch_size=ROWS, num_steps=1000)
    return Batches(dataset.train, mixture=mixture, global_batch_size=ROWS, seed=0)


def speed(batches: Batches, seconds: float) -> float:
    """Positions a second of processor time, in this thread alone; padding is none, a source's are some."""
    positions, step = 0, 0
    start = time.thread_time()
    while (spent := time.thread_time() - start) < seconds:
        batch = batches.batch(step)
        positions += int((batch["segment_ids"] > 0).sum())
        if "source_segment_ids" in batch:
            positions += int((batch["source_segment_ids"] > 0).sum())
        step += 1
    return positions / spent


def training_speed(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)


if __name__ == "__main__":
    main()
