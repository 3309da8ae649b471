"""OLMo-2 1B from scratch, as its first stage was (arXiv 2501.00656 and the config that was released with it).

python train.py olmo2_1b --data.path corpus/ --tokenizer.path OLMo-2-0425-1B

Rows of 4096 tokens, 2M tokens in a batch, 4000 steps of warm-up to 4e-4, a cosine to a tenth of it over 5T tokens, of
which the release trained the first 4T (1,907,349 steps; its second stage brings the rate to 0 on other texts). A z-loss
of 1e-5, queries and keys normed, norms of results alone. Unlike there, the decay of 0.1 is on the embedding too, and
not on the norms. If a batch does not fit, --optimizer.accumulation-steps splits it into micro-batches, with the same
result.

Cost: 1,484,916,736 parameters, 2,384,185 steps, 4.24e22 FLOPs without recomputation. Expected result: not run to the
end with this package; nothing is claimed.

The release's tokenizer has 100,278 tokens, and the matrices 100,352 rows; without --tokenizer.path a byte-level BPE
model is trained on the corpus.
"""

from llama_jax.data import DataConfig
from llama_jax.models import Compute
from llama_jax.parallel import MeshConfig
from llama_jax.run import RunConfig
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import AdamW
from llama_jax.zoo import presets

TOKENS = 5_000_000_000_000
SEQUENCE_LENGTH = 4096
GLOBAL_BATCH_SIZE = 2 * 2**20 // SEQUENCE_LENGTH  # 2M tokens


def get_config() -> RunConfig:
    return RunConfig(
        model=presets()["olmo2_1b"],
        tokenizer=TokenizerConfig(path=None, kind="byte_bpe", vocab_size=100_352),
        data=DataConfig(path=()),
        optimizer=AdamW(learning_rate=4e-4, warmup_steps=4000, z_loss=1e-5),
        num_steps=TOKENS // (GLOBAL_BATCH_SIZE * SEQUENCE_LENGTH),
        global_batch_size=GLOBAL_BATCH_SIZE,
        sequence_length=SEQUENCE_LENGTH,
        mesh=MeshConfig(fsdp=-1),
        compute=Compute(remat="attention"),
    )
