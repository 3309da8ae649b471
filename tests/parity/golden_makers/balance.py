"""Gradients of the routers by the balance loss alone, of the goldens whose config has `router_aux_loss_coef`."""

import json
from typing import Any

import numpy as np
import torch
from golden_makers.common import GOLDENS, PLAIN, padded, random_ids
from transformers import AutoModelForCausalLM

# More than one layer with experts each.
NAMES = ("mixtral", "qwen2_moe", "qwen3_moe_tied", "qwen3_next", "olmoe", "gpt_oss")
IDS, MASK = padded(random_ids((4, 8)), 5, 0)


@torch.enable_grad()
def routers(name: str) -> dict[str, Any]:
    """Of the coefficient times the model's own loss, by layer [E, D]; and this loss."""
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / name, **PLAIN).float().eval()
    coefficient = json.loads((GOLDENS / name / "config.json").read_text())["router_aux_loss_coef"]
    assert model.router_aux_loss_coef == coefficient
    loss = coefficient * model(IDS, attention_mask=MASK, output_router_logits=True).aux_loss
    loss.backward()
    weights = {key: p for key, p in model.named_parameters() if key.endswith(("mlp.gate.weight", "router.weight"))}
    gradients = [p.grad for _, p in sorted(weights.items(), key=lambda item: int(item[0].split(".")[2]))]
    return {name: torch.stack(gradients), f"{name}_loss": loss.detach()}


def make_balance() -> None:
    arrays = {"ids": IDS.int(), "mask": MASK.int()}
    for name in NAMES:
        arrays |= routers(name)
    np.savez_compressed(GOLDENS / "balance.npz", **{key: np.asarray(value) for key, value in arrays.items()})


CASES = {"balance": make_balance}
