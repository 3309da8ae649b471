"""Write control_goldens.npz: the logits of `control_cases.py` as transformers' processors and warpers leave them.

    python tests/sampling/make_control_goldens.py

needs transformers 5.23 and torch, and runs in seconds on a CPU.
"""

from pathlib import Path

import control_cases as cases
import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

HERE = Path(__file__).parent


def processed(model, group: int, row: int, logits: np.ndarray) -> np.ndarray:
    (ids, prompt), own = cases.text(group, row), dict(cases.user(group, row))
    temperature, new = own.pop("temperature"), own.pop("max_new_tokens")
    settings = cases.files(group) | {"top_k": None, "top_p": None}
    if bias := own.pop("logit_bias", None):
        settings["sequence_bias"] = [[[i], x] for i, x in bias.items()]
    settings["suppress_tokens"] = settings.get("suppress_tokens", []) + own.pop("banned_ids", []) or None
    sampled = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    config = GenerationConfig(**settings | own, **sampled, eos_token_id=list(cases.EOS), max_length=prompt + new)
    model._prepare_special_tokens(config, False, device="cpu")
    processors = model._get_logits_processor(config, input_ids_seq_length=prompt)
    return processors(torch.tensor([ids]), torch.from_numpy(logits)[None])[0].numpy()


if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(HERE.parent / "parity" / "goldens" / "llama_gqa")
    found = [
        [processed(model, group, row, cases.logits(group)[row]) for row in range(cases.ROWS)]
        for group in range(cases.GROUPS)
    ]
    np.savez_compressed(HERE / "control_goldens.npz", logits=np.array(found, np.float32))
