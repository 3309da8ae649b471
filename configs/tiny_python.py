"""A small Llama that learns Python from the interpreter's own standard library; nothing is downloaded.

python train.py tiny_python
python sample.py runs/tiny_python --prompt "def main("
"""

import sysconfig

from llama_jax.checkpoint.store import CheckpointConfig
from llama_jax.data import DataConfig
from llama_jax.models import Compute, DecoderConfig
from llama_jax.nn import GroupedQuery, RMSNorm, Rope, SwiGLU
from llama_jax.run import LoggingConfig, RunConfig
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import OptimizerConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=DecoderConfig(
            vocab_size=4096,
            hidden_size=192,
            num_layers=6,
            max_positions=512,
            attention=GroupedQuery(
                num_heads=6,
                num_kv_heads=2,
                head_dim=32,
                rope=Rope(theta=10000.0, scaling=None),
                qkv_bias=False,
                out_bias=False,
            ),
            feed_forward=SwiGLU(intermediate_size=512, bias=False),
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
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
        num_steps=500,
        global_batch_size=16,
        sequence_length=256,
        compute=Compute(scan_layers=False),
        checkpoint=CheckpointConfig(every_steps=100),
        logging=LoggingConfig(
            every_steps=10, validate_every_steps=250, sample_prompts=("def main(", "class ", "import ")
        ),
    )
