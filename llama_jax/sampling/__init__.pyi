from .config import SamplingConfig as SamplingConfig, SamplingOptions as SamplingOptions
from .controls import Control as Control, Written as Written
from .conversations import (
    Conversation as Conversation,
    built_in as built_in,
    chat as chat,
    encoded_chat as encoded_chat,
    rendered_chat as rendered_chat,
)
from .engine import Engine as Engine, Piece as Piece, Request as Request, TokenLogprobs as TokenLogprobs
from .sampler import Sampler as Sampler
from .speculative import GUESSES as GUESSES, Speculation as Speculation
from .stops import TextStream as TextStream, tokenizer_of as tokenizer_of
from .text import (
    Completion as Completion,
    Encoded as Encoded,
    complete as complete,
    completed as completed,
    encode_prompt as encode_prompt,
    encoded_prompt as encoded_prompt,
    generate_text as generate_text,
    stop_ids as stop_ids,
    stream_encoded as stream_encoded,
    stream_text as stream_text,
    with_room as with_room,
)
from .token_ids import answers as answers, generate as generate
