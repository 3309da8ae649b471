"""Qwen3 0.6B from scratch: the first of its three stages.

python train.py qwen3_0_6b --data.path corpus/ --tokenizer.path Qwen3-0.6B-Base

From the report (arXiv 2505.09388, section 3.2): over 30T tokens at context 4096. Two stages follow there, of 5T tokens
of science, code and reasoning and of texts of 32,768 tokens. The report gives neither batch nor learning rates: they
are those of Llama 3 8B here.

Cost: 596,049,920 parameters, 7,152,557 steps, 1.50e23 FLOPs without recomputation. Expected result: not run to the end
with this package; nothing is claimed.

Qwen3-0.6B-Base is the release's directory, for its tokenizer; without --tokenizer.path a byte-level BPE of 151,936
tokens is trained on the corpus.
"""

from llama_jax.data import DataConfig
from llama_jax.models import Compute
from llama_jax.parallel import MeshConfig
from llama_jax.run import RunConfig
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import AdamW
from llama_jax.zoo import presets

TOKENS = 30_000_000_000_000
SEQUENCE_LENGTH = 4096
GLOBAL_BATCH_SIZE = 4 * 2**20 // SEQUENCE_LENGTH  # 4M tokens


def get_config() -> RunConfig:
    return RunConfig(
        model=presets()["qwen3_0_6b"],
        tokenizer=TokenizerConfig(path=None, kind="byte_bpe", vocab_size=151_936),
        data=DataConfig(path=()),
        optimizer=AdamW(learning_rate=3e-4, warmup_steps=2000),
        num_steps=TOKENS // (GLOBAL_BATCH_SIZE * SEQUENCE_LENGTH),
        global_batch_size=GLOBAL_BATCH_SIZE,
        sequence_length=SEQUENCE_LENGTH,
        mesh=MeshConfig(fsdp=-1),
        compute=Compute(remat="attention"),
    )
