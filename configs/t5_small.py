"""T5 small from scratch, by the recipe of its paper (arXiv 1910.10683, sections 3.1.2 to 3.1.4).

python train.py t5_small --data.path corpus/

Span corruption of 15 % in spans of 3, dropout 0.1, rows of 512 source tokens and the 114 that are missing in them,
packed; 2^19 steps of 128 such rows, 34B tokens. AdamW takes the place of Adafactor: linear warm-up over 10,000 steps to
1e-3, then the inverse square root of the step, without weight decay.

Cost: 60,506,624 parameters, 524,288 steps. Expected result: not run to the end with this package; nothing is claimed.

A unigram model of 32,100 tokens, 100 sentinels among them, is trained on the corpus. With T5's own tokenizer.json at
--tokenizer.path, give --model.decoder_start_id 0: its padding token, with which the decoder begins, is another.
"""

from llama_jax.config import override
from llama_jax.data import DataConfig
from llama_jax.data.objectives import SpanCorruption
from llama_jax.parallel import MeshConfig
from llama_jax.run import RunConfig
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import AdamW, InverseSqrt
from llama_jax.zoo import presets


def get_config() -> RunConfig:
    return RunConfig(
        model=override(presets()["t5_small"], {"decoder_start_id": 3}),
        tokenizer=TokenizerConfig(path=None, kind="unigram", vocab_size=32_100, special_tokens=("<pad>",)),
        data=DataConfig(path=(), objective=SpanCorruption(source_length=512), packing="best_fit"),
        optimizer=AdamW(learning_rate=1e-3, warmup_steps=10_000, schedule=InverseSqrt(), weight_decay=0.0, beta2=0.999),
        num_steps=2**19,
        global_batch_size=128,
        sequence_length=114,
        mesh=MeshConfig(fsdp=-1),
    )
