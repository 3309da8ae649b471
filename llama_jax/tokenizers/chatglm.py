"""ChatGLM2's tokenizer: a SentencePiece model, and special tokens behind its pieces."""

import json
from collections.abc import Sequence

from llama_jax.tokenizers.base import TextStream, Tokenizer
from llama_jax.tokenizers.sentencepiece import SentencePieceTokenizer

# In the order of their ids, the first behind the model's last piece.
SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
_CLASS = "ChatGLMTokenizer"


class ChatGLMTokenizer(Tokenizer):
    """A SentencePiece model with `SPECIAL` behind its pieces, whose texts begin with [gMASK] and sop.

    `bos_id` is that of sop; the piece for the unknown also pads. Raises RuntimeError where `model` is no SentencePiece
    model. `settings` is the content of the tokenizer_config.json beside it, if any.
    """

    def __init__(self, model: bytes, settings: bytes | None = None):
        self._pieces = SentencePieceTokenizer(model)
        first = self._pieces.vocab_size
        added = {name: first + i for i, name in enumerate(SPECIAL)}
        self.vocab_size = first + len(SPECIAL)
        self.bos_id = added["sop"]
        self.start_ids = (added["[gMASK]"], added["sop"])
        self.eos_ids = self._pieces.eos_ids
        self.unk_id = self.pad_id = self._pieces.unk_id
        self.special_tokens = {**self._pieces.special_tokens, **added}
        settings = settings or json.dumps({"tokenizer_class": _CLASS}).encode()
        self.files = {**self._pieces.files, "tokenizer_config.json": settings}

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._pieces._encode(texts)

    def stream(self) -> TextStream:
        return _Stream(self, self._pieces)


class _Stream(TextStream):
    def __init__(self, owner: ChatGLMTokenizer, pieces: SentencePieceTokenizer):
        self._owner, self._known, self._stream = owner, pieces.vocab_size, pieces.stream()

    def feed(self, token_id: int) -> str:
        return self._stream.feed(token_id) if self._owner.check_id(token_id) < self._known else ""

    def flush(self) -> str:
        return self._stream.flush()


def is_chatglm(settings: bytes | None, config: bytes | None) -> bool:
    """Whether the tokenizer_config.json or the config.json beside a SentencePiece model says that it is ChatGLM2's.

    Raises ValueError where they are no JSON.
    """
    found = [(settings, "tokenizer_class", _CLASS), (config, "model_type", "chatglm")]
    return any(content is not None and json.loads(content).get(key) == value for content, key, value in found)
