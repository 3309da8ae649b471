"""Direct preference optimization of Llama-3.2 1B on pairs of answers, with low-rank adapters (Rafailov et al. 2023).

python train.py llama3_2_1b_dpo --init-from Llama-3.2-1B-SFT --tokenizer.path Llama-3.2-1B-SFT --data.path pairs.jsonl

Llama-3.2-1B-SFT is a model that answers: a released directory, or the run of llama3_2_1b_chat or llama3_2_1b_lora.
pairs.jsonl has lines {"prompt": messages, "chosen": messages, "rejected": messages}, or texts in their place. The
reference is the base without adapters, so that there is no second copy of it; `--model.adapters none` trains all
weights, and keeps a frozen copy of the first ones. A pair that is longer than a row is left out.

Expected result: not run to the end with this package; nothing is claimed. At first the loss is ln 2 = 0.693 and
`rewards/margins` is 0; a run that learns raises the margins.
"""

import dataclasses

from llama_jax.config import load_config_module
from llama_jax.data import Preference
from llama_jax.run import RunConfig


def get_config() -> RunConfig:
    lora: RunConfig = load_config_module("llama3_2_1b_lora").get_config()
    return dataclasses.replace(
        lora,
        data=dataclasses.replace(lora.data, fields=("prompt", "chosen", "rejected"), objective=Preference(beta=0.1)),
        optimizer=dataclasses.replace(lora.optimizer, learning_rate=5e-6),
    )
