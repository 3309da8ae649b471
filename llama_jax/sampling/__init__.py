"""Continuing texts with a model.

In: a language model and prompts. Out: token ids or text, at once or as it comes. A new way to choose a token is a
function of logits in `processors.py` and a field of its `Sampler`; what a model's files force or forbid is a control
in `controls.py`. A conversation becomes a prompt in `chat.py`.
"""

from llama_jax.sampling.chat import chat as chat
from llama_jax.sampling.generate import generate as generate
from llama_jax.sampling.processors import Sampler as Sampler
from llama_jax.sampling.text import (
    Completion as Completion,
    complete as complete,
    encode_prompt as encode_prompt,
    generate_text as generate_text,
    stream_text as stream_text,
)
