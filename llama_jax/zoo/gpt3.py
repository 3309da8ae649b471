"""GPT-3 (Brown et al. 2020, table 2.1): GPT-2's model with dense and locally banded attention in turns, context 2048.

Its weights were never released, so there are presets only. Where the table contradicts itself, attention is as wide as
the model, in heads of the size that it prints: 16 of 128 in the 1.3B (for 24), and a width of 5120 in the 13B (for
5140). The paper gives no band size ("similar to the Sparse Transformer"): every second layer, from the second one on,
sees 256 tokens, as in EleutherAI's GPT-Neo. No dropout is mentioned, so there is none.
"""

import dataclasses

from llama_jax.models import DecoderConfig, LayerOverride
from llama_jax.nn import GroupedQuery
from llama_jax.zoo.gpt2 import gpt

WINDOW = 256


def gpt3(
    layers: int, width: int, head_dim: int, *, window: int = WINDOW, max_positions: int = 2048, vocab_size: int = 50257
) -> DecoderConfig:
    """A decoder of this shape, every second layer with a window."""
    config = gpt(
        num_layers=layers,
        hidden_size=width,
        num_heads=width // head_dim,
        max_positions=max_positions,
        vocab_size=vocab_size,
    )
    assert isinstance(config.attention, GroupedQuery)
    banded = LayerOverride(tuple(range(1, layers, 2)), dataclasses.replace(config.attention, window=window))
    return dataclasses.replace(config, overrides=(banded,))


PRESETS: dict[str, DecoderConfig] = {
    "gpt3_125m": gpt3(12, 768, 64),
    "gpt3_350m": gpt3(24, 1024, 64),
    "gpt3_760m": gpt3(24, 1536, 96),
    "gpt3_1_3b": gpt3(24, 2048, 128),
    "gpt3_2_7b": gpt3(32, 2560, 80),
    "gpt3_6_7b": gpt3(32, 4096, 128),
    "gpt3_13b": gpt3(40, 5120, 128),
    "gpt3_175b": gpt3(96, 12288, 128),
}
