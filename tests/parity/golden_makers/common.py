"""What the makers of goldens share: random parameters, layers' outputs, greedy tokens, files as they are released."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

GOLDENS = Path(__file__).parent.parent / "goldens"
PROMPT_LENGTH, NEW_TOKENS, MIN_MARGIN, MIN_DISTINCT = 5, 20, 5e-3, 6

Tensors = dict[str, torch.Tensor]
# The code as it is written in the models' own files, not a faster one from elsewhere.
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}

logging.disable_progress_bar()
logging.set_verbosity_error()  # what a file lacks or has too much is asserted


def randomize(model: torch.nn.Module, seed: int, gain: float = 1.5) -> None:
    """Every parameter, and every buffer that is read from a file. `gain` is a matrix's, from inputs to outputs."""
    generator = torch.Generator().manual_seed(seed)
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        module = modules[name.rpartition(".")[0]]
        if name.endswith("bias"):
            value = 0.5 * noise
        elif "norm" in name.lower() or ".ln_" in name:
            value = 1.0 + 0.3 * noise
        elif isinstance(module, torch.nn.Embedding):
            # A tied head would only ever repeat the last token if the residual stream were mostly its embedding.
            value = 0.25 * noise if tied and "relative" not in name else noise
        else:
            value = gain * noise / parameter.shape[0 if isinstance(module, Conv1D) else -1] ** 0.5
        if parameter.requires_grad:  # what is frozen is computed: sinusoids
            parameter.data.copy_(value)
    for name, buffer in model.named_buffers():
        noise = torch.randn(buffer.shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.2 * noise)
        elif name.endswith("final_logits_bias"):
            buffer.copy_(0.5 * noise)


def divide(tensors: Iterable[torch.Tensor], by: torch.Tensor) -> None:
    for tensor in tensors:
        tensor.data /= by


def random_ids(shape: tuple[int, int], vocab_size: int = 64, seed: int = 0) -> torch.Tensor:
    """Token ids above those with a meaning of their own."""
    return torch.from_numpy(np.random.default_rng(seed).integers(4, vocab_size, shape))


def padded(ids: torch.Tensor, length: int, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last row ends after `length` tokens: ids, mask."""
    mask = torch.ones_like(ids)
    mask[-1, length:] = 0
    return torch.where(mask == 1, ids, pad), mask


def greedy(next_logits: Callable[[torch.Tensor], torch.Tensor], prompt: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Greedy continuation by the full forward, and the smallest distance of the best from the second token."""
    ids, margin = prompt, float("inf")
    for _ in range(NEW_TOKENS):
        best = next_logits(ids)[:, -1].topk(2)
        margin = min(margin, float((best.values[:, 0] - best.values[:, 1]).min()))
        ids = torch.cat([ids, best.indices[:, :1]], 1)
    return ids, margin


def search(
    name: str,
    build: Callable[[int], Any],
    generate: Callable[[Any], tuple[torch.Tensor, float]],
    forbidden: Collection[int] = (),
    accept: Callable[[Any], bool] = lambda model: True,
) -> tuple[Any, dict[str, Any]]:
    """The first seed's model whose greedy tokens are several, clear, and none of `forbidden`."""
    for seed in range(1000):
        model = build(seed)
        generated, margin = generate(model)
        new = generated[:, -NEW_TOKENS:].tolist()
        distinct = min(len(set(row)) for row in new)
        several = distinct >= MIN_DISTINCT and not set(forbidden) & {token for row in new for token in row}
        if margin >= MIN_MARGIN and several and accept(model):
            print(f"{name}: seed {seed}, margin {margin:.4f}, {distinct} distinct tokens")
            return model, {"generated": generated, "margin": np.float32(margin)}
    raise SystemExit(f"{name}: no seed gives a clear enough greedy continuation")


@contextlib.contextmanager
def outputs(modules: Mapping[str, torch.nn.Module]):
    """What the modules return while the block runs, by name (of a tuple the first)."""
    found: Tensors = {}
    hooks = [
        module.register_forward_hook(
            lambda _, __, out, name=name: found.__setitem__(name, out[0] if isinstance(out, tuple) else out)
        )
        for name, module in modules.items()
    ]
    yield found
    for hook in hooks:
        hook.remove()


def numbered(prefix: str, modules: Iterable[torch.nn.Module]) -> dict[str, torch.nn.Module]:
    return {f"{prefix}_{i}": module for i, module in enumerate(modules)}


def released(model: Any) -> Tensors:
    """The parameters under the names of the released files: where the model holds them otherwise, saving converts."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def own_config(model: Any) -> dict[str, Any]:
    """The config.json that the model's own library writes today; released files are older."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return json.loads((Path(folder) / "config.json").read_text())


def write(
    name: str, config: Mapping[str, Any], tensors: Tensors, expected: Mapping[str, Any], *, pickled: bool = False
) -> Path:
    """The folder of a golden: config.json, weights (`pytorch_model.bin` where `pickled`), expected.npz."""
    folder = GOLDENS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        tensors = {key: value.contiguous() for key, value in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    arrays = {key: np.asarray(value) for key, value in expected.items()}
    arrays = {key: a.astype(np.int32) if a.dtype == np.int64 else a for key, a in arrays.items()}
    np.savez_compressed(folder / "expected.npz", **arrays)
    return folder


def check_reads(
    folder: Path,
    kind: Any,
    forward: Callable[[Any], torch.Tensor],
    logits: torch.Tensor,
    computed: Collection[str] = (),
) -> None:
    """The original library reads the folder, needs all of it but what is `computed`, and gets the same logits."""
    model, info = kind.from_pretrained(folder, **PLAIN, output_loading_info=True)
    surplus = [key for key in info["unexpected_keys"] if not any(key.endswith(end) for end in computed)]
    wrong = [*info["missing_keys"], *info["mismatched_keys"], *surplus]
    assert not wrong, (folder.name, wrong)
    difference = float((forward(model.float().eval()) - logits).abs().max())
    assert difference < 2e-6, (folder.name, difference)
