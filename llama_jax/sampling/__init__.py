"""Continuing texts with a model.

In: a language model and prompts. Out: token ids or text, at once or as it comes. A new way to choose a token is a
function of logits in `processors.py` and a field of its `Sampler`; what a model's files force or forbid is a control
in `controls.py`. A conversation becomes a prompt in `chat.py`.
"""

from llama_jax.sampling.chat import chat
from llama_jax.sampling.generate import generate
from llama_jax.sampling.processors import Sampler
from llama_jax.sampling.text import Completion, complete, encode_prompt, generate_text, stream_text

__all__ = ["Completion", "Sampler", "chat", "complete", "encode_prompt", "generate", "generate_text", "stream_text"]
