from .conversations import built_in as built_in, chat as chat, encoded_chat as encoded_chat
from .sampler import Control as Control, Sampler as Sampler, Written as Written
from .text import (
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
from .token_ids import generate as generate
