"""Measure the goldens and write docs/zoo.md, and the README's list of families: `python docs/zoo_table.py`."""

import json
import platform
import re
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from markdown_table import markdown
from piece_matrix import matrix

import llama_jax
from llama_jax import zoo
from llama_jax.checkpoint import LanguageModel
from llama_jax.models import ModelConfig

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "parity" / "goldens"
PAGE, README = ROOT / "docs" / "zoo.md", ROOT / "README.md"
# What is written in the pages, between these comments.
PARTS = {name: (f"<!-- {name} -->", f"<!-- end of {name} -->") for name in ("families", "pieces", "matrix")}
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


def parity_error(lm: LanguageModel, golden: Mapping[str, np.ndarray]) -> float:
    """Return the largest difference of a golden's logits, over all heads."""
    found = computed(lm, golden)
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
        method = config.get("quantization_config", {}).get("quant_method")
        forms += [{"fp8": "fp8 blocks", "mxfp4": "MXFP4"}[method]] if method else []
        kinds = {"*.safetensors": "safetensors", "*.bin": "`.bin`", "consolidated.*.pth": "Meta's `.pth`"}
        forms += [form for pattern, form in kinds.items() if any(folder.glob(pattern))]
    return "; ".join(", ".join(dict.fromkeys(words)) for words in (architectures, forms) if words)


def pieces(config: ModelConfig) -> str:
    """Return the pieces of a model in words: of each group those that its layers have."""
    found: dict[str, None] = {}
    for mixer, feed_forward in config.layer_pieces():
        features = ("window", "output_gate", "qk_norm", "softcap", "sinks", "qkv_bias")
        has = [name.replace("_", " ") for name in features if getattr(mixer, name, None)]
        rope = getattr(mixer, "rope", None)
        has += ["no rotary positions" if rope is None else "rotary"] if hasattr(mixer, "rope") else []
        has += [type(rope.scaling).__name__] if rope is not None and rope.scaling is not None else []
        found[f"{type(mixer).__name__} ({', '.join(has)})" if has else type(mixer).__name__] = None
        if feed_forward is not None:
            activation = getattr(feed_forward, "activation", "")
            found[f"{type(feed_forward).__name__} ({activation})"] = None
    for name in ("norm", "positions", "position_bias"):
        if (piece := getattr(config, name, None)) is not None:
            found[type(piece).__name__] = None
    placement, parallel = getattr(config, "norm_placement", "pre"), getattr(config, "parallel", "none")
    words = [] if placement == "pre" else [f"{placement} norms"]
    words += [] if parallel == "none" else [f"parallel ({parallel.replace('_', ' ')})"]
    return ", ".join([*found, *words])


def speed(lm: LanguageModel, golden: Mapping[str, np.ndarray]) -> float:
    """Return the tokens a second that a golden reads on this machine: the median of five calls of its forward pass."""
    seconds = []
    computed(lm, golden)
    for _ in range(5):
        start = time.perf_counter()
        computed(lm, golden)
        seconds.append(time.perf_counter() - start)
    tokens = sum(golden[name].size for name in ("ids", "source", "target") if name in golden)
    return tokens / statistics.median(seconds)


def families_table(measured: Mapping[str, tuple[str, ...]]) -> str:
    """Return the table, a row for each family; `measured` are its parity error and speed by family."""
    rows = []
    for name, family in zoo.all_presets().items():
        sizes = [f"`{preset}` {llama_jax.num_parameters(config):,}" for preset, config in family.presets.items()]
        trained = ", ".join(f"`{objective}`" for objective in family.objectives)
        rows.append((family.title, "<br>".join(sizes), loads(name), trained, *measured.get(name, ("", ""))))
    return markdown("family|presets, parameters|weights of|objectives|parity error>|tokens/s>", rows)


def pieces_table() -> str:
    """Return the table of every family's pieces, those of its first preset."""
    rows = [(family.title, pieces(next(iter(family.presets.values())))) for family in zoo.all_presets().values()]
    return markdown("family|pieces of its first preset", rows)


def measure() -> dict[str, tuple[str, ...]]:
    """Return the largest parity error of each family's goldens, and the speed of the last of them."""
    errors: dict[str, float] = {}
    speeds: dict[str, float] = {}
    for name, model_type in model_types().items():
        golden, lm = expected(name), llama_jax.load(GOLDENS / name, dtype="float32")
        error = parity_error(lm, golden)
        errors[model_type] = max(errors.get(model_type, 0.0), error)
        speeds[model_type] = speed(lm, golden)
        print(f"{name}: {error:.1e}, {speeds[model_type]:.0f} tokens/s", flush=True)
    return {name: (f"{error:.1e}", f"{speeds[name]:,.0f}") for name, error in errors.items()}


def written(text: str, part: str) -> str:
    """Return what a page has between the comments of a part."""
    begin, end = PARTS[part]
    match = re.search(f"{begin}\n(.*?)\n{end}", text, re.DOTALL)
    assert match, f"the page has lost {begin} or {end}"
    return match[1]


def measured_of(table: str) -> dict[str, tuple[str, ...]]:
    """Return parity errors and speeds by family, from the table of a page."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    names = {family.title: name for name, family in zoo.all_presets().items()}
    return {names[row[0]]: tuple(row[-2:]) for row in rows if row[0] in names and row[-1]}


def replaced(text: str, part: str, new: str) -> str:
    """Return a page with another text between the comments of a part."""
    begin, end = PARTS[part]
    return text.replace(f"{begin}\n{written(text, part)}\n{end}", f"{begin}\n{new}\n{end}")


def families_list() -> str:
    """Return the titles of all families, and the number of their presets."""
    titles = "; ".join(family.title for family in zoo.all_presets().values())
    return f"{titles}: {len(llama_jax.presets())} presets."


if __name__ == "__main__":
    text = PAGE.read_text("utf-8")
    text = replaced(text, "families", families_table(measure()))
    text = replaced(replaced(text, "pieces", pieces_table()), "matrix", matrix())
    made_on = f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, JAX {jax.__version__}"
    PAGE.write_text(re.sub(r"(?<=Measured on ).*?(?=\.\n)", made_on, text), encoding="utf-8")
    readme = README.read_text("utf-8")
    README.write_text(replaced(readme, "families", families_list()), encoding="utf-8")
