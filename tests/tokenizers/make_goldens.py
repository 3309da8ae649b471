"""Makes tests/tokenizers/bert_cases.json and directory_cases.json: texts and the ids that transformers gives them.

Run where transformers is installed (it is no dependency of this project), with LLAMA_JAX_TEST_DATA naming the folder of
real files that has bert/vocab.txt and tokenizer_cases/:

    python tests/tokenizers/make_goldens.py

The first is of BertTokenizer and BERT's own vocabulary, which is not part of the file; the second of AutoTokenizer and
the directories that directories.py makes.
"""

import json
import os
import tempfile
from pathlib import Path

import directories
import transformers
from reference_ids import describe
from transformers import BertTokenizer

DATA = Path(os.environ["LLAMA_JAX_TEST_DATA"])
TEXTS = (
    "",
    "The quick brown fox jumps over the lazy dog.",
    "Café naïve résumé Ångström İstanbul Straße ŒUVRE",
    "e\u0301 a\u030a \u1e9b\u0323 \ufb01nd",  # combining marks, a ligature
    "我喜欢学习 machine learning,这很有意思!",
    "日本語のひらがなとカタカナ 한국어 조선말",
    "a\x00b\x07c\u200bd\ufeffe\ufffdf\x7fg\x85h\x1ci",  # control characters
    "tab\tnew\nline\r\nnbsp\u00a0em\u2003ideographic\u3000end",
    "don't can't we'll it's I'm they've",
    "$1,234.56 (50%) #tag @user a_b-c/d\\e^f`g~h|i",
    "[unused1] [mask] [ CLS ] ##ing",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "x" * 100 + " " + "x" * 101,
    "\U0001f999 \U0001f1e9\U0001f1ea ½ ² Ⅷ ﷽ 𝒳",
    "Ｆｕｌｌ ｗｉｄｔｈ １２３ “quotes” – dashes — …",
    "ΑΒΓ Ωmega Привет Ёлка עברית العربية हिन्दी ไทย",
    "\u4e00\u3400\U00020000\uf900 \u3041",  # Chinese characters of several blocks, a kana
)
SETTINGS = (
    {},
    {"do_lower_case": False},
    {"do_lower_case": True, "strip_accents": False},
    {"do_lower_case": False, "strip_accents": True},
    {"tokenize_chinese_chars": False},
)


def main() -> None:
    bert()
    released()


def bert() -> None:
    with (DATA / "tokenizer_cases" / "ggml-vocab-llama-spm.gguf.inp").open(newline="", encoding="utf-8") as file:
        awkward = file.read().split("\n__ggml_vocab_test__\n")
    texts = [*TEXTS, *awkward]
    cases = []
    for settings in SETTINGS:
        tokenizer = BertTokenizer(str(DATA / "bert" / "vocab.txt"), **settings)
        ids = [tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts]
        decoded = [tokenizer.decode(i, skip_special_tokens=True, clean_up_tokenization_spaces=False) for i in ids]
        cases.append({"settings": settings, "ids": ids, "decoded": decoded})
    _write("bert_cases.json", {"transformers": transformers.__version__, "texts": texts, "cases": cases})


def released() -> None:
    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in directories.CASES:
            directory = directories.write_case(name, Path(folder))
            cases[name] = describe(directory, directories.texts_of(name))
    _write("directory_cases.json", {"transformers": transformers.__version__, "cases": cases})


def _write(name: str, golden: dict) -> None:
    # A line for every list of ids keeps changes readable.
    lines = (
        json.dumps(golden, indent=0, separators=(",", ":")).replace(",\n", ",").replace("[\n", "[").replace("\n]", "]")
    )
    Path(__file__).with_name(name).write_text(lines + "\n")


if __name__ == "__main__":
    main()
