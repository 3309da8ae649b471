"""A small Llama that learns Python from the interpreter's own standard library; nothing is downloaded.

python train.py tiny_python
python sample.py runs/tiny_python --prompt "def main("
"""

import ast
import gzip
import lzma
import math
import sysconfig

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from llama_jax.checkpoint import CheckpointConfig
from llama_jax.data import DataConfig
from llama_jax.models import Compute, DecoderConfig
from llama_jax.nn import GroupedQuery, RMSNorm, Rope, SwiGLU
from llama_jax.run import LoggingConfig, Run, RunConfig
from llama_jax.sampling import generate_text
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import Muon


def get_config() -> RunConfig:
    return RunConfig(
        model=DecoderConfig(
            vocab_size=4096,
            hidden_size=256,
            num_layers=4,
            max_positions=512,
            attention=GroupedQuery(
                num_heads=4,
                num_kv_heads=2,
                head_dim=64,
                rope=Rope(theta=10000.0, scaling=None),
                qkv_bias=False,
                out_bias=False,
            ),
            feed_forward=SwiGLU(intermediate_size=640, bias=False),
            norm=RMSNorm(eps=1e-5),
            tie_embeddings=True,
        ),
        tokenizer=TokenizerConfig(path=None, kind="bpe", vocab_size=4096),
        data=DataConfig(
            path=(sysconfig.get_path("stdlib") + "/**/*.py",),
            exclude=(
                "*/site-packages/*",
                "*/test/*",
                "*/tests/*",
                "*/idlelib/*",
                "*/lib2to3/*",
                "*/encodings/*",
                "*/pydoc_data/*",
            ),
            validation_fraction=0.05,
        ),
        optimizer=Muon(learning_rate=8e-3, warmup_steps=40),
        num_steps=340,
        global_batch_size=math.lcm(16, jax.device_count()),  # the demo runs on whatever is there
        sequence_length=256,
        compute=Compute(dtype="bfloat16", scan_layers=False),
        checkpoint=CheckpointConfig(every_steps=170),
        logging=LoggingConfig(
            every_steps=10, validate_every_steps=170, sample_prompts=("def main(", "class ", "import ")
        ),
    )


def report(run: Run) -> None:
    """Print bits per byte on held-out files and the share of samples that parse, compared with simpler means."""
    texts = list(run.dataset.texts("validation"))
    data = "".join(texts).encode()
    if data:
        table = Table(
            "bits per byte", "model", "gzip -9", "xz", title=f"{len(texts)} held-out files, {len(data):,} bytes"
        )
        packed = [8 * len(part) / len(data) for part in (gzip.compress(data, 9), lzma.compress(data))]
        measured = [line["val_bits_per_byte"] for line in run.metrics()[-1:] if "val_bits_per_byte" in line]
        shown = [f"{x:.3f}" for x in measured] or ["not measured"]  # only where all of the text was
        table.add_row("", *shown, *(f"{x:.3f}" for x in packed))
        Console().print(table)
    bos_id = run.tokenizer.bos_id
    if bos_id is None:  # nothing that a sample could begin with
        return
    num_samples, num_tokens, temperature = 64, min(64, run.config.model.length_limit - 1), 0.5
    ours = generate_text(
        run.load(), [""] * num_samples, max_new_tokens=num_tokens, temperature=temperature, seed=run.config.seed
    )
    streams = [corpus.train for corpus in run.dataset.corpora.values()]
    trigram = Trigram(np.concatenate([stream.read(0, stream.num_tokens) for stream in streams]), bos_id)
    rng = np.random.default_rng(run.config.seed)
    theirs = [run.tokenizer.decode(trigram.sample(num_tokens, temperature, rng)) for _ in range(num_samples)]
    table = Table("accepted by ast.parse", "model", "trigram", title=f"{num_samples} samples of {num_tokens} tokens")
    table.add_row("", *(f"{100 * np.mean([is_python(text) for text in texts]):.0f}%" for texts in (ours, theirs)))
    Console().print(table)


def is_python(text: str) -> bool:
    """Return whether a text without its unfinished last line is a program of at least one statement."""
    try:
        return bool(ast.parse(text.rpartition("\n")[0]).body)
    except (SyntaxError, ValueError):
        return False


class Trigram:
    """The trigram model of a token stream: the next token as often as it followed the last two."""

    def __init__(self, tokens: np.ndarray, bos_id: int):
        self._bos_id, self._size = bos_id, int(tokens.max()) + 1
        contexts = tokens[:-2].astype(np.int64) * self._size + tokens[1:-1]
        order = np.argsort(contexts, kind="stable")
        self._contexts, self._next = contexts[order], tokens[2:][order]
        self._first = tokens[1:][tokens[:-1] == bos_id]

    def sample(self, num_tokens: int, temperature: float, rng: np.random.Generator) -> list[int]:
        ids = [int(rng.choice(self._first))]
        before = self._bos_id
        while len(ids) < num_tokens:
            context = before * self._size + ids[-1]
            start, stop = np.searchsorted(self._contexts, [context, context + 1])
            values, counts = np.unique(self._next[start:stop], return_counts=True)
            if not len(values):  # the last two tokens of the stream
                break
            share = counts ** (1 / temperature)
            before = ids[-1]
            ids.append(int(rng.choice(values, p=share / share.sum())))
            if ids[-1] == self._bos_id:
                break
        return ids
