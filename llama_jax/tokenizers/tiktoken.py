"""tiktoken's files of ranks: which encoding one is, and the tokenizer that it makes."""

import base64
import binascii
import dataclasses

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from llama_jax.config import UserError
from llama_jax.tokenizers.huggingface import HuggingFaceTokenizer
from llama_jax.tokenizers.settings import Settings
from llama_jax.tokenizers.streams import byte_letters


@dataclasses.dataclass(frozen=True)
class Encoding:
    """What a file of ranks does not say: how text is split first, and the ids of the special tokens."""

    name: str
    pattern: str
    special_tokens: dict[str, int]
    bos: str | None
    eos: str
    prefix: tuple[str, ...] = ()


# Patterns and ids as OpenAI and Meta publish them (openai/tiktoken, tiktoken_ext/openai_public.py;
# meta-llama/llama-models, llama3/tokenizer.py, with the names of 3.1 for tokens that 3.0 had reserved).
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
)  # fmt: skip
CL100K_SPECIAL = {
    "<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}  # fmt: skip
END = "<|endoftext|>"
# By the number of ranks, which the file itself tells.
ENCODINGS = {
    50256: Encoding("r50k_base", GPT2_SPLIT, {END: 50256}, END, END),
    50280: Encoding("p50k_base", GPT2_SPLIT, {END: 50256}, END, END),  # its ranks leave 50256 out
    100256: Encoding("cl100k_base", CL100K_SPLIT, CL100K_SPECIAL, END, END),
    128000: Encoding(
        "Llama 3",
        CL100K_SPLIT,
        {name: 128000 + i for i, name in enumerate(LLAMA3_SPECIAL)},
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ("<|begin_of_text|>",),
    ),
    199998: Encoding("o200k_base", O200K_SPLIT, {END: 199999, "<|endofprompt|>": 200018}, END, END),
}


def read_ranks(content: bytes) -> dict[bytes, int] | None:
    """The ranks of a tiktoken file (a base64 token and its rank a line), or None if `content` is no such file."""
    ranks = {}
    lines = content.splitlines()
    for line in lines:
        try:
            token, rank = line.split(b" ")
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            return None
    complete = len(ranks) == len(lines) == len(set(ranks.values())) and all(bytes([b]) in ranks for b in range(256))
    return ranks if complete else None


def _glm4(settings: Settings) -> Encoding | None:
    """GLM-4's encoding, whose settings have the special tokens; None for another class."""
    if settings.class_name != "ChatGLM4Tokenizer":
        return None
    special = {token.content: i for i, token in settings.added.items()}
    return Encoding("GLM-4", CL100K_SPLIT, special, None, END, ("[gMASK]", "<sop>"))


def tiktoken_tokenizer(content: bytes, ranks: dict[bytes, int], settings: Settings) -> HuggingFaceTokenizer:
    """Return the tokenizer of the `ranks` of a tiktoken file `content`.

    The class that `settings` name, else the number of the ranks tells which encoding it is.

    tiktoken merges the neighbours whose union has the lowest rank, so every way to cut a token in two known ones is a
    merge, with the token's rank as its priority. Raises UserError for a number of ranks that no known encoding has.
    """
    encoding = _glm4(settings) or ENCODINGS.get(len(ranks))
    taken = set(encoding.special_tokens.values()) if encoding else set()
    if encoding is None or taken & set(ranks.values()):
        known = ", ".join(f"{encoding.name} ({number})" for number, encoding in ENCODINGS.items())
        raise UserError(
            f"its {len(ranks)} ranks are those of no known encoding ({known}), and a file of ranks says neither how "
            "text is split nor what the special tokens are: use the model's tokenizer.json"
        )
    letters = byte_letters()
    spelled = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = [
        (spelled[token[:i]], spelled[token[i:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for i in sorted(
            (i for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks),
            key=lambda i: (ranks[token[:i]], ranks[token[i:]]),
        )
    ]
    # Special tokens are in the vocabulary so that each gets its own id, also where ids between are free.
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()} | encoding.special_tokens
    # ignore_merges: tiktoken takes a whole word that is a token as it is.
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(encoding.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in encoding.special_tokens])
    names = {"bos_token": encoding.bos, "eos_token": encoding.eos}
    settings = dataclasses.replace(settings, config=names | dict(settings.config))
    return HuggingFaceTokenizer(tokenizer, {"tokenizer.model": content}, settings, prefix=encoding.prefix)
