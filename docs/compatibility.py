"""Writes compatibility.md, the table of other people's files: `python docs/compatibility.py`."""

from collections.abc import Iterable
from pathlib import Path

from tables import markdown
from zoo_table import title

from llama_jax import zoo
from llama_jax.checkpoint import catalog, generation
from llama_jax.data.readers import opening, records
from llama_jax.tokenizers import settings
from llama_jax.tokenizers.loading import FILE_NAMES

PAGE = Path(__file__).resolve().parent / "compatibility.md"
INTRODUCTION = """# What is read, written and refused

Written by `python docs/compatibility.py` from the package's own tables; a test compares the two. What is refused is
refused in one sentence that names the file or the key and the way out. Exact parameter counts and parity errors are in
the README's table of the zoo.
"""


def _code(words: Iterable[str]) -> str:
    """The words as code, a table's separators escaped."""
    return ", ".join("`" + word.replace("|", "\\|") + "`" for word in words)


def families() -> str:
    """What is read of each family, and the class that an export names."""
    rows = []
    for family in catalog.families():
        module = zoo.family(family.model_type)
        names = "yes" if family.meta else ""
        rows.append((title(module), _code([family.model_type]), _code(family.architectures), names, _code(family.keys)))
    return markdown("family|`model_type`|classes that are read|Meta's names too|keys of config.json that decide", rows)


def harmless_keys() -> str:
    """Keys of config.json that no family needs to read."""
    return markdown(
        "whose|keys, or a pattern of them", ((name, _code(keys)) for name, keys in catalog.harmless_keys().items())
    )


def tokenizer_classes() -> str:
    """Classes of transformers whose defaults are known."""
    rows = []
    for name, rules in settings.CLASSES.items():
        files = "SentencePiece model" if rules.sentencepiece else ""
        files = "`vocab.json`, `merges.txt`" if rules.splitting else files
        around = " ".join([*rules.prefix, "…", *rules.suffix]) if rules.prefix or rules.suffix else ""
        rows.append((_code([name]), files, around))
    return markdown("class|its own files, beside `tokenizer.json`|around a prompt where no file says it", rows)


def text_files() -> str:
    """Kinds of text files by name."""
    rows = [(kind.replace("_", " "), _code([pattern.pattern])) for pattern, kind in records.KINDS]
    return markdown("kind|names (patterns, in any case); all others are text", rows)


def other_contents() -> str:
    """What is told by a file's first bytes and refused, or passed over where a directory brought it."""
    return markdown("begins like|what to do", dict.fromkeys((what, advice) for _, _, what, advice in opening.MAGIC))


def page() -> str:
    """The whole page."""
    weights = ((f"`{name}`", what) for name, what in catalog.READ.items())
    names = ((_code([name]) if "." in name else name, what) for name, what in catalog.WRAPPERS.items())
    refused = ((_code([name]) if "*" in name else name, what) for name, what in catalog.REFUSED.items())
    return f"""{INTRODUCTION}
## Families

An export names the first class.

{families()}

## Files of weights

{markdown("read|what it is", weights)}

{markdown("names of tensors|what they are", names)}

{markdown("refused by name|what it is", refused)}

Written are native directories (Orbax) and, for each family, Hugging Face's: `config.json`, `generation_config.json`,
safetensors, the tokenizer with its settings and chat template.

## Keys of config.json

A key that no family reads is harmless where its value is null, false or empty, and those of this table whatever their
value is. Any other may change a logit and is refused, unless `--ignore-config-keys KEY` leaves it out.

{harmless_keys()}

## Generation settings

`generation_config.json` decides, then `config.json`. Followed are {_code(generation.READ_KEYS)}. Beams, temperature and
other ways to search are set by the arguments of sampling. A model whose file has one of these, which change logits and
are not followed, is refused when it is sampled from: {_code(generation.UNFOLLOWED_KEYS)}.

## Tokenizers

Tried in this order: {_code(FILE_NAMES)}; by themselves also tiktoken's ranks and llama2.c's `.bin`. With the settings
beside them: `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`, `chat_template.jinja`,
`additional_chat_templates/`. A class that is not in this table is read from its `tokenizer.json`, and refused by name
without one.

{tokenizer_classes()}

## Text files

{text_files()}

By their first bytes, whatever the name:

{other_contents()}
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
