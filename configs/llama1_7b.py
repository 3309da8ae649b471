"""LLaMA-1 7B from scratch, by the recipe of its paper (arXiv 2302.13971, section 2).

python train.py llama1_7b --data.path corpus/ --tokenizer.path tokenizer.model

AdamW 0.9/0.95, weight decay 0.1, clipping at 1.0, 2000 warm-up steps to 3e-4, cosine to a tenth, 4M tokens a batch,
context 2048, 1.0T tokens. If a batch does not fit, --optimizer.accumulation-steps splits it into micro-batches, with
the same result.

Cost: 6,738,415,616 parameters, 238,418 steps, 4.13e22 FLOPs without recomputation. Expected result: not run to the end
with this package; nothing is claimed.

Without --tokenizer.path a SentencePiece BPE model of 32,000 tokens with Llama's settings is trained on the corpus.
"""

from llama_jax.data import DataConfig
from llama_jax.models import Compute
from llama_jax.parallel import MeshConfig
from llama_jax.run import RunConfig
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import AdamW
from llama_jax.zoo import presets

TOKENS = 1_000_000_000_000
SEQUENCE_LENGTH = 2048
GLOBAL_BATCH_SIZE = 4 * 2**20 // SEQUENCE_LENGTH  # 4M tokens


def get_config() -> RunConfig:
    return RunConfig(
        model=presets()["llama1_7b"],
        tokenizer=TokenizerConfig(path=None, kind="bpe", vocab_size=32_000),
        data=DataConfig(path=()),
        optimizer=AdamW(learning_rate=3e-4, warmup_steps=2000),
        num_steps=TOKENS // (GLOBAL_BATCH_SIZE * SEQUENCE_LENGTH),
        global_batch_size=GLOBAL_BATCH_SIZE,
        sequence_length=SEQUENCE_LENGTH,
        mesh=MeshConfig(fsdp=-1),
        compute=Compute(remat="full"),
    )
