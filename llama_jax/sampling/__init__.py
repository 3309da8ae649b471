"""Continuing texts with a model.

In: a language model and prompts. Out: token ids or text, at once or as it comes. A new way to choose a token is a
function of logits in `processors.py` and a field of its `Sampler`.
"""

from llama_jax.sampling.generate import generate
from llama_jax.sampling.processors import Sampler
from llama_jax.sampling.text import Completion, complete, encode_prompt, generate_text, stream_text

__all__ = ["Completion", "Sampler", "complete", "encode_prompt", "generate", "generate_text", "stream_text"]
