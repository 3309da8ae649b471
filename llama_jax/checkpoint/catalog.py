"""What is read of other people's models and what is refused, family by family and form by form, as data for tables."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llama_jax import zoo
from llama_jax.zoo import known_keys

# Files that hold weights, and what is said of them.
READ = {
    "model.safetensors, model-*-of-*.safetensors": "Hugging Face, in one file or in shards with an index",
    "pytorch_model.bin, pytorch_model-*-of-*.bin": "PyTorch's zip files and those before 1.6, by a reader that calls "
    "nothing",
    "consolidated.*.pth with params.json": "Meta, one file for each model-parallel rank",
    "consolidated.safetensors": "Meta's names in one file, with params.json or config.json (Llama, Mixtral)",
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
    "qweight, qzeros; quant_method gptq, awq": "weights quantized by GPTQ and AWQ",
    "absmax, SCB; quant_method bitsandbytes": "weights quantized by bitsandbytes",
    "scales; a key quantization": "weights quantized by MLX",
    "*.h5, *.msgpack, *.ckpt, *.gguf, *.onnx, *.npz, *.ot": "files of other frameworks, where there are no others",
    "other classes in architectures": "heads of other tasks, and code of somebody's own",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """What is read of one family.

    `architectures` are the classes whose weights are, `keys` those of config.json that decide something, `meta` whether
    files with Meta's names are read too.
    """

    model_type: str
    architectures: tuple[str, ...]
    keys: tuple[str, ...]
    meta: bool


class _Asked(dict):
    """A config.json that notes which keys it is asked for."""

    def __init__(self, data: Mapping[str, Any], asked: set[str]):
        super().__init__(data)
        self._asked = asked

    def get(self, key: str, default: Any = None) -> Any:
        self._asked.add(key)
        return super().get(key, default)


def families() -> tuple[Family, ...]:
    """Every family with released weights, by its `model_type`."""
    found = []
    for name in zoo.families():
        module = zoo.family(name)
        asked: set[str] = set()
        data = module.to_hf(next(iter(module.PRESETS.values())))
        for architecture in module.ARCHITECTURES:
            module.from_hf(_Asked(data | {"architectures": [architecture]}, asked))
        found.append(Family(name, tuple(module.ARCHITECTURES), tuple(sorted(asked)), hasattr(module, "META_WEIGHTS")))
    return tuple(found)


def harmless_keys() -> dict[str, tuple[str, ...]]:
    """Keys of config.json that no family needs to read, by who writes them; patterns are regular expressions."""
    by_name = {name: tuple(sorted(keys)) for name, keys in known_keys.KNOWN.items()}
    return by_name | {name: (pattern.pattern,) for name, (pattern, _) in known_keys.PATTERNS.items()}
