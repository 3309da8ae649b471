"""Write compatibility.md, the tables of files that are read: `python docs/compatibility.py`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from markdown_table import markdown

from llama_jax import zoo
from llama_jax.checkpoint import generation
from llama_jax.data import readers
from llama_jax.data.readers import opening
from llama_jax.tokenizers import settings
from llama_jax.tokenizers.loading import FILE_NAMES
from llama_jax.zoo import known_keys

# Files of weights that are read.
READ = {
    "model.safetensors, model-*-of-*.safetensors": "Hugging Face, in one file or in shards with an index",
    "pytorch_model.bin, pytorch_model-*-of-*.bin": "PyTorch's zip files and those before 1.6, by a reader that calls "
    "nothing",
    "consolidated.*.pth with params.json": "Meta, one file for each model-parallel rank",
    "consolidated.safetensors": "Meta's names in one file, with params.json or config.json (Llama, Mistral, Mixtral)",
    "*.gguf": "llama.cpp's, of the architectures llama (also with experts), gpt2 and chatglm, one file or shards; F32, "
    "F16 and BF16 as they are, quantized types (Q8_0, Q4_0, Q5_0, Q4_K, Q5_K, Q6_K, others of gguf's) as float32",
    "model.safetensors with quantization_config": "GPTQ (2, 4 and 8 bits, both versions, ordered inputs) and AWQ "
    "(gemm), as float32",
    "*.bin": "llama2.c, version 0",
}
WRAPPERS = {
    "_orig_mod., module., _fsdp_wrapped_module., _checkpoint_wrapped_module.": "prefixes of training tools, anywhere",
    "no prefix": "a trunk saved without the name that it has in the whole model",
    "experts.gate_up_proj, experts.down_proj": "all experts of a layer in one tensor",
    "rotary_emb.*, position_ids, rope.freqs": "computed, and passed over",
    "weight_scale_inv": "fp8 with a scale for each block (DeepSeek)",
}
REFUSED = {
    "adapter_config.json, adapter_model.*": "adapters, until they are merged",
    "qweight, qzeros": "weights of GPTQ and AWQ where no config says how, with 3 bits, or of other versions",
    "absmax, SCB; quant_method bitsandbytes": "weights quantized by bitsandbytes",
    "scales; a key quantization": "weights quantized by MLX",
    "*.h5, *.msgpack, *.ckpt, *.onnx, *.npz, *.ot": "files of other frameworks, where there are no others",
    "other classes in architectures": "heads of other tasks, and code of somebody's own",
}

PAGE = Path(__file__).resolve().parent / "compatibility.md"
INTRODUCTION = """# Files that are read, written and refused

Written by `python docs/compatibility.py` from the package's own tables; a test compares the two. An error is one
sentence that names the file or the key and the way out. Exact parameter counts and parity errors are in
[zoo.md](zoo.md).
"""


def _code(words: Iterable[str]) -> str:
    """Return the words as code, with a table's separators escaped."""
    return ", ".join("`" + word.replace("|", "\\|") + "`" for word in words)


class _Asked(dict):
    """Record which keys of a config.json are read."""

    def __init__(self, data: Mapping[str, Any], asked: set[str]):
        super().__init__(data)
        self._asked = asked

    def get(self, key: str, default: Any = None) -> Any:
        self._asked.add(key)
        return super().get(key, default)

    def __or__(self, other: Any) -> "_Asked":
        return _Asked({**self, **other}, self._asked)


def keys_read(family: zoo.Family) -> tuple[str, ...]:
    """Return the keys of config.json that decide something."""
    asked: set[str] = set()
    data = family.to_hf(next(iter(family.presets.values())))
    for architecture in family.architectures:
        family.from_hf(_Asked(data | {"architectures": [architecture]}, asked))
    return tuple(sorted(asked))


def families() -> str:
    """Return what is read of each family, and the class that an export names."""
    rows = []
    for name in zoo.families():
        family = zoo.family(name)
        meta = "yes" if family.meta is not None else ""
        rows.append((family.title, _code([name]), _code(family.architectures), meta, _code(keys_read(family))))
    return markdown("family|`model_type`|classes that are read|Meta's names too|keys of config.json that decide", rows)


def harmless() -> dict[str, tuple[str, ...]]:
    """Return the keys of config.json that no family needs to read, by who writes them; some are patterns."""
    by_name = {name: tuple(sorted(keys)) for name, keys in known_keys.KNOWN.items()}
    return by_name | {name: (pattern.pattern,) for name, (pattern, _) in known_keys.PATTERNS.items()}


def harmless_keys() -> str:
    """Return the keys of config.json that no family needs to read."""
    return markdown("whose|keys, or a pattern of them", ((name, _code(keys)) for name, keys in harmless().items()))


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
    rows = [(kind.name.replace("_", " "), _code([kind.pattern])) for kind in readers.KINDS]
    return markdown("kind|names (patterns, in any case); all others are text", rows)


def other_contents() -> str:
    """Return the kinds of files that are recognised by their first bytes and not read."""
    return markdown("begins like|what to do", dict.fromkeys((what, advice) for _, _, what, advice in opening.MAGIC))


def page() -> str:
    """Return the whole page."""
    weights = ((f"`{name}`", what) for name, what in READ.items())
    names = ((_code([name]) if "." in name else name, what) for name, what in WRAPPERS.items())
    refused = ((_code([name]) if "*" in name else name, what) for name, what in REFUSED.items())
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

Files are tried in this order: {_code(FILE_NAMES)}; single files may also be tiktoken's ranks, llama2.c's `.bin`
and GGUF files. The settings in the same directory are read too: `tokenizer_config.json`, `special_tokens_map.json`,
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
