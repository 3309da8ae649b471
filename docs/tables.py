"""Writes the tables of the README that the package knows better: `python docs/tables.py`."""

import re
from pathlib import Path

import llama_jax
from llama_jax.models import DecoderConfig
from llama_jax.nn import GroupedQuery, SwiGLU

README = Path(__file__).resolve().parent.parent / "README.md"


def presets_table() -> str:
    """Every preset with its shape and exact number of parameters."""
    rows = ["| preset | layers | width | heads / kv heads | feed-forward | vocabulary | positions | parameters |"]
    rows.append("|---|---|---|---|---|---|---|---:|")
    for name, config in llama_jax.presets().items():
        assert isinstance(config, DecoderConfig)
        attention, feed_forward = config.attention, config.feed_forward
        assert isinstance(attention, GroupedQuery)
        assert isinstance(feed_forward, SwiGLU)
        heads = f"{attention.num_heads} / {attention.num_kv_heads}"
        shape = (config.num_layers, config.hidden_size, heads, feed_forward.intermediate_size)
        cells = (f"`{name}`", *shape, config.vocab_size, config.max_positions)
        rows.append(f"| {' | '.join(map(str, cells))} | {llama_jax.num_parameters(config):,} |")
    return "\n".join(rows)


def with_tables(text: str) -> str:
    """The README's text with its tables as they should be."""
    block = f"<!-- presets: written by docs/tables.py -->\n{presets_table()}\n<!-- end of presets -->"
    pattern = "<!-- presets: written by docs/tables.py -->.*<!-- end of presets -->"
    text, count = re.subn(pattern, lambda _: block, text, flags=re.DOTALL)
    assert count == 1, "README.md has lost the marks of its presets table"
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text("utf-8")), encoding="utf-8")
