"""Write compatibility.md, the tables of files that are read: `python docs/compatibility.py`."""

from collections.abc import Iterable
from pathlib import Path

from markdown_table import markdown
from zoo_table import title

from llama_jax import zoo
from llama_jax.checkpoint import catalog, generation
from llama_jax.data.readers import opening, records
from llama_jax.tokenizers import settings
from llama_jax.tokenizers.loading import FILE_NAMES

PAGE = Path(__file__).resolve().parent / "compatibility.md"
INTRODUCTION = """# Files that are read, written and refused

Written by `python docs/compatibility.py` from the package's own tables; a test compares the two. An error is one
sentence that names the file or the key and the way out. Exact parameter counts and parity errors are in the README's
table of the zoo.
"""


def _code(words: Iterable[str]) -> str:
    """Return the words as code, with a table's separators escaped."""
    return ", ".join("`" + word.replace("|", "\\|") + "`" for word in words)


def families() -> str:
    """Return what is read of each family, and the class that an export names."""
    rows = []
    for family in catalog.families():
        module = zoo.family(family.model_type)
        names = "yes" if family.meta else ""
        rows.append((title(module), _code([family.model_type]), _code(family.architectures), names, _code(family.keys)))
    return markdown("family|`model_type`|classes that are read|Meta's names too|keys of config.json that decide", rows)


def harmless_keys() -> str:
    """Return the keys of config.json that no family needs to read."""
    return markdown(
        "whose|keys, or a pattern of them", ((name, _code(keys)) for name, keys in catalog.harmless_keys().items())
    )


def tokenizer_classes() -> str:
    """Return the classes of transformers whose defaults are known."""
    rows = []
    for name, rules in settings.CLASSES.items():
        files = "SentencePiece model" if rules.sentencepiece else ""
        files = "`vocab.json`, `merges.txt`" if rules.splitting else files
        around = " ".join([*rules.prefix, "…", *rules.suffix]) if rules.prefix or rules.suffix else ""
        rows.append((_code([name]), files, around))
    return markdown("class|files, in addition to `tokenizer.json`|tokens around a prompt if no file has a rule", rows)


def text_files() -> str:
    """Return the kinds of text files by name."""
    rows = [(kind.replace("_", " "), _code([pattern.pattern])) for pattern, kind in records.KINDS]
    return markdown("kind|names (patterns, in any case); all others are text", rows)


def other_contents() -> str:
    """Return the kinds of files that are recognised by their first bytes and not read."""
    return markdown("begins like|what to do", dict.fromkeys((what, advice) for _, _, what, advice in opening.MAGIC))


def page() -> str:
    """Return the whole page."""
    weights = ((f"`{name}`", what) for name, what in catalog.READ.items())
    names = ((_code([name]) if "." in name else name, what) for name, what in catalog.WRAPPERS.items())
    refused = ((_code([name]) if "*" in name else name, what) for name, what in catalog.REFUSED.items())
    return f"""{INTRODUCTION}
## Families

An export names the first class.

{families()}

## Files of weights

{markdown("read|format", weights)}

{markdown("names of tensors|meaning", names)}

{markdown("refused by name|format", refused)}

Two forms are written: native directories (Orbax) and, for each family, Hugging Face's: `config.json`,
`generation_config.json`, safetensors, the tokenizer with its settings and chat template.

## Keys of config.json

A key that no family reads is harmless if its value is null, false or empty; the keys of this table are harmless with
any value. Any other key may change a logit and is refused, unless `--ignore-config-keys KEY` leaves it out.

{harmless_keys()}

## Generation settings

`generation_config.json` is read before `config.json`. Sampling follows {_code(generation.READ_KEYS)}. Beams,
temperature and other search settings are arguments of sampling. These keys change logits and are not implemented;
sampling from a model whose file sets one is refused: {_code(generation.UNFOLLOWED_KEYS)}.

## Tokenizers

Files are tried in this order: {_code(FILE_NAMES)}; single files may also be tiktoken's ranks and llama2.c's `.bin`.
The settings in the same directory are read too: `tokenizer_config.json`, `special_tokens_map.json`,
`added_tokens.json`, `chat_template.jinja`, `additional_chat_templates/`. A class that is not in this table is read
from its `tokenizer.json`, and refused by name without one.

{tokenizer_classes()}

## Text files

{text_files()}

Files with these first bytes are not text, whatever their name:

{other_contents()}
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
