"""Prints, as JSON, what transformers' AutoTokenizer makes of directories: run where transformers is installed.

    python tests/tokenizers/reference_ids.py TEXTS.json DIRECTORY...

TEXTS.json is a list of texts, or an object of such lists by the directories' names. For every directory: `ids` with
the tokens around a text, `plain` without, `decoded` of the latter, the ids of `bos`, `eos`, `pad` and `unk`, and the
names of its chat templates.
"""

import json
import sys
import warnings
from pathlib import Path

sys.modules["sacremoses"] = None  # type: ignore[assignment]  # Marian's optional normalizer

import transformers  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402


def describe(directory: Path, texts: list[str]) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    templates = tokenizer.chat_template or {}
    names = ("bos", "eos", "pad", "unk")
    return {
        "class": type(tokenizer).__name__,
        "ids": [tokenizer(text)["input_ids"] for text in texts],
        "plain": plain,
        "decoded": [
            tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in plain
        ],
        **{name: getattr(tokenizer, f"{name}_token_id") for name in names},
        "templates": sorted(templates) if isinstance(templates, dict) else ["default"],
    }


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    texts = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = {}
    for directory in map(Path, sys.argv[2:]):
        own = texts if isinstance(texts, list) else texts[directory.name]
        found[directory.name] = describe(directory, own)
    print(json.dumps({"transformers": transformers.__version__, "found": found}))


if __name__ == "__main__":
    main()
