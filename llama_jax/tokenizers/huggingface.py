"""Tokenizers that the `tokenizers` library runs, and its own file, `tokenizer.json`."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders

from llama_jax.tokenizers.base import TextStream, Tokenizer

# Names that checkpoints give these tokens, tried where no tokenizer_config.json says it.
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]", "<|endoftext|>")
EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "[SEP]", "<|endoftext|>")
PAD_NAMES = ("<pad>", "[PAD]", "<|finetune_right_pad_id|>")
UNK_NAMES = ("<unk>", "[UNK]")
# Ends of a chat turn end a generated text too, whatever the config says.
TURN_END_NAMES = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library with the files it came from.

    `settings` is the content of the `tokenizer_config.json` beside it, which names the special tokens.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, files: dict[str, bytes], settings: dict[str, Any]):
        self._tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # "</s>" in a text is text: data must not be able to inject them
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
        self.bos_id = self._special(settings, "bos_token", BOS_NAMES)
        self.pad_id = self._special(settings, "pad_token", PAD_NAMES)
        eos_ids = [self._special(settings, "eos_token", EOS_NAMES), *map(tokenizer.token_to_id, TURN_END_NAMES)]
        self.eos_ids = tuple(dict.fromkeys(i for i in eos_ids if i is not None))
        # Unigram models do not tell; byte-level models know every text and have none.
        unknown = (tokenizer.model.unk_token,) if hasattr(tokenizer.model, "unk_token") else UNK_NAMES
        self.unk_id = next((tokenizer.token_to_id(name) for name in unknown if name is not None), None)
        named = {self.bos_id, self.pad_id, self.unk_id, *self.eos_ids, *tokenizer.get_added_tokens_decoder()}
        self.special_tokens = {str(tokenizer.id_to_token(i)): i for i in sorted(i for i in named if i is not None)}
        self.files = files

    def _special(self, settings: dict[str, Any], key: str, names: Sequence[str]) -> int | None:
        if key in settings:
            token = settings[key]
            names = (token["content"] if isinstance(token, dict) else token,) if token else ()
        return next((i for name in names if (i := self._tokenizer.token_to_id(name)) is not None), None)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([self.check_id(int(i)) for i in ids], skip_special_tokens=True)

    def stream(self) -> "_DecodeStream":
        return _DecodeStream(self, self._tokenizer)


class _DecodeStream(TextStream):
    def __init__(self, owner: HuggingFaceTokenizer, tokenizer: tokenizers.Tokenizer):
        self._owner, self._tokenizer = owner, tokenizer
        self._stream = decoders.DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._emitted = 0

    def feed(self, token_id: int) -> str:
        self._ids.append(self._owner.check_id(token_id))
        text = self._stream.step(self._tokenizer, token_id) or ""
        self._emitted += len(text)
        return text

    def flush(self) -> str:
        rest = self._owner.decode(self._ids)[self._emitted :]
        self._emitted += len(rest)
        return rest


def json_tokenizer(content: bytes, settings: bytes | None) -> HuggingFaceTokenizer:
    """The tokenizer of a `tokenizer.json`, with the `tokenizer_config.json` beside it, if any.

    Raises ValueError where either cannot be read.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(str(error)) from None
    files = {"tokenizer.json": content}
    if settings is None:
        return HuggingFaceTokenizer(tokenizer, files, {})
    return HuggingFaceTokenizer(tokenizer, files | {"tokenizer_config.json": settings}, json.loads(settings))
