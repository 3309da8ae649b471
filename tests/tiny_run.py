"""A run that takes seconds; also a config file: `train.py tests/tiny_run.py --data.path TEXTS`.

Its corpus has fewer windows than the run takes, so that the data's second epoch begins within a batch.
"""

import random
from pathlib import Path

from llama_jax.checkpoint import CheckpointConfig
from llama_jax.data import DataConfig
from llama_jax.models import Compute, DecoderConfig
from llama_jax.nn import GroupedQuery, RMSNorm, Rope, SwiGLU
from llama_jax.run import LoggingConfig, RunConfig
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import AdamW

TEXT = "the cat sat on a mat and then ran to see what made such noise in that old red barn by our river"


def get_config() -> RunConfig:
    return RunConfig(
        model=DecoderConfig(
            vocab_size=304,
            hidden_size=32,
            num_layers=1,
            max_positions=64,
            attention=GroupedQuery(
                num_heads=4,
                num_kv_heads=2,
                head_dim=8,
                rope=Rope(theta=10000.0, scaling=None),
                qkv_bias=False,
                out_bias=False,
            ),
            feed_forward=SwiGLU(intermediate_size=48, bias=False),
            norm=RMSNorm(eps=1e-5),
            tie_embeddings=False,
        ),
        tokenizer=TokenizerConfig(path=None, kind="bpe", vocab_size=300),
        data=DataConfig(path=(), validation_fraction=0.2),
        optimizer=AdamW(learning_rate=1e-2, warmup_steps=3),
        num_steps=12,
        global_batch_size=8,
        sequence_length=32,
        compute=Compute(preflight=False),  # tests of it turn it on: its programs cost more than the run's
        checkpoint=CheckpointConfig(every_steps=4),
        logging=LoggingConfig(every_steps=1, validate_every_steps=6, sample_prompts=("the cat",)),
    )


def write_texts(folder: Path) -> Path:
    """A folder with 15 short documents, always the same."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    for i in range(15):
        words = rng.choices(TEXT.split(), k=rng.randint(40, 120))
        (folder / f"{i:02}.txt").write_text(" ".join(words) + ".\n")
    return folder
