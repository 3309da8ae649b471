"""DeepSeek-V2-Lite from scratch, by the recipe of its paper (arXiv 2405.04434, appendix B).

python train.py deepseek_v2_lite --data.path corpus/ --tokenizer.path tokenizer.json

AdamW 0.9/0.95, weight decay 0.1, clipping at 1.0, 2000 warm-up steps to 4.2e-4, 4608 sequences of 4096 tokens a batch,
5.7T tokens, a balance loss of 0.001 for the experts. The paper's rate falls in two steps to a tenth, at 80 and at 90 %
of the tokens; here a cosine goes there. If a batch does not fit, --optimizer.accumulation-steps splits it into
micro-batches, with the same result; --mesh.expert splits the experts.

Cost: 15,706,484,224 parameters, of which a token uses 2.4 billion; 301,996 steps, 9.35e22 FLOPs without recomputation.
Expected result: not run to the end with this package; nothing is claimed.

Without --tokenizer.path a byte-level BPE of 102,400 tokens is trained on the corpus.
"""

from llama_jax.config import override
from llama_jax.data import DataConfig
from llama_jax.models import Compute
from llama_jax.nn import Rope
from llama_jax.parallel import MeshConfig
from llama_jax.run import RunConfig
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import AdamW
from llama_jax.zoo import presets

TOKENS = 5_700_000_000_000
SEQUENCE_LENGTH = 4096
GLOBAL_BATCH_SIZE = 4608


def get_config() -> RunConfig:
    # The context was stretched only after this.
    changes = {"attention.rope": Rope(theta=10_000.0, scaling=None), "max_positions": SEQUENCE_LENGTH}
    return RunConfig(
        model=override(presets()["deepseek_v2_lite"], changes),
        tokenizer=TokenizerConfig(path=None, kind="byte_bpe", vocab_size=102_400),
        data=DataConfig(path=()),
        optimizer=AdamW(learning_rate=4.2e-4, warmup_steps=2000),
        num_steps=TOKENS // (GLOBAL_BATCH_SIZE * SEQUENCE_LENGTH),
        global_batch_size=GLOBAL_BATCH_SIZE,
        sequence_length=SEQUENCE_LENGTH,
        mesh=MeshConfig(fsdp=-1),
        compute=Compute(remat="full"),
    )
