"""Continue texts with a model.

In: a language model and prompts. Out: token ids or text, at once or piece by piece. Temperature, top-k, top-p and the
controls (functions of logits) are in `sampler.py`, the decode loop in `loop.py`, `generate` in `token_ids.py`,
`generate_text` in `text.py`, `chat` in `conversations.py`.
"""

from llama_jax.sampling.conversations import built_in as built_in, chat as chat, encoded_chat as encoded_chat
from llama_jax.sampling.sampler import Sampler as Sampler
from llama_jax.sampling.text import (
    Completion as Completion,
    Encoded as Encoded,
    complete as complete,
    complete_encoded as complete_encoded,
    encode_prompt as encode_prompt,
    encoded_prompt as encoded_prompt,
    generate_text as generate_text,
    stream_encoded as stream_encoded,
    stream_text as stream_text,
)
from llama_jax.sampling.token_ids import generate as generate
