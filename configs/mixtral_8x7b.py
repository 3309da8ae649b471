"""Mixtral 8x7B from scratch; its paper (arXiv 2401.04088) has the sizes and no recipe: this one is Llama-2's.

python train.py mixtral_8x7b --data.path corpus/ --tokenizer.path tokenizer.model

AdamW 0.9/0.95 with eps 1e-5, weight decay 0.1, clipping at 1.0, 2000 warm-up steps to 3e-4, cosine to a tenth, 4M
tokens a batch in rows of 8192, 2.0T tokens. No token is dropped; the balance loss has the coefficient of the released
config. --mesh.expert splits the experts over devices, which split the batch in all other layers; a device then
needs room for its share of the assignments, and takes more in rounds.

Cost: 46,702,792,704 parameters, 476,837 steps, 1.66e23 FLOPs without recomputation. Expected result: not run to the end
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

TOKENS = 2_000_000_000_000
SEQUENCE_LENGTH = 8192
GLOBAL_BATCH_SIZE = 4 * 2**20 // SEQUENCE_LENGTH  # 4M tokens


def get_config() -> RunConfig:
    return RunConfig(
        model=presets()["mixtral_8x7b"],
        tokenizer=TokenizerConfig(path=None, kind="bpe", vocab_size=32_000),
        data=DataConfig(path=()),
        optimizer=AdamW(learning_rate=3e-4, warmup_steps=2000, eps=1e-5),
        num_steps=TOKENS // (GLOBAL_BATCH_SIZE * SEQUENCE_LENGTH),
        global_batch_size=GLOBAL_BATCH_SIZE,
        sequence_length=SEQUENCE_LENGTH,
        mesh=MeshConfig(fsdp=-1),
        compute=Compute(remat="full"),
    )
