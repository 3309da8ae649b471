"""GPT-2 small from scratch.

python train.py gpt2 --data.path corpus/ --tokenizer.path vocab.json

The paper (Radford et al. 2019) gives the batch, 512 texts of 1024 tokens, and a learning rate tuned by hand. The rest
is GPT-3's recipe for that size (arXiv 2005.14165, appendix B), with GPT-2's dropout: AdamW 0.9/0.95, weight decay 0.1,
clipping at 1.0, 715 warm-up steps to 6e-4, cosine to a tenth, 300B tokens. Dropout of the attention weights is computed
by the reference kernel alone; --model.attention.dropout 0 leaves it out. The first values are this package's: their
standard deviation follows from a matrix's input width and is not 0.02.

Cost: 124,439,808 parameters, 572,204 steps, 2.39e20 FLOPs without recomputation. Expected result: not run to the end
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
SEQUENCE_LENGTH = 1024
GLOBAL_BATCH_SIZE = 512


def get_config() -> RunConfig:
    return RunConfig(
        model=presets()["gpt2"],
        tokenizer=TokenizerConfig(path=None, kind="byte_bpe", vocab_size=50_257),
        data=DataConfig(path=()),
        optimizer=AdamW(learning_rate=6e-4, warmup_steps=715),
        num_steps=TOKENS // (GLOBAL_BATCH_SIZE * SEQUENCE_LENGTH),
        global_batch_size=GLOBAL_BATCH_SIZE,
        sequence_length=SEQUENCE_LENGTH,
        mesh=MeshConfig(fsdp=-1),
        compute=Compute(remat="attention"),
    )
