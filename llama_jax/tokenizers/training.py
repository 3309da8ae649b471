"""Train a tokenizer of any kind: the same texts give the same file."""

import heapq
import io
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import sentencepiece
import tokenizers
from tokenizers import pre_tokenizers

from llama_jax.config import UserError
from llama_jax.tokenizers.base import Tokenizer
from llama_jax.tokenizers.config import SPECIAL, Kind, check_training
from llama_jax.tokenizers.huggingface import HuggingFaceTokenizer, byte_letters
from llama_jax.tokenizers.sentencepiece import SentencePieceTokenizer, with_dummy_prefix
from llama_jax.tokenizers.settings import Settings
from llama_jax.tokenizers.vocabularies import byte_level_bpe, whitespace, wordpiece

TRAINING = 1  # part of the key of kept tokenizers: another number where the same texts give another tokenizer
COVERAGE = 0.99995  # of the characters; rare ones are left to bytes, or unknown
# White space of regular expressions and of Rust (Unicode's White_Space; Python's \s has four more).
SPACES = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# Pre-tokens of GPT-2 never cross these, and cut one by one they are cut as in the whole text.
GPT2_CHUNK = re.compile(rf" ?[^{SPACES}]+|[{SPACES}]+(?![^{SPACES}])|[{SPACES}]+")
COMPLEMENT = bytes(range(255, -1, -1))
MAX_WORD = 100  # characters; BERT takes a longer word as unknown

Progress = Callable[[int, int], None]
Pair = tuple[bytes, bytes]


def train_tokenizer(
    texts: Iterable[str],
    *,
    kind: Kind = "bpe",
    vocab_size: int = 32000,
    special_tokens: Sequence[str] = (),
    max_lines: int = 10_000_000,
    progress: Progress | None = None,
) -> Tokenizer:
    """Return a tokenizer trained on `texts`, with `special_tokens` besides those of its kind (`SPECIAL`).

    - `bpe`, `unigram`: SentencePiece as Llama's (the trainer_spec of Meta's tokenizer.model): byte fallback, digits
      split, identity normalization, whitespace kept and allowed as pieces, characters covered to 99.995 %. Of more
      than `max_lines` (over 100) lines a random sample is used; the other kinds count all of them.
    - `byte_bpe`: GPT-2's pre-tokenization; equally frequent pairs are merged from the greatest bytes on.
    - `wordpiece`: BERT's normalization, lower-cased; pieces are merged by count.
    - `whitespace`: the most frequent words, equally frequent ones in the order of their characters.

    Special tokens written out in a text divide it, and nothing is learned from them. `progress` is called with the
    number of merges made and to make (`byte_bpe`, `wordpiece`). Raises UserError for empty texts and for a vocabulary
    that they cannot fill or that is too small for their characters.
    """
    check_training(kind, vocab_size, special_tokens)
    special = tuple(dict.fromkeys([*SPECIAL[kind], *special_tokens]))
    parts = _divided(texts, special)
    if kind in ("bpe", "unigram"):
        return _sentencepiece(parts, kind, vocab_size, special[3:], max_lines)
    train = {"byte_bpe": _byte_bpe, "wordpiece": _wordpiece, "whitespace": _whitespace}[kind]
    tokenizer = train(parts, vocab_size, special, progress or (lambda done, total: None))
    return HuggingFaceTokenizer(tokenizer, {"tokenizer.json": tokenizer.to_str(pretty=True).encode()}, Settings())


def _divided(texts: Iterable[str], special_tokens: Sequence[str]) -> Iterator[str]:
    """Yield the texts, cut at special tokens (at the longest, where one begins with another)."""
    names = re.compile("|".join(re.escape(name) for name in sorted(special_tokens, key=len, reverse=True)))
    for text in texts:
        yield from names.split(text)


def _sentencepiece(
    texts: Iterable[str], kind: str, vocab_size: int, special_tokens: Sequence[str], max_lines: int
) -> SentencePieceTokenizer:
    # Without line ends: a line end is a byte token in Llama's tokenizer, so no piece may contain one.
    lines = (line for text in texts for line in text.split("\n") if line)
    model = io.BytesIO()
    failed: list[BaseException] = []  # raised by `texts`; the library turns it into a RuntimeError
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_watched(lines, failed),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            control_symbols=list(special_tokens),
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            # A line is the middle of a text, where no space is put before it.
            add_dummy_prefix=False,
            character_coverage=COVERAGE,
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


def _explain(error: RuntimeError, vocab_size: int) -> Exception:
    message = str(error)
    if too_large := re.search(r"value <= (\d+)", message):
        return _too_large(vocab_size, int(too_large[1]))
    if too_small := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return _too_small(vocab_size, int(too_small[1]))
    return _no_text() if "sentences_.empty()" in message else error


def _too_large(vocab_size: int, largest: int) -> UserError:
    return UserError(
        f"vocab_size={vocab_size} is more than these texts can fill: {largest} is the largest possible size"
    )


def _too_small(vocab_size: int, smallest: int) -> UserError:
    return UserError(f"vocab_size={vocab_size} is too small for these texts' characters: use at least {smallest}")


def _no_text() -> UserError:
    return UserError("there is no text to train a tokenizer on: give files with text in them")


def _byte_bpe(
    texts: Iterable[str], vocab_size: int, special: Sequence[str], progress: Progress
) -> tokenizers.Tokenizer:
    letters = byte_letters()
    symbols = {letter: bytes([byte]) for byte, letter in enumerate(letters)}
    words = {tuple(map(symbols.__getitem__, word)): count for word, count in gpt2_words(texts).items()}
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(letters)])}
    merges: dict[tuple[str, str], None] = {}
    for left, right in _merged(words, vocab_size, vocabulary, progress):
        pair = "".join(letters[byte] for byte in left), "".join(letters[byte] for byte in right)
        merges[pair] = None
        vocabulary.setdefault("".join(pair), len(vocabulary))
    return byte_level_bpe(vocabulary, list(merges), special)


def gpt2_words(texts: Iterable[str]) -> Counter[str]:
    """Return the count of every pre-token of GPT-2, in its letters for bytes."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    chunks = Counter(itertools.chain.from_iterable(map(GPT2_CHUNK.findall, texts)))
    words: Counter[str] = Counter()
    for chunk, count in chunks.items():  # the library's own split, which is slower, only once for equal ones
        for word, _ in split.pre_tokenize_str(chunk):
            words[word] += count
    return words


def _wordpiece(
    texts: Iterable[str], vocab_size: int, special: Sequence[str], progress: Progress
) -> tokenizers.Tokenizer:
    empty = wordpiece({"[UNK]": 0}, special)
    # At the characters that the normalizer, too, takes for a space before anything else.
    chunks = Counter(itertools.chain.from_iterable(re.split(r"[ \t\n\r]+", text) for text in texts))
    counts: Counter[str] = Counter()
    for chunk, count in chunks.items():
        for word, _ in empty.pre_tokenizer.pre_tokenize_str(empty.normalizer.normalize_str(chunk)):  # type: ignore
            counts[word] += count
    known = _covered(counts)
    words = {
        (word[0].encode(), *(b"##" + letter.encode() for letter in word[1:])): count
        for word, count in counts.items()
        if len(word) <= MAX_WORD and known.issuperset(word)
    }
    alphabet = sorted({symbol.decode() for word in words for symbol in word})
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    if len(vocabulary) > vocab_size:
        raise _too_small(vocab_size, len(vocabulary))

    def join(left: bytes, right: bytes) -> bytes:
        return left + right.removeprefix(b"##")

    for pair in _merged(words, vocab_size, vocabulary, progress, join):
        vocabulary.setdefault(join(*pair).decode(), len(vocabulary))
    return wordpiece(vocabulary, special)


def _covered(words: Mapping[str, int]) -> set[str]:
    """Return the most frequent characters that together make up `COVERAGE` of the text."""
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    left, known = COVERAGE * characters.total(), set()
    for character, count in sorted(characters.items(), key=lambda item: (-item[1], item[0])):
        if left > 0:
            known.add(character)
        left -= count
    return known


def _merged(
    words: Mapping[tuple[bytes, ...], int],
    vocab_size: int,
    vocabulary: Mapping[str, int],
    progress: Progress,
    join: Callable[[bytes, bytes], bytes] = bytes.__add__,
) -> Iterator[Pair]:
    """Yield merges until the caller, which adds them to `vocabulary`, has filled it."""
    if not words:
        raise _no_text()
    first = len(vocabulary)
    pairs = merge_pairs(words, join)
    while len(vocabulary) < vocab_size:
        progress(len(vocabulary) - first, vocab_size - first)
        pair = next(pairs, None)
        if pair is None:
            raise _too_large(vocab_size, len(vocabulary))
        yield pair
    progress(vocab_size - first, vocab_size - first)


def _whitespace(
    texts: Iterable[str], vocab_size: int, special: Sequence[str], progress: Progress
) -> tokenizers.Tokenizer:
    del progress  # there is nothing to do but count
    words = Counter(itertools.chain.from_iterable(re.findall(rf"[^{SPACES}]+", text) for text in texts))
    if not words:
        raise _no_text()
    if len(special) + len(words) < vocab_size:
        raise _too_large(vocab_size, len(special) + len(words))
    frequent = [word for word, _ in sorted(words.items(), key=lambda item: (-item[1], item[0]))]
    # Not the others: a word of a text could have their name. They are added, with the ids that follow.
    known = [special[0], *frequent[: vocab_size - len(special)]]
    return whitespace({token: i for i, token in enumerate(known)}, special)


def merge_pairs(
    words: Mapping[tuple[bytes, ...], int], join: Callable[[bytes, bytes], bytes] = bytes.__add__
) -> Iterator[Pair]:
    """Yield the pairs of neighbours that byte-pair encoding merges, in order, until no word has two symbols left.

    `words` has the symbols of every distinct word and its count; `join` makes the symbol of a merged pair. The most
    frequent pair is merged; of equally frequent ones the greatest, compared as bytes, its first symbol first. (The
    trainers of the `tokenizers` library settle ties by the order of a hash map or of ids, and cannot give the merges of
    references that settle them by bytes.) Every merge touches only the words that have the pair, and the heap is
    corrected only when a pair is drawn.
    """
    words_of_symbols, counts = [list(word) for word in words], list(words.values())
    pair_counts: dict[Pair, int] = defaultdict(int)
    pair_words: dict[Pair, set[int]] = defaultdict(set)
    for index, word in enumerate(words_of_symbols):
        for pair in itertools.pairwise(word):
            pair_counts[pair] += counts[index]
            pair_words[pair].add(index)
    heap = [(-count, _descending(pair), pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    while heap:
        negative, key, pair = heapq.heappop(heap)
        count = pair_counts.get(pair, 0)
        if count != -negative:  # it has changed since; a pair that grew is in the heap with its new count too
            if 0 < count < -negative:
                heapq.heappush(heap, (-count, key, pair))
            continue
        yield pair
        merged = join(*pair)
        changes: dict[Pair, int] = defaultdict(int)
        for index in pair_words.pop(pair):
            word = words_of_symbols[index]
            for old in itertools.pairwise(word):
                changes[old] -= counts[index]
            words_of_symbols[index] = word = _joined(word, pair, merged)
            for new in itertools.pairwise(word):
                changes[new] += counts[index]
                if merged in new:
                    pair_words[new].add(index)
        del pair_counts[pair]
        changes.pop(pair, None)
        for changed, change in changes.items():
            if change:
                pair_counts[changed] += change
                if change > 0:
                    heapq.heappush(heap, (-pair_counts[changed], _descending(changed), changed))


def _descending(pair: Pair) -> str:
    """Return a key that is least for the greatest pair: complements of the bytes, one that is above all at each end."""
    # The end comes after every byte, so that "ab" is less than "a".
    return "".join(symbol.translate(COMPLEMENT).decode("latin-1") + "\u0100" for symbol in pair)


def _joined(word: list[bytes], pair: Pair, merged: bytes) -> list[bytes]:
    """Return `word` with `merged` in place of every `pair`, from the left on."""
    left, right = pair
    joined: list[bytes] = []
    for symbol in word:
        if symbol == right and joined and joined[-1] == left:
            joined[-1] = merged
        else:
            joined.append(symbol)
    return joined
