"""The base Transformer from scratch, by the recipe of its paper (arXiv 1706.03762, section 5).

python train.py transformer_base --data.path pairs.jsonl --data.fields en,de

Each line of pairs.jsonl is a record with a text in both languages; a document is a pair, and one that does not fit into
256 tokens is left out. A shared BPE vocabulary of 37,000 tokens is trained on both sides.

Adam 0.9/0.98/1e-9 without decay, 4000 warm-up steps to 512^-0.5 * 4000^-0.5 = 6.99e-4 and then the inverse square root
of the step (equation 3), dropout 0.1, label smoothing 0.1, about 25,000 source and as many target tokens a batch. The
paper does not clip gradients, and no gradient is as long as the limit here.

Cost: 63,082,496 parameters, 100,000 steps. Expected result: not run to the end with this package; the paper reports
27.3 BLEU on newstest2014 from English to German, for the mean of the last five checkpoints and a beam of four.
"""

from llama_jax.data import DataConfig
from llama_jax.data.objectives import ParallelText
from llama_jax.run import RunConfig
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import AdamW, InverseSqrt
from llama_jax.zoo import presets

LENGTH = 256
WARMUP_STEPS = 4000


def get_config() -> RunConfig:
    model = presets()["transformer_base"]
    return RunConfig(
        model=model,
        tokenizer=TokenizerConfig(path=None, kind="bpe", vocab_size=model.vocab_size),
        data=DataConfig(
            path=(), fields=("source", "target"), objective=ParallelText(source_length=LENGTH), packing="best_fit"
        ),
        optimizer=AdamW(
            learning_rate=(model.hidden_size * WARMUP_STEPS) ** -0.5,
            warmup_steps=WARMUP_STEPS,
            weight_decay=0.0,
            beta1=0.9,
            beta2=0.98,
            eps=1e-9,
            clip_norm=1e6,
            schedule=InverseSqrt(),
            label_smoothing=0.1,
        ),
        num_steps=100_000,
        global_batch_size=25_000 // LENGTH // 8 * 8,
        sequence_length=LENGTH,
    )
