"""Fine-tuning of Llama-3.2 1B on conversations with low-rank adapters: 11,272,192 of its parameters are trained.

python train.py llama3_2_1b_lora --init-from Llama-3.2-1B --tokenizer.path Llama-3.2-1B --data.path chats.jsonl

As llama3_2_1b_chat, with adapters of rank 16 on every projection of the layers (Hu et al. 2022) and a learning rate
that is 20 times as high. The run is loaded, sampled and exported as any other; `python -m llama_jax convert
runs/llama3_2_1b_lora adapters --to peft` writes its adapters alone, as PEFT has them.

Memory: the base in float32 and no gradients or moments of it, 5.1 GB before activations; each checkpoint has the base,
too. Expected result: not run to the end with this package; nothing is claimed.
"""

import dataclasses

from llama_jax.config import load_config_module
from llama_jax.nn import LoRA
from llama_jax.run import RunConfig


def get_config() -> RunConfig:
    chat: RunConfig = load_config_module("llama3_2_1b_chat").get_config()
    return dataclasses.replace(
        chat,
        model=dataclasses.replace(chat.model, adapters=LoRA(rank=16, alpha=32, targets=("all-linear",), dropout=0.05)),
        optimizer=dataclasses.replace(chat.optimizer, learning_rate=2e-4),
    )
