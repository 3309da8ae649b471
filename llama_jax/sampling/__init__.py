"""Continuing texts with a model.

In: a language model and prompts. Out: token ids or text, at once or as it comes. A new way to choose a token is a
function of logits in `processors.py` and a field of its `Sampler`.
"""

from llama_jax.sampling.generate import Completion, complete, encode_prompt, generate, generate_text, stream_text
from llama_jax.sampling.processors import Sampler

__all__ = ["Completion", "Sampler", "complete", "encode_prompt", "generate", "generate_text", "stream_text"]
