"""Figures of tokenizers on a text: `python -m llama_jax tokenizer compare`."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable

from rich.table import Table

from llama_jax.config import UserError
from llama_jax.tokenizers.base import Tokenizer

NUM_RUNS, MIN_BYTES = 5, 200_000  # of a timing
LONGEST_WORDS = 12  # characters on average; a text with more is taken as written without spaces

ENGLISH = """\
A tokenizer decides what a language model can see. Common words become one token each, rarer ones fall apart into
pieces, and a name that nobody wrote before may cost a token for every letter. Prices are counted in tokens, and so is
the context: whoever needs 1.4 tokens for a word reads 30% less than someone who needs 1.0 in the same 2,048 places.

    def mean(values):
        return sum(values) / len(values)  # don't call it with an empty list
"""
CHINESE = """\
分词器决定了语言模型能看到什么。常用的字和词各占一个词元，生僻的字却要拆成三个字节，每个字节又各占一个词元。\
同样长的文章，用不合适的分词器来读，费用可能高出一倍，能放进上下文的内容也会少掉一半。
所以在开始训练之前，最好先拿自己的语料数一数：平均每个字需要几个词元？有多少字是词表里没有的？解码以后还能不能得到原文？
"""
SAMPLES = {"English sample": ENGLISH, "Chinese sample": CHINESE}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Figures of one tokenizer on one text.

    `tokens_per_word` counts words between spaces and is None for a text written without them; `unknown_rate` is the
    share of tokens that are `unk_id`. Speeds are medians of `NUM_RUNS` runs over the text's lines, repeated to at least
    `MIN_BYTES`, on all cores: of a short text, whose words some libraries keep, they are the upper end.
    """

    num_tokens: int
    tokens_per_word: float | None
    tokens_per_character: float
    tokens_per_byte: float
    unknown_rate: float
    exact: bool
    megabytes_per_second: float
    tokens_per_second: float


def compare(tokenizer: Tokenizer, text: str) -> Comparison:
    """Return the figures of `tokenizer` on `text`. Raises UserError for a text without any words."""
    words, num_bytes = text.split(), len(text.encode(errors="surrogatepass"))
    if not words:
        raise UserError("there is nothing to compare in an empty text: give one with words in it")
    ids = tokenizer.encode(text)
    lines = text.splitlines(keepends=True) * -(-MIN_BYTES // num_bytes)
    seconds, num_timed = [], 0
    for _ in range(NUM_RUNS):
        start = time.perf_counter()
        num_timed = sum(map(len, tokenizer.encode_batch(lines)))
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return Comparison(
        num_tokens=len(ids),
        tokens_per_word=len(ids) / len(words) if len(text) <= LONGEST_WORDS * len(words) else None,
        tokens_per_character=len(ids) / len(text),
        tokens_per_byte=len(ids) / num_bytes,
        unknown_rate=ids.count(tokenizer.unk_id) / max(len(ids), 1) if tokenizer.unk_id is not None else 0.0,
        exact=tokenizer.decode(ids) == text,
        megabytes_per_second=sum(len(line.encode()) for line in lines) / median / 1e6,
        tokens_per_second=num_timed / median,
    )


# Column titles of the table, and how a row is shown.
COLUMNS: dict[str, Callable[[Tokenizer, Comparison], str]] = {
    "size": lambda tokenizer, _: f"{tokenizer.vocab_size:,}",
    "tokens": lambda _, row: f"{row.num_tokens:,}",
    "per\nword": lambda _, row: "-" if row.tokens_per_word is None else f"{row.tokens_per_word:.2f}",
    "per\nchar": lambda _, row: f"{row.tokens_per_character:.2f}",
    "per\nbyte": lambda _, row: f"{row.tokens_per_byte:.3f}",
    "unknown": lambda _, row: f"{row.unknown_rate:.2%}",
    "round\ntrip": lambda _, row: "exact" if row.exact else "differs",
    "MB/s": lambda _, row: f"{row.megabytes_per_second:.2f}",
    "Mtok\n/s": lambda _, row: f"{row.tokens_per_second / 1e6:.2f}",
}


def comparison_table(title: str, rows: Iterable[tuple[str, Tokenizer, Comparison]]) -> Table:
    """Return the figures of one text, a row for every tokenizer."""
    table = Table(title=title, title_justify="left", padding=(0, 0), collapse_padding=True)
    table.add_column("tokenizer", overflow="fold", min_width=12)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for name, tokenizer, row in rows:
        table.add_row(name, *(shown(tokenizer, row) for shown in COLUMNS.values()))
    return table
