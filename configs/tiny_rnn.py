"""An Elman network that learns the text of tiny_shakespeare: a baseline from before attention.

python train.py tiny_rnn --data.path input.txt
python sample.py runs/tiny_rnn --prompt "ROMEO:"

Vocabulary and documents are those of tiny_shakespeare, so that the losses compare. Cost: 500 steps of 4096 tokens with
a model of 656,640 parameters, minutes on a few CPU cores. Expected result: a loss that starts near ln 1024 =
6.93; on Tiny Shakespeare 2.02 bits per byte of held-out text at the end.
"""

from llama_jax.checkpoint import CheckpointConfig
from llama_jax.data import DataConfig
from llama_jax.models import Compute, DecoderConfig
from llama_jax.nn import ElmanRNN
from llama_jax.run import LoggingConfig, RunConfig
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import AdamW


def get_config() -> RunConfig:
    return RunConfig(
        model=DecoderConfig(
            vocab_size=1024,
            hidden_size=256,
            num_layers=1,
            max_positions=512,
            attention=ElmanRNN(state_size=256),
            feed_forward=None,
            norm=None,
            residual=False,
            tie_embeddings=False,
            embedding_scale=16.0,  # no norm stands behind the embeddings, which begin at 0.02
            head_bias="trained",
        ),
        tokenizer=TokenizerConfig(path=None, kind="bpe", vocab_size=1024),
        data=DataConfig(path=(), document_chars=4000, validation_fraction=0.1),
        optimizer=AdamW(learning_rate=4e-3, warmup_steps=50),
        num_steps=500,
        global_batch_size=16,
        sequence_length=256,
        compute=Compute(scan_layers=False),
        checkpoint=CheckpointConfig(every_steps=100),
        logging=LoggingConfig(every_steps=10, validate_every_steps=100, sample_prompts=("ROMEO:", "The ")),
    )
