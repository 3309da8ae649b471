"""BERT base from scratch, by the recipe of its paper (arXiv 1810.04805, section 3.1 and appendix A.2).

python train.py bert_base --data.path corpus/

Masked tokens and the next sentence, dropout 0.1, rows of 512 tokens, packed; 1,000,000 steps of 256 rows. AdamW
0.9/0.999, weight decay 0.01, 10,000 warm-up steps to 1e-4, then a line down to 0. The paper trains nine tenths of the
steps on rows of 128, which is cheaper: --sequence-length 128 does. Dropout of the attention weights is computed by the
reference kernel alone; --model.attention.dropout 0 leaves it out.

Cost: 110,106,428 parameters, the heads among them, 1,000,000 steps. Expected result: not run to the end with this
package; nothing is claimed.

Without --tokenizer.path a WordPiece vocabulary of 30,522 tokens is trained on the corpus. Fine-tuning begins with such
a run, or with released weights: --init-from RUN --tokenizer.path RUN/tokenizer --data.objective Classification
--data.objective.labels bad,good --data.fields text,label --model.num-classes 2, and a learning rate of 2e-5 to 5e-5.
"""

from llama_jax.config import override
from llama_jax.data import DataConfig
from llama_jax.data.objectives import MaskedLM
from llama_jax.parallel import MeshConfig
from llama_jax.run import RunConfig
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import AdamW, Linear
from llama_jax.zoo import presets


def get_config() -> RunConfig:
    return RunConfig(
        model=override(presets()["bert_base"], {"pair_head": True, "head_transform": "gelu", "head_bias": "trained"}),
        tokenizer=TokenizerConfig(path=None, kind="wordpiece", vocab_size=30_522),
        data=DataConfig(path=(), objective=MaskedLM(), packing="best_fit"),
        optimizer=AdamW(
            learning_rate=1e-4,
            warmup_steps=10_000,
            schedule=Linear(),
            final_fraction=0.0,
            weight_decay=0.01,
            beta2=0.999,
            eps=1e-6,
        ),
        num_steps=1_000_000,
        global_batch_size=256,
        sequence_length=512,
        mesh=MeshConfig(fsdp=-1),
    )
