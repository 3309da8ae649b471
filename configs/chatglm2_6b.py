"""ChatGLM2-6B's shape from scratch, by autoregressive blank filling (Du et al. 2022).

python train.py chatglm2_6b --data.path corpus/

The release gives the number of training tokens, 1.4T, and GLM's objective; the optimizer, the batch and the length of a
row are those of LLaMA-1 7B. The text with its gaps is read in both directions, and its spans are written after it;
unlike GLM, ChatGLM2 has one increasing position for each token. If a batch does not fit, --optimizer.accumulation-steps
splits it into micro-batches, with the same result.

Cost: 6,243,584,000 parameters, 333,786 steps, 5.22e22 FLOPs without recomputation. Expected result: not run to the
end with this package; nothing is claimed.

A SentencePiece BPE model of 65,024 tokens, with [MASK], <sop> and <eop>, is trained on the corpus. For the released
one: --tokenizer.path DIRECTORY --data.objective.start-token sop --data.objective.end-token eop, where the directory
has its tokenizer.model and config.json.
"""

from llama_jax.data import DataConfig
from llama_jax.data.objectives import BlankFilling
from llama_jax.models import Compute
from llama_jax.parallel import MeshConfig
from llama_jax.run import RunConfig
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import AdamW
from llama_jax.zoo import presets

TOKENS = 1_400_000_000_000
SEQUENCE_LENGTH = 2048
GLOBAL_BATCH_SIZE = 4 * 2**20 // SEQUENCE_LENGTH  # 4M tokens
OBJECTIVE = BlankFilling(two_dimensional=False)


def get_config() -> RunConfig:
    return RunConfig(
        model=presets()["chatglm2_6b"],
        tokenizer=TokenizerConfig(path=None, kind="bpe", vocab_size=65_024, special_tokens=OBJECTIVE.special_tokens()),
        data=DataConfig(path=(), objective=OBJECTIVE, packing="best_fit"),
        optimizer=AdamW(learning_rate=3e-4, warmup_steps=2000),
        num_steps=TOKENS // (GLOBAL_BATCH_SIZE * SEQUENCE_LENGTH),
        global_batch_size=GLOBAL_BATCH_SIZE,
        sequence_length=SEQUENCE_LENGTH,
        mesh=MeshConfig(fsdp=-1),
        compute=Compute(remat="full"),
    )
