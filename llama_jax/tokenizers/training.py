"""Training SentencePiece models with Llama's settings."""

import dataclasses
import io
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import sentencepiece

from llama_jax.config import UserError
from llama_jax.tokenizers.sentencepiece import SentencePieceTokenizer, with_dummy_prefix


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer a run uses.

    path: file or directory of a tokenizer; None trains one on the run's own training documents.
    kind: what is trained then: `bpe` or `unigram`.
    vocab_size: number of tokens of the one that is trained, special tokens and 256 bytes included.
    """

    path: str | None
    kind: Literal["bpe", "unigram"]
    vocab_size: int

    def __post_init__(self) -> None:
        if self.path is None and self.vocab_size < 260:
            raise UserError(
                f"vocab_size={self.vocab_size} must be at least 260: 256 bytes, 3 special tokens and a piece"
            )


def train_tokenizer(
    texts: Iterable[str],
    *,
    kind: Literal["bpe", "unigram"] = "bpe",
    vocab_size: int = 32000,
    max_lines: int = 10_000_000,
    progress: Callable[[int], None] | None = None,
) -> SentencePieceTokenizer:
    """A SentencePiece model trained on `texts` with the settings of Llama's: the same texts give the same model.

    Byte fallback, digits split, identity normalization, whitespace kept and allowed as pieces, characters covered to
    99.995 %, UNK 0, BOS 1, EOS 2 (as in the trainer_spec of Meta's tokenizer.model). Of more than `max_lines` (over
    100) lines a random sample is used. `progress` is called with the number of characters read. Raises UserError for
    empty texts and for a vocabulary that they cannot fill or that is too small for their characters.
    """
    if kind not in ("bpe", "unigram"):
        raise UserError(f"kind={kind!r} must be 'bpe' or 'unigram'")
    model = io.BytesIO()
    failed: list[BaseException] = []  # what `texts` raised, which the library tells as an error of its own
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(_watched(texts, failed), progress),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            # A line stands in the middle of a text, where no space is put before it.
            add_dummy_prefix=False,
            character_coverage=0.99995,
            input_sentence_size=max_lines,
            max_sentence_length=1 << 30,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=16,  # a constant: unigram training adds up floats by thread
            minloglevel=3,
        )
    except RuntimeError as error:
        raise failed[0] if failed else _explain(error, vocab_size) from None
    return SentencePieceTokenizer(with_dummy_prefix(model.getvalue()))


def _watched(texts: Iterable[str], failed: list[BaseException]) -> Iterator[str]:
    try:
        yield from texts
    except (Exception, KeyboardInterrupt) as error:
        failed.append(error)
        raise


def _lines(texts: Iterable[str], progress: Callable[[int], None] | None) -> Iterator[str]:
    """Lines without their ends: a line end is a byte token in Llama's tokenizer, so no piece may contain one."""
    for text in texts:
        yield from text.split("\n")
        if progress is not None:
            progress(len(text))


def _explain(error: RuntimeError, vocab_size: int) -> UserError:
    message = str(error)
    if too_large := re.search(r"value <= (\d+)", message):
        return UserError(
            f"vocab_size={vocab_size} is more than these texts can fill: {too_large[1]} is the largest possible size"
        )
    if too_small := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"vocab_size={vocab_size} is too small for these texts' characters: use at least {too_small[1]}"
        )
    if "sentences_.empty()" in message:
        return UserError("there is no text to train a tokenizer on: give files with text in them")
    raise error
