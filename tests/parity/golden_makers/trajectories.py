"""Goldens of training: losses, norms of gradients and what became of every tensor, from the weights of other goldens.

Twice: in float32, and in float64 for what is right. AdamW is torch's; clipping and the schedule are written out.
"""

import contextlib
import copy
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import trajectory_cases as cases
from golden_makers.common import GOLDENS, PLAIN, Tensors, released
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

KINDS = {"masked": AutoModelForMaskedLM, "source": AutoModelForSeq2SeqLM}
WINDOW, BIAS_UPDATE_RATE = 8, 1e-3  # Gemma 2's in its golden, DeepSeek-V3's in its report


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Code that asks for float32 gets float64: the models compute norms, softmax and angles in float32 by name."""
    kept = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = kept
        torch.set_default_dtype(torch.float32)


def additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, T, S] as the models add it to their scores."""
    return torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


def logits(model: Any, objective: str, batch: Tensors, dtype: torch.dtype) -> torch.Tensor:
    segments = batch["segment_ids"]
    same = segments[:, :, None] == segments[:, None]
    distance = torch.arange(same.shape[1])[:, None] - torch.arange(same.shape[1])
    causal = same & (distance >= 0)
    if objective == "source":
        source = batch["source_segment_ids"]
        within, across = source[:, :, None] == source[:, None], segments[:, :, None] == source[:, None]
        encoded = model.encoder(input_ids=batch["source_tokens"], attention_mask=additive(within, dtype))[0]
        hidden = model.decoder(
            input_ids=batch["tokens"],
            attention_mask=additive(causal, dtype),
            encoder_hidden_states=encoded,
            encoder_attention_mask=additive(across, dtype),
            use_cache=False,
        )[0]
        return model.lm_head(hidden)
    inputs = {"input_ids": batch["tokens"], "position_ids": batch["positions"]}
    if objective == "masked":
        return model(**inputs, attention_mask=additive(same, dtype), token_type_ids=batch["token_types"]).logits
    if objective == "prefix":
        causal |= same & (batch["prefix"] == 1)[:, None]
    mask: Any = additive(causal, dtype)
    if model.config.model_type == "gemma2":
        mask = {"full_attention": mask, "sliding_attention": additive(causal & (distance < WINDOW), dtype)}
    return model(**inputs, attention_mask=mask, use_cache=False).logits


def learning_rate(step: int, options: dict[str, float]) -> float:
    """The first update has the peak over the steps of the warm-up, the last one almost the end of the cosine."""
    peak, warmup, end = options["learning_rate"], options["warmup_steps"], options["final_fraction"]
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / (cases.STEPS - warmup)
    return peak * (end + (1 - end) * (1 + math.cos(math.pi * done)) / 2)


class Loads:
    """The number of tokens that went to every expert whose choice has a bias, padding left out."""

    def __init__(self, model: torch.nn.Module):
        self.gates = [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]
        self.is_token = torch.zeros(0)
        for gate in self.gates:
            gate.register_forward_hook(self._count)

    def clear(self) -> None:
        self.loads = {gate: torch.zeros(gate.num_experts, dtype=torch.int64) for gate in self.gates}

    def _count(self, gate: Any, _: Any, out: tuple[torch.Tensor, ...]) -> None:
        self.loads[gate] += out[2][self.is_token].flatten().bincount(minlength=gate.num_experts)

    @torch.no_grad()
    def move_biases(self) -> None:
        for gate, load in self.loads.items():
            gate.e_score_correction_bias += BIAS_UPDATE_RATE * (load.double().mean() - load).sign()


@torch.enable_grad()
def train(model: Any, name: str, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """The losses and the norms of the gradients of all steps; the model is trained."""
    case, options = cases.CASES[name], cases.CASES[name].optimizer
    smoothing, z_loss, clip = options["label_smoothing"], options["z_loss"], options["clip_norm"]
    decayed, others = [], []
    for key, parameter in model.named_parameters():
        (decayed if parameter.ndim > 1 and "relative_attention_bias" not in key else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": options["weight_decay"]},
        {"params": others, "weight_decay": 0.0},
    ]
    betas = options["beta1"], options["beta2"]
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=options["eps"], foreach=False)
    loads, losses, norms = Loads(model), [], []
    for step, arrays in enumerate(cases.batches(name)):
        batch = {key: torch.from_numpy(x.astype(np.int64)) for key, x in arrays.items()}
        number, loss = batch["weights"].sum(), 0.0
        optimizer.zero_grad()
        loads.clear()
        for i in range(cases.PARTS):
            part = {key: x[i :: cases.PARTS] for key, x in batch.items()}
            loads.is_token = part["segment_ids"].flatten() > 0
            found, targets, weights = logits(model, case.objective, part, dtype), part["targets"], part["weights"]
            of_target = torch.nn.functional.cross_entropy(found.mT, targets, reduction="none")
            trained = torch.nn.functional.cross_entropy(found.mT, targets, reduction="none", label_smoothing=smoothing)
            trained = trained + z_loss * found.logsumexp(-1) ** 2
            ((weights * trained).sum() / number).backward()
            loss += float((weights * of_target.detach()).sum() / number)
        grads = [parameter.grad for parameter in model.parameters()]
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        if norm > clip:
            for grad in grads:
                grad *= clip / norm
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        loads.move_biases()
        losses.append(loss)
        norms.append(float(norm))
    return losses, norms


def make(name: str) -> None:
    case = cases.CASES[name]
    kind = KINDS.get(case.objective, AutoModelForCausalLM)
    model = kind.from_pretrained(GOLDENS / case.golden, **PLAIN).float().eval()
    start = {key: tensor.double() for key, tensor in released(model).items()}
    with in_float64():
        exact, new = copy.deepcopy(model).double(), type(model)(copy.deepcopy(model.config))
        for key, buffer in exact.named_buffers():
            if key not in model.state_dict():  # computed: frequencies, a factor
                buffer.copy_(new.get_buffer(key))
        losses, norms = train(exact, name, torch.float64)
    float32_losses, _ = train(model, name, torch.float32)
    found = {
        of: {key: (tensor.double() - start[key]).numpy() for key, tensor in released(own).items()}
        for of, own in (("float64", exact), ("float32", model))
    }
    keys = sorted(found["float64"])
    changes = [found["float64"][key] for key in keys]
    errors = [np.linalg.norm(found["float32"][key] - x) for key, x in zip(keys, changes, strict=True)]
    error, key = max((error / np.linalg.norm(x), key) for error, x, key in zip(errors, changes, keys, strict=True))
    of_losses = np.abs(np.array(float32_losses) / losses - 1).max()
    print(f"{name}: loss {losses[0]:.4f} to {losses[-1]:.4f}, gradient {min(norms):.2f} to {max(norms):.2f};", end=" ")
    print(f"in float32 off by {of_losses:.1e} of the losses, {error:.1e} of the change of {key}")
    np.savez_compressed(
        GOLDENS / f"trajectory_{name}.npz",
        losses=losses,
        losses_float32=float32_losses,
        grad_norms=norms,
        tensors=keys,
        distances=[np.linalg.norm(x) for x in changes],
        projections=[(cases.direction(key, x.shape) * x).sum() for key, x in zip(keys, changes, strict=True)],
    )


CASES = {f"trajectory_{name}": partial(make, name) for name in cases.CASES}
