"""Llama-3.1 405B's shape from scratch, for machines of several slices.

python train.py llama3_405b --data.path corpus/ --tokenizer.path tokenizer.model

From the paper (arXiv 2407.21783, section 3.4.1): the peak rate 8e-5 after 8000 warm-up steps, cosine to a hundredth,
context 8192, the last of its batch sizes, 16M tokens, from the start, and 15.6T tokens. The rest is Llama 2's recipe:
AdamW 0.9/0.95 with eps 1e-5, weight decay 0.1, clipping at 1.0.

python -m llama_jax plan llama3_405b --topology '16x v5p:4x8x8' --mesh.pipeline 2 --compute.pipeline-repeats 9

plans it on 4,096 chips with a pipeline: the 126 layers go over 2, 3, 6, 7, 9, 14 ... stages, and repeats make the share
of idle ticks smaller. docs/planning.md has plans and their reasons.

Cost: 405,853,388,800 parameters, 929,832 steps, 3.94e25 FLOPs without recomputation. Expected result: not run to the
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

TOKENS = 15_600_000_000_000
SEQUENCE_LENGTH = 8192
GLOBAL_BATCH_SIZE = 16 * 2**20 // SEQUENCE_LENGTH  # 16M tokens


def get_config() -> RunConfig:
    return RunConfig(
        model=presets()["llama3_405b"],
        tokenizer=TokenizerConfig(path=None, kind="bpe", vocab_size=128_256),
        data=DataConfig(path=()),
        optimizer=AdamW(learning_rate=8e-5, warmup_steps=8000, eps=1e-5, final_fraction=0.01),
        num_steps=TOKENS // (GLOBAL_BATCH_SIZE * SEQUENCE_LENGTH),
        global_batch_size=GLOBAL_BATCH_SIZE,
        sequence_length=SEQUENCE_LENGTH,
        mesh=MeshConfig(fsdp=-1, tensor=2),
        compute=Compute(remat="attention"),
    )
