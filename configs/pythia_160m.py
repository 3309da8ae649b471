"""Pythia 160M from scratch, by the recipe of its paper (Biderman et al. 2023, arXiv 2304.01373).

python train.py pythia_160m --data.path corpus/ --tokenizer.path tokenizer.json

All sizes saw the same 143,000 batches of 1024 texts of 2048 tokens. AdamW 0.9/0.95, weight decay 0.1, clipping at 1.0,
warm-up over the first hundredth to 6e-4, cosine to a tenth. Two things differ: the corpus, The Pile, is no longer
published, and the first values are this package's. Learning rates of the other sizes: 14M to 70M 1e-3, 410M and 1B
3e-4, 1.4B 2e-4, 2.8B 1.6e-4, 6.9B and 12B 1.2e-4.

Cost: 162,322,944 parameters, 143,000 steps, 2.56e20 FLOPs without recomputation. Expected result: not run to the end
with this package; nothing is claimed.

tokenizer.json is GPT-NeoX's; without --tokenizer.path a byte-level BPE of 50,277 tokens is trained on the corpus. The
model has rows for 50,304.
"""

from llama_jax.data import DataConfig
from llama_jax.models import Compute
from llama_jax.parallel import MeshConfig
from llama_jax.run import RunConfig
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import AdamW
from llama_jax.zoo import presets

NUM_STEPS = 143_000
SEQUENCE_LENGTH = 2048
GLOBAL_BATCH_SIZE = 1024


def get_config() -> RunConfig:
    return RunConfig(
        model=presets()["pythia_160m"],
        tokenizer=TokenizerConfig(path=None, kind="byte_bpe", vocab_size=50_277),
        data=DataConfig(path=()),
        optimizer=AdamW(learning_rate=6e-4, warmup_steps=NUM_STEPS // 100),
        num_steps=NUM_STEPS,
        global_batch_size=GLOBAL_BATCH_SIZE,
        sequence_length=SEQUENCE_LENGTH,
        mesh=MeshConfig(fsdp=-1),
        compute=Compute(remat="attention"),
    )
