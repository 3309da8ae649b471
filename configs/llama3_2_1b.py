"""Llama-3.2 1B's shape from scratch.

python train.py llama3_2_1b --data.path corpus/ --tokenizer.path tokenizer.model

The released model was pruned from Llama-3.1 8B and distilled (up to 9T tokens by its model card), so it has no recipe:
this is Llama-3 8B's, for 9T tokens of next-token prediction at context 8192. The positions are scaled for 131,072. If a
batch does not fit, --optimizer.accumulation-steps splits it into micro-batches, with the same result.

Cost: 1,235,814,400 parameters, 2,145,767 steps, 8.12e22 FLOPs without recomputation. Expected result: not run to the
end with this package; nothing is claimed.

tokenizer.model is the file of ranks that Llama 3 comes with; without --tokenizer.path a SentencePiece model is trained
on the corpus, which is another vocabulary.
"""

from llama_jax.data import DataConfig
from llama_jax.models import Compute
from llama_jax.parallel import MeshConfig
from llama_jax.run import RunConfig
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import AdamW
from llama_jax.zoo import presets

TOKENS = 9_000_000_000_000
SEQUENCE_LENGTH = 8192
GLOBAL_BATCH_SIZE = 4 * 2**20 // SEQUENCE_LENGTH  # 4M tokens


def get_config() -> RunConfig:
    return RunConfig(
        model=presets()["llama3_2_1b"],
        tokenizer=TokenizerConfig(path=None, kind="bpe", vocab_size=128_256),
        data=DataConfig(path=()),
        optimizer=AdamW(learning_rate=3e-4, warmup_steps=2000, eps=1e-5),
        num_steps=TOKENS // (GLOBAL_BATCH_SIZE * SEQUENCE_LENGTH),
        global_batch_size=GLOBAL_BATCH_SIZE,
        sequence_length=SEQUENCE_LENGTH,
        mesh=MeshConfig(fsdp=-1),
        compute=Compute(remat="attention"),
    )
