"""A small Llama that learns a text of about a megabyte, such as Tiny Shakespeare (one file, 1.1 MB).

python train.py tiny_shakespeare --data.path input.txt
python sample.py runs/tiny_shakespeare --prompt "ROMEO:"

One file is one document; it is cut at line ends into documents of about 4000 characters, so that a tenth of them can be
held out. Cost: 600 steps of 2048 tokens with a model of 2,558,400 parameters, minutes on a few CPU cores. Expected
result: a loss that starts near ln 1024 = 6.93; on Tiny Shakespeare 1.98 bits per byte of held-out text at the end (the
run sees every token about three times), where xz needs 2.61, and tiny_ngram comes to 2.06 and tiny_gru to 2.01.
"""

from llama_jax.checkpoint import CheckpointConfig
from llama_jax.data import DataConfig
from llama_jax.models import Compute, DecoderConfig
from llama_jax.nn import GroupedQuery, RMSNorm, Rope, SwiGLU
from llama_jax.run import LoggingConfig, RunConfig
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import Muon


def get_config() -> RunConfig:
    return RunConfig(
        model=DecoderConfig(
            vocab_size=1024,
            hidden_size=192,
            num_layers=6,
            max_positions=512,
            attention=GroupedQuery(
                num_heads=6,
                num_kv_heads=2,
                head_dim=32,
                rope=Rope(theta=10000.0, scaling=None),
                qkv_bias=False,
                out_bias=False,
            ),
            feed_forward=SwiGLU(intermediate_size=512, bias=False),
            norm=RMSNorm(eps=1e-5),
            tie_embeddings=True,
        ),
        tokenizer=TokenizerConfig(path=None, kind="bpe", vocab_size=1024),
        data=DataConfig(path=(), document_chars=4000, validation_fraction=0.1),
        optimizer=Muon(learning_rate=8e-3, warmup_steps=40),
        num_steps=600,
        global_batch_size=8,
        sequence_length=256,
        compute=Compute(scan_layers=False),
        checkpoint=CheckpointConfig(every_steps=100),
        logging=LoggingConfig(every_steps=10, validate_every_steps=100, sample_prompts=("ROMEO:", "The ")),
    )
