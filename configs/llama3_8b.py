"""Llama-3 8B's shape from scratch.

python train.py llama3_8b --data.path corpus/ --tokenizer.path tokenizer.model

From the paper (arXiv 2407.21783): the peak rate 3e-4 (table 3), context 8192, 15T tokens. It gives no other setting for
this size; the rest is Llama 2's recipe: AdamW 0.9/0.95 with eps 1e-5, weight decay 0.1, clipping at 1.0, 2000 warm-up
steps, cosine to a tenth, 4M tokens a batch. If a batch does not fit, --optimizer.accumulation-steps splits it into
micro-batches, with the same result.

Cost: 8,030,261,248 parameters, 3,576,278 steps, 7.72e23 FLOPs without recomputation. Expected result: not run to the
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

TOKENS = 15_000_000_000_000
SEQUENCE_LENGTH = 8192
GLOBAL_BATCH_SIZE = 4 * 2**20 // SEQUENCE_LENGTH  # 4M tokens


def get_config() -> RunConfig:
    return RunConfig(
        model=presets()["llama3_8b"],
        tokenizer=TokenizerConfig(path=None, kind="bpe", vocab_size=128_256),
        data=DataConfig(path=()),
        optimizer=AdamW(learning_rate=3e-4, warmup_steps=2000, eps=1e-5),
        num_steps=TOKENS // (GLOBAL_BATCH_SIZE * SEQUENCE_LENGTH),
        global_batch_size=GLOBAL_BATCH_SIZE,
        sequence_length=SEQUENCE_LENGTH,
        mesh=MeshConfig(fsdp=-1),
        compute=Compute(remat="full"),
    )
