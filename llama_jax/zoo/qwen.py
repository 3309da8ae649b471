"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115), and Qwen3 (arXiv 2505.09388).

Llama's blocks: with biases on queries, keys and values alone in the first two, with norms of every query and key head
in the third. Sizes from the reports and from the released configs.
"""

from typing import Any

from llama_jax.config import Json
from llama_jax.models import DecoderConfig
from llama_jax.nn import RMSNorm
from llama_jax.zoo import llama
from llama_jax.zoo.layers import FULL, SLIDING, read_windows, windowed, write_turns
from llama_jax.zoo.llama import sizes
from llama_jax.zoo.reading import CAUSAL, ConfigReader
from llama_jax.zoo.registry import Family
from llama_jax.zoo.weights import TensorNames, mappings


def _qwen2(positions: int, vocab_size: int, eps: float = 1e-6, tied: bool = False, **rows: Any) -> DecoderConfig:
    sized: Json = {"vocab_size": vocab_size, "max_positions": positions, "tie_embeddings": tied, **rows}
    return llama.llama(**sized, eps=eps, theta=1_000_000.0, qkv_bias=True)


def _qwen3(layers: int, width: int, heads: int, ffn: int, *, tied: bool = False) -> DecoderConfig:
    return llama.llama(
        **sizes(layers, width, heads, 8, ffn),
        vocab_size=151_936,
        max_positions=40_960,
        head_dim=128,
        eps=1e-6,
        theta=1_000_000.0,
        qk_norm=RMSNorm(eps=1e-6),
        tie_embeddings=tied,
    )


def _read(reader: ConfigReader, fields: Json, **others: Any) -> DecoderConfig:
    window = reader.take("sliding_window", int, None, absent=4096)
    first = reader.take("max_window_layers", int, 28)
    if not reader.take("use_sliding_window", bool, False):
        window = None
    usual = [FULL if i < first else SLIDING for i in range(fields["num_layers"])]
    types = read_windows(reader, usual, window)
    return windowed(llama.read(reader, fields, **others), types, window)


def _write(config: DecoderConfig, label: str) -> Json:
    turns = write_turns(config)
    types = turns["layer_types"]
    return llama.write(config, label) | {
        **turns,
        "max_window_layers": types.index(SLIDING) if SLIDING in types else len(types),
        "use_sliding_window": SLIDING in types,
    }


# The bases, whose contexts are longer than those of their fine-tunes or as long.
QWEN2 = Family(
    name="qwen2",
    title="Qwen2 and Qwen2.5",
    label="a Qwen2",
    objectives=("Causal", "Chat"),
    presets={
        "qwen2_0_5b": _qwen2(131_072, 151_936, tied=True, **sizes(24, 896, 14, 2, 4864)),
        "qwen2_1_5b": _qwen2(131_072, 151_936, tied=True, **sizes(28, 1536, 12, 2, 8960)),
        "qwen2_7b": _qwen2(131_072, 152_064, **sizes(28, 3584, 28, 4, 18_944)),
        "qwen2_72b": _qwen2(131_072, 152_064, 1e-5, **sizes(80, 8192, 64, 8, 29_568)),
        "qwen2_5_0_5b": _qwen2(32_768, 151_936, tied=True, **sizes(24, 896, 14, 2, 4864)),
        "qwen2_5_1_5b": _qwen2(131_072, 151_936, tied=True, **sizes(28, 1536, 12, 2, 8960)),
        "qwen2_5_3b": _qwen2(32_768, 151_936, tied=True, **sizes(36, 2048, 16, 2, 11_008)),
        "qwen2_5_7b": _qwen2(131_072, 152_064, **sizes(28, 3584, 28, 4, 18_944)),
        "qwen2_5_14b": _qwen2(131_072, 152_064, 1e-5, **sizes(48, 5120, 40, 8, 13_824)),
        "qwen2_5_32b": _qwen2(131_072, 152_064, 1e-5, **sizes(64, 5120, 40, 8, 27_648)),
        "qwen2_5_72b": _qwen2(131_072, 152_064, 1e-5, **sizes(80, 8192, 64, 8, 29_568)),
    },
    architectures=("Qwen2ForCausalLM", "Qwen2Model"),
    keys=llama.keys(kv_heads=32, max_positions=32_768),
    read=lambda reader, fields: _read(reader, fields, qkv_bias=True),
    write=_write,
    harmless=CAUSAL,
    names=llama.NAMES,
)
QWEN3 = Family(
    name="qwen3",
    title="Qwen3",
    label="a Qwen3",
    objectives=("Causal", "Chat"),
    presets={
        "qwen3_0_6b": _qwen3(28, 1024, 16, 3072, tied=True),
        "qwen3_1_7b": _qwen3(28, 2048, 16, 6144, tied=True),
        "qwen3_4b": _qwen3(36, 2560, 32, 9728, tied=True),
        "qwen3_8b": _qwen3(36, 4096, 32, 12_288),
        "qwen3_14b": _qwen3(40, 5120, 40, 17_408),
        "qwen3_32b": _qwen3(64, 5120, 64, 25_600),
    },
    architectures=("Qwen3ForCausalLM", "Qwen3Model"),
    keys=llama.keys(llama.ATTENTION_BIAS, kv_heads=32, head_dim=128, max_positions=32_768),
    read=lambda reader, fields: _read(reader, fields, qk_norm=RMSNorm(eps=fields["eps"])),
    write=_write,
    harmless=CAUSAL,
    names=TensorNames((*llama.NAMES.weights, *mappings(llama.QK_NORMS, "layers.", llama.LAYER)), llama.TIED),
)
