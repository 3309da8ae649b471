"""SmolLM2 135M from scratch.

python train.py smollm2_135m --data.path corpus/ --tokenizer.path SmolLM2-135M

From the paper (arXiv 2502.02737): 2T tokens, AdamW 0.9/0.95, 2000 warm-up steps to 3e-3, which stays and falls to zero
in the last 20% of the steps. The batch is half of the 2M tokens that the paper gives for the 1.7B, at its context of
2048. Weight decay and clipping are the package's, and the mixture of the data is not part of this file.

Cost: 134,515,008 parameters, 1,907,348 steps, 2.04e21 FLOPs without recomputation. Expected result: not run to the end
with this package; nothing is claimed.

SmolLM2-135M is the release's directory, for its tokenizer; without --tokenizer.path a byte-level BPE of 49,152 tokens
is trained on the corpus.
"""

from llama_jax.data import DataConfig
from llama_jax.models import Compute
from llama_jax.parallel import MeshConfig
from llama_jax.run import RunConfig
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import AdamW, WarmupStableDecay
from llama_jax.zoo import presets

TOKENS = 2_000_000_000_000
SEQUENCE_LENGTH = 2048
GLOBAL_BATCH_SIZE = 2**20 // SEQUENCE_LENGTH  # 1M tokens


def get_config() -> RunConfig:
    return RunConfig(
        model=presets()["smollm2_135m"],
        tokenizer=TokenizerConfig(path=None, kind="byte_bpe", vocab_size=49_152),
        data=DataConfig(path=()),
        optimizer=AdamW(
            learning_rate=3e-3,
            warmup_steps=2000,
            schedule=WarmupStableDecay(decay_fraction=0.2),
            final_fraction=0.0,
        ),
        num_steps=TOKENS // (GLOBAL_BATCH_SIZE * SEQUENCE_LENGTH),
        global_batch_size=GLOBAL_BATCH_SIZE,
        sequence_length=SEQUENCE_LENGTH,
        mesh=MeshConfig(fsdp=-1),
        compute=Compute(remat="attention"),
    )
