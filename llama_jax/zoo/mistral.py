"""Mistral (arXiv 2310.06825) and Ministral: Llama's blocks with a window in all layers, in none, or in turns.

Sizes from the paper, from the released configs and from Ministral 8B's model card (a full layer before every three
with a window). Mistral's own files have Meta's names, and `params.json` with the keys of its inference code.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llama_jax.config import Json, UserError
from llama_jax.models import DecoderConfig
from llama_jax.zoo import llama
from llama_jax.zoo.layers import FULL, SLIDING, read_windows, windowed, write_turns
from llama_jax.zoo.llama import sizes
from llama_jax.zoo.reading import CAUSAL, ConfigReader, Key
from llama_jax.zoo.registry import Family, MetaFiles
from llama_jax.zoo.weights import TensorNames


def _mistral(positions: int, vocab_size: int, theta: float = 1_000_000.0, **rows: Any) -> DecoderConfig:
    return llama.llama(vocab_size=vocab_size, max_positions=positions, eps=1e-5, theta=theta, head_dim=128, **rows)


_7B = sizes(32, 4096, 32, 8, 14_336)
_8B = _mistral(131_072, 131_072, 100_000_000.0, **sizes(36, 4096, 32, 8, 12_288))


def from_meta(params: Json, shapes: Mapping[str, tuple[int, ...]]) -> DecoderConfig:
    """Return the model of Mistral's own `params.json`; the shapes of the tensors show what it leaves out.

    `sliding_window` is a number or a list that the layers repeat, with null for all keys. The context, which it need
    not have, is 32,768 as in most of the releases. Raises UserError for a key that is not known.
    """
    settings = {key: value for key, value in params.items() if (key, value) != ("model_type", "transformer")}
    positions = settings.pop("max_position_embeddings", None) or 32_768
    found = [settings.pop(key, None) for key in ("sliding_window", "_sliding_window")]
    settings.pop("tied_embeddings", None)  # the tensors show it
    config = llama.from_meta({"max_seq_len": positions} | settings, shapes)
    windows = next((value for value in found if value is not None), None)
    windows = windows if isinstance(windows, list) else [windows]
    used = {window for window in windows if window is not None}
    if not windows or config.num_layers % len(windows) or len(used) > 1 or any(type(w) is not int for w in used):
        raise UserError(
            f"params.json has sliding_window={windows!r}: it must be a number, or a list of one number and null whose "
            f"length divides n_layers={config.num_layers}"
        )
    types = [FULL if window is None else SLIDING for window in windows] * (config.num_layers // len(windows))
    return windowed(config, types, max(used, default=None))


MISTRAL = Family(
    name="mistral",
    title="Mistral",
    label="a Mistral",
    objectives=("Causal", "Chat"),
    presets={
        "mistral_7b_v0_1": _mistral(32_768, 32_000, 10_000.0, window=4096, **_7B),
        "mistral_7b_v0_2": _mistral(32_768, 32_000, **_7B),
        "mistral_7b_v0_3": _mistral(32_768, 32_768, **_7B),
        "codestral_22b": _mistral(32_768, 32_768, **sizes(56, 6144, 48, 8, 16_384)),
        "mistral_nemo_12b": _mistral(128_000, 131_072, **sizes(40, 5120, 32, 8, 14_336)),
        "mistral_small_24b": _mistral(32_768, 131_072, 100_000_000.0, **sizes(40, 5120, 32, 8, 32_768)),
        "mistral_large_123b": _mistral(131_072, 32_768, **sizes(88, 12_288, 96, 8, 28_672)),
    },
    architectures=("MistralForCausalLM", "MistralModel"),
    keys=llama.keys(
        Key("sliding_window", "attention.window", int, None, absent=4096), kv_heads=8, max_positions=131_072
    ),
    read=llama.read,
    write=llama.write,
    harmless=CAUSAL,
    names=llama.NAMES,
    meta=MetaFiles(TensorNames(llama.META_WEIGHTS, llama.META_TIED), from_meta),
)


def _read_turns(reader: ConfigReader, fields: Json) -> DecoderConfig:
    window = reader.take("sliding_window", int, None, absent=4096)
    types = read_windows(reader, [SLIDING] * fields["num_layers"], window)
    return windowed(llama.read(reader, fields), types, window)


def _write_ministral(config: DecoderConfig, label: str) -> Json:
    return llama.write(config, label) | write_turns(config)


MINISTRAL = dataclasses.replace(
    MISTRAL,
    name="ministral",
    title="Ministral",
    label="a Ministral",
    presets={"ministral_8b": windowed(_8B, (FULL, SLIDING, SLIDING, SLIDING) * 9, 32_768)},
    architectures=("MinistralForCausalLM", "MinistralModel"),
    keys=llama.keys(kv_heads=8, max_positions=131_072),
    read=_read_turns,
    write=_write_ministral,
)
