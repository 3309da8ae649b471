"""GPT-3 125M from scratch, by the recipe of its paper (arXiv 2005.14165, table 2.1 and appendix B).

python train.py gpt3_125m --data.path corpus/ --tokenizer.path vocab.json

AdamW 0.9/0.95, weight decay 0.1, clipping at 1.0, warm-up over 375M tokens to 6e-4, cosine to a tenth, 0.5M tokens a
batch, context 2048, 300B tokens. Two things differ: the paper's cosine ends at 260B tokens, and its batch grows from
32k tokens over the first 4B to 12B. Batch and learning rate of the other sizes: 350M 0.5M, 3e-4; 760M 0.5M, 2.5e-4;
1.3B 1M, 2e-4; 2.7B 1M, 1.6e-4; 6.7B 2M, 1.2e-4; 13B 2M, 1e-4; 175B 3.2M, 0.6e-4.

Cost: 125,226,240 parameters, 572,204 steps, 2.43e20 FLOPs without recomputation. Expected result: not run to the end
with this package; nothing is claimed.

vocab.json is GPT-2's, with merges.txt beside it; without --tokenizer.path a byte-level BPE of 50,257 tokens is
trained on the corpus.
"""

from llama_jax.data import DataConfig
from llama_jax.models import Compute
from llama_jax.parallel import MeshConfig
from llama_jax.run import RunConfig
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import AdamW
from llama_jax.zoo import presets

TOKENS = 300_000_000_000
SEQUENCE_LENGTH = 2048
GLOBAL_BATCH_SIZE = 2**19 // SEQUENCE_LENGTH  # 0.5M tokens


def get_config() -> RunConfig:
    return RunConfig(
        model=presets()["gpt3_125m"],
        tokenizer=TokenizerConfig(path=None, kind="byte_bpe", vocab_size=50_257),
        data=DataConfig(path=()),
        optimizer=AdamW(learning_rate=6e-4, warmup_steps=375_000_000 // 2**19),
        num_steps=TOKENS // (GLOBAL_BATCH_SIZE * SEQUENCE_LENGTH),
        global_batch_size=GLOBAL_BATCH_SIZE,
        sequence_length=SEQUENCE_LENGTH,
        mesh=MeshConfig(fsdp=-1),
        compute=Compute(remat="attention"),
    )
