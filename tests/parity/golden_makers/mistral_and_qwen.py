"""Goldens of the families that differ from Llama in little: Mistral, Qwen and their like."""

from golden_makers.causal import TINY, causal

CASES = {
    "mistral": causal("mistral", TINY | {"model_type": "mistral", "sliding_window": 8}),
}
