"""The config of a run's tokenizer."""

import dataclasses
import re
import typing
from collections.abc import Sequence
from typing import Literal

from llama_jax.config import UserError

Kind = Literal["bpe", "unigram", "byte_bpe", "wordpiece", "whitespace"]
KINDS: tuple[Kind, ...] = typing.get_args(Kind)
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Special tokens of every tokenizer of the kind, first in its vocabulary.
SPECIAL: dict[Kind, tuple[str, ...]] = {
    "bpe": ("<unk>", "<s>", "</s>"),
    "unigram": ("<unk>", "<s>", "</s>"),
    "byte_bpe": ("<|endoftext|>",),
    "wordpiece": BERT_SPECIAL,
    "whitespace": ("<unk>",),
}
BYTE_KINDS = ("bpe", "unigram", "byte_bpe")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer of a run.

    path: file or directory of a tokenizer, a path or a URL; None trains one on the run's own training documents.
    kind: kind to train: `bpe` or `unigram` (SentencePiece, Llama's settings), `byte_bpe` (GPT-2), `wordpiece`
        (BERT, uncased) or `whitespace`.
    vocab_size: number of tokens of the one that is trained, special tokens and 256 bytes included.
    special_tokens: names of special tokens that it has in addition to those of its kind.
    """

    path: str | None
    kind: Kind
    vocab_size: int
    special_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.path is None:
            check_training(self.kind, self.vocab_size, self.special_tokens)


def check_training(kind: str, vocab_size: int, special_tokens: Sequence[str]) -> None:
    """Raise UserError for a tokenizer that cannot be trained on any texts."""
    if kind not in KINDS:
        raise UserError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    for name in special_tokens:
        # Brackets, so that no tokenizer can make one of ordinary text.
        if not re.fullmatch(r"<\S+>|\[\S+\]", name) or list(special_tokens).count(name) > 1:
            raise UserError(f"special token {name!r} must be a name in brackets, <name> or [NAME], given once")
    num_bytes, num_special = 256 * (kind in BYTE_KINDS), len({*SPECIAL[kind], *special_tokens})
    if vocab_size <= num_bytes + num_special:
        raise UserError(
            f"vocab_size={vocab_size} must be at least {num_bytes + num_special + 1}: "
            f"{num_bytes} bytes, {num_special} special tokens and a piece"
        )
