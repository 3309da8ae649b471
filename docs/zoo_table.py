"""Measure the goldens and write the README's table of the zoo: `python docs/zoo_table.py`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from markdown_table import markdown

import llama_jax
from llama_jax import zoo
from llama_jax.checkpoint import LanguageModel

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "parity" / "goldens"
BEGIN, END = "<!-- zoo table -->", "<!-- end of zoo table -->"
# Logits of these, by the module's own method of the name; the others are those of a call.
HEADS = ("pooled", "pair_logits", "class_logits", "mtp_logits")

type Arrays = dict[str, np.ndarray]


def model_types() -> dict[str, str]:
    """Return the family of every golden by its config.json; Llama where it has Meta's params.json."""
    found = {}
    for folder in sorted(path for path in GOLDENS.iterdir() if path.is_dir()):
        config = folder / "config.json"
        found[folder.name] = json.loads(config.read_text())["model_type"] if config.is_file() else "llama"
    return found


def expected(name: str) -> Arrays:
    """Return the arrays that the original code computed for a golden."""
    with np.load(GOLDENS / name / "expected.npz") as arrays:
        return dict(arrays)


def computed(lm: LanguageModel, golden: Mapping[str, np.ndarray]) -> Arrays:
    """Return the same arrays computed by the package: outputs of every block, logits, and those of other heads."""
    if "source" in golden:
        arguments, named = (golden["source"], golden["target"]), {"source_mask": golden["source_mask"]}
    else:
        arguments = (golden["ids"],)
        named = {name: golden[key] for name, key in (("mask", "mask"), ("token_types", "token_types")) if key in golden}
    heads = tuple(name for name in HEADS if name in golden)
    found = lm.model.run(_everything, arguments, named, heads=heads, logits="logits" in golden)
    return {name: np.asarray(value) for name, value in found.items()}


def _everything(
    module: Any, arguments: Any, named: Any, *, heads: tuple[str, ...], logits: bool
) -> dict[str, jax.Array]:
    stacks = module.hidden_states(*arguments, **named)
    found = {f"{stack.removesuffix('s')}_{i}": x for stack, states in stacks.items() for i, x in enumerate(states)}
    if logits:
        found["logits"] = module(*arguments, **named)
    return found | {name: getattr(module, name)(*arguments, **named) for name in heads}


def difference(golden: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], name: str) -> float:
    """Return the largest difference of one array, without padding."""
    error = np.abs(golden[name] - found[name])
    mask = golden.get("source_mask" if name.startswith("encoder_") else "mask")
    if mask is not None and error.ndim == 3:
        error = error[mask == 1]
    return float(error.max())


def parity_error(name: str) -> float:
    """Return the largest difference of a golden's logits, over all heads."""
    golden = expected(name)
    found = computed(llama_jax.load(GOLDENS / name, dtype="float32"), golden)
    return max(difference(golden, found, key) for key in ("logits", *HEADS) if key in golden)


def loads(model_type: str) -> str:
    """Return the classes of the family's goldens, and the forms of their files."""
    architectures, forms = [], []
    for name, found in model_types().items():
        if found != model_type:
            continue
        folder = GOLDENS / name
        config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
        architectures += [f"`{architecture}`" for architecture in config.get("architectures", ())]
        forms += ["fp8 blocks"] if "quantization_config" in config else []
        kinds = {"*.safetensors": "safetensors", "*.bin": "`.bin`", "consolidated.*.pth": "Meta's `.pth`"}
        forms += [form for pattern, form in kinds.items() if any(folder.glob(pattern))]
    return "; ".join(", ".join(dict.fromkeys(words)) for words in (architectures, forms) if words)


def zoo_table(errors: Mapping[str, str]) -> str:
    """Return the table, a row for each family; `errors` are the measured parity errors by family."""
    rows = []
    for name, family in zoo.all_presets().items():
        sizes = [f"`{preset}` {llama_jax.num_parameters(config):,}" for preset, config in family.presets.items()]
        trained = ", ".join(f"`{objective}`" for objective in family.objectives)
        rows.append((family.title, "<br>".join(sizes), loads(name), trained, errors.get(name, "")))
    return markdown("family|presets, parameters|weights of|objectives|parity error>", rows)


def measure() -> dict[str, str]:
    """Return the largest parity error of each family's goldens."""
    errors: dict[str, float] = {}
    for name, model_type in model_types().items():
        if model_type not in zoo.all_presets():
            continue
        error = parity_error(name)
        print(f"{name}: {error:.1e}", flush=True)
        errors[model_type] = max(errors.get(model_type, 0.0), error)
    return {model_type: f"{error:.1e}" for model_type, error in errors.items()}


def written(text: str) -> tuple[str, dict[str, str]]:
    """Return the table in a page, and its parity errors by family."""
    match = re.search(f"{BEGIN}\n(.*){END}", text, re.DOTALL)
    assert match, f"README.md has lost {BEGIN} or {END}"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in match[1].splitlines()[2:]]
    names = {family.title: name for name, family in zoo.all_presets().items()}
    return match[1], {names[row[0]]: row[-1] for row in rows if row[0] in names and row[-1]}


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    old, _ = written(text)
    new = zoo_table(measure()) + "\n"
    readme.write_text(text.replace(f"{BEGIN}\n{old}{END}", f"{BEGIN}\n{new}{END}"), encoding="utf-8")
