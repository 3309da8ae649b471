"""InternLM3 (Shanghai AI Laboratory 2025): a Llama whose released config has keys of its own.

Sizes from the released config, whose dynamic scaling begins beyond its 32,768 positions.
"""

import dataclasses

from llama_jax.config import Json, UserError
from llama_jax.models import DecoderConfig
from llama_jax.zoo import llama
from llama_jax.zoo.reading import ConfigReader


def _read(reader: ConfigReader, fields: Json) -> DecoderConfig:
    if fields["attention_bias"] != fields["mlp_bias"]:
        raise UserError(
            f"config.json has qkv_bias={fields['attention_bias']} and bias={fields['mlp_bias']}, and they must be the "
            "same for an InternLM3"
        )
    return llama.read(reader, fields)


INTERNLM3 = dataclasses.replace(
    llama.LLAMA,
    name="internlm3",
    title="InternLM3",
    label="an InternLM3",
    objectives=("Causal", "Chat"),
    presets={
        "internlm3_8b": llama.llama(
            **llama.sizes(48, 4096, 32, 2, 10_240),
            vocab_size=128_512,
            max_positions=32_768,
            eps=1e-5,
            theta=50_000_000.0,
        )
    },
    # The last is what transformers writes, which has no other code for it.
    architectures=("InternLM3ForCausalLM", "InternLM3Model", "LlamaForCausalLM"),
    keys=llama.keys(
        dataclasses.replace(llama.ATTENTION_BIAS, key="qkv_bias"),
        dataclasses.replace(llama.MLP_BIAS, key="bias"),
        kv_heads=2,
        head_dim=128,
        max_positions=32_768,
        eps=1e-5,
    ),
    read=_read,
    aliases={"attention_bias": "qkv_bias", "mlp_bias": "bias"},
    meta=None,
)
