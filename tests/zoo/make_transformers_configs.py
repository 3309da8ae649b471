"""Makes transformers_configs.json: what transformers says of every family, and of all models.

Run where transformers is installed (it is no dependency of this project):

    python tests/zoo/make_transformers_configs.py
"""

import json
from pathlib import Path

from transformers import AutoConfig, GenerationConfig, PretrainedConfig, __version__

FAMILIES = (
    "bart", "bert", "bloom", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "distilbert", "falcon",
    "gemma", "gemma2", "gemma3", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox",
    "gpt_oss", "gptj", "granite", "llama", "mamba2", "marian", "ministral", "mistral", "mixtral", "modernbert", "mt5",
    "nemotron", "olmo2", "olmo3", "olmoe", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "qwen3_next", "roberta", "smollm3", "stablelm", "starcoder2", "switch_transformers", "t5", "xlm-roberta",
)  # fmt: skip

found = {
    "transformers": __version__,
    "families": {name: AutoConfig.for_model(name).to_dict() for name in FAMILIES},
    "aliases": {name: type(AutoConfig.for_model(name)).attribute_map for name in FAMILIES},
    "base": sorted({*PretrainedConfig().to_dict(), *vars(PretrainedConfig())}),
    "generation": sorted(vars(GenerationConfig())),
}
lines = [f"{json.dumps(name)}: {json.dumps(value, sort_keys=True)}" for name, value in found.items()]
Path(__file__).with_name("transformers_configs.json").write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")
