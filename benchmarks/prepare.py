"""How fast one core tokenizes a corpus, beside the tokenizer library's own batch encode, and in how much memory.

python benchmarks/prepare.py --tokenizer tokenizer.model [--megabytes 20] [--text FILE ...] [--rounds 5]

Makes a JSONL corpus by sampling pieces of Python's standard library (or of FILE) and takes turns on it: the library's
batch encode of texts that are in memory already, in one thread, and all that a worker does to a shard: reading, JSON,
checks, hashes, encoding, writing. Times are the process' CPU seconds, of which other programs take little.
Peak memory is that of a worker that makes corpora of this size and of four times that.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "LLAMA_JAX_TOKENIZER_THREADS": "1"}
os.environ.update(ONE_THREAD)  # before the libraries are loaded

from llama_jax.data import DataConfig  # noqa: E402
from llama_jax.data.corpus.files import find_files  # noqa: E402
from llama_jax.data.corpus.shards import BATCH_CHARS, ShardMaker  # noqa: E402
from llama_jax.data.corpus.workers import make_shards  # noqa: E402
from llama_jax.data.readers import units_by_shard  # noqa: E402
from llama_jax.data.readers.records import Unit  # noqa: E402
from llama_jax.tokenizers import Tokenizer, load_tokenizer  # noqa: E402


def sample(sources: list[Path], size: int, file: Path) -> list[str]:
    """Write about `size` bytes of documents of 5 to 200 lines into the JSONL `file`; returns their texts."""
    rng, texts, written = random.Random(0), [], 0
    lines = [path.read_text(errors="replace").splitlines(keepends=True) for path in sources]
    lines = [each for each in lines if len(each) > 5]
    with file.open("w") as out:
        while written < size:
            each = rng.choice(lines)
            begin = rng.randrange(len(each))
            texts.append("".join(each[begin : begin + rng.randint(5, 200)]))
            written += out.write(json.dumps({"id": len(texts), "text": texts[-1]}) + "\n")
    return texts


def batches(texts: list[str]) -> Iterator[list[str]]:
    """As much as the worker encodes at once, so that neither is slowed by holding all."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    yield batch


def library(tokenizer: Tokenizer) -> Callable[[list[str]], object]:
    """Run the library's own batch encode, in one thread."""
    inner = getattr(tokenizer, "_tokenizer", None)
    if inner is not None:
        return lambda texts: [e.ids for e in inner.encode_batch_fast(texts, add_special_tokens=False)]
    processor = tokenizer._processor
    return lambda texts: processor.encode(texts, num_threads=1)


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def peak() -> int:
    """Return the most memory that this process' only worker has held so far, in KiB (Linux)."""
    children = (pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split())
    (child,) = (pid for pid in children if b"popen_loky" in Path(f"/proc/{pid}/cmdline").read_bytes())
    (line,) = (line for line in Path(f"/proc/{child}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def one_shard(path: Path) -> tuple[DataConfig, list[Unit]]:
    config = DataConfig(path=(str(path),))
    return config, [unit for shard in units_by_shard(find_files(config), config) for unit in shard]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokenizer", required=True, metavar="PATH")
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="default: Python's standard library")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    encode = library(tokenizer)
    sources = args.text or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    with tempfile.TemporaryDirectory() as folder:
        corpus, larger, out = Path(folder) / "a.jsonl", Path(folder) / "b.jsonl", Path(folder) / "out"
        out.mkdir()
        texts = sample(sources, args.megabytes * 10**6, corpus)
        size = sum(len(text.encode()) for text in texts) / 1e6
        config, units = one_shard(corpus)
        maker = ShardMaker(out, "benchmark", config, tokenizer)
        times: dict[str, list[float]] = {"library": [], "worker": []}
        num_tokens = 0
        for _ in range(args.rounds):
            times["library"].append(seconds(lambda: [encode(batch) for batch in batches(texts)]))
            times["worker"].append(seconds(lambda: maker.make(0, units)))
        num_tokens = sum(
            split["tokens"] for split in json.loads((out / "shard-00000.json").read_text())["splits"].values()
        )
        print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {args.tokenizer}")
        print(
            f"{len(texts)} documents, {size:.1f} MB, {num_tokens} tokens; medians of {args.rounds} rounds, one thread"
        )
        for name, each in times.items():
            median = statistics.median(each)
            print(f"{name:8} {size / median:6.2f} MB/s {num_tokens / median / 1e6:6.3f} M tokens/s")
        ratios = [a / b for a, b in zip(times["library"], times["worker"], strict=True)]
        print(f"worker / library: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        with larger.open("wb") as joined:
            for _ in range(4):
                joined.write(corpus.read_bytes())
        for number, path in enumerate((corpus, larger), 1):
            config, units = one_shard(path)
            peaks: list[int] = []
            make_shards(maker, {number: units}, 1, lambda _, peaks=peaks: peaks.append(peak()))
            print(f"peak memory of a worker with {path.stat().st_size / 1e6:.0f} MB: {max(peaks) / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
