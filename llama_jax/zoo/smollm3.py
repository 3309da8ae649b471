"""SmolLM3 (Hugging Face 2025): Llama's blocks, every fourth without rotary positions (arXiv 2501.18795).

Sizes from the released config. SmolLM2 is a Llama and has its presets there.
"""

import dataclasses
from typing import Any

from llama_jax.config import Json, UserError
from llama_jax.models import DecoderConfig
from llama_jax.zoo import llama
from llama_jax.zoo.layers import FULL, SLIDING, every, in_turns, read_windows, write_turns
from llama_jax.zoo.reading import CAUSAL, ConfigReader
from llama_jax.zoo.registry import Family
from llama_jax.zoo.rope import write_rope

_PERIOD = 4


def _in_turns(config: DecoderConfig, rotated: list[bool], types: tuple[str, ...], window: int | None) -> DecoderConfig:
    """Return the model whose layers have rotary positions where `rotated`, and a window where they are sliding."""
    kinds, attention = list(zip(rotated, types, strict=True)), config.attention
    assert dataclasses.is_dataclass(attention)
    pieces: dict[tuple[bool, str], Any] = {
        (turned, kind): dataclasses.replace(
            attention,
            rope=getattr(attention, "rope", None) if turned else None,
            window=window if kind == SLIDING else None,
        )
        for turned, kind in kinds
    }
    return in_turns(config, kinds, pieces)


def _read(reader: ConfigReader, fields: Json) -> DecoderConfig:
    count, window = fields["num_layers"], reader.take("sliding_window", int, None)
    if not reader.take("use_sliding_window", bool, False):
        window = None
    period = reader.take("no_rope_layer_interval", int, _PERIOD)
    if period < 1:
        raise UserError(f"config.json has no_rope_layer_interval={period}, which must be at least 1")
    usual = [int(kind == SLIDING) for kind in every(period, count)]
    rotated = reader.take("no_rope_layers", list, usual)
    if len(rotated) < count or any(value not in (0, 1) for value in rotated):
        raise UserError(
            f"config.json has no_rope_layers={rotated!r}, which should be 0 or 1 for each of {count} layers"
        )
    rotated = [bool(value) for value in rotated[:count]]
    types = read_windows(reader, [FULL if turned else SLIDING for turned in rotated], window)
    return _in_turns(llama.read(reader, fields, theta=2_000_000.0), rotated, types, window)


def _write(config: DecoderConfig, label: str) -> Json:
    mixers: list[Any] = [mixer for mixer, _ in config.layer_pieces()]
    turns = write_turns(config)
    return {
        "hidden_act": "silu",
        **turns,
        "no_rope_layer_interval": _PERIOD,
        "no_rope_layers": [int(mixer.rope is not None) for mixer in mixers],
        "use_sliding_window": turns["sliding_window"] is not None,
        **write_rope(next((mixer for mixer in mixers if mixer.rope is not None), mixers[0]), label),
    }


SMOLLM3 = Family(
    name="smollm3",
    title="SmolLM3",
    label="a SmolLM3",
    objectives=("Causal", "Chat"),
    presets={
        "smollm3_3b": _in_turns(
            llama.llama(
                vocab_size=128_256,
                max_positions=65_536,
                eps=1e-6,
                theta=5_000_000.0,
                tie_embeddings=True,
                **llama.sizes(36, 2048, 16, 4, 11_008),
            ),
            [kind == SLIDING for kind in every(_PERIOD, 36)],
            (FULL,) * 36,
            None,
        )
    },
    architectures=("SmolLM3ForCausalLM", "SmolLM3Model"),
    keys=llama.keys(llama.ATTENTION_BIAS, llama.MLP_BIAS, kv_heads=4, max_positions=32_768, tied=True),
    read=_read,
    write=_write,
    # Written with Qwen2's code in mind, and read by nobody.
    harmless=CAUSAL | {"max_window_layers"},
    names=llama.NAMES,
)
