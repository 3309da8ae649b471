"""Names of tensors in the files of others, brought to those of a family's table: one rule for all families.

Training tools wrap models and so prefix names, a trunk is saved without the name of its own, buffers that are computed
are saved with what is trained, and experts are stored one by one or as one tensor.
"""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from llama_jax.checkpoint.formats import Cut, Item, Tensor, Tensors
from llama_jax.config import UserError
from llama_jax.zoo import Weight

# Wrappers of training tools, anywhere in a name.
_WRAPPER = re.compile(r"(?<![^.])(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Computed, not trained: tables of rotary positions, and the numbers of positions.
_COMPUTED = re.compile(r"(.*\.)?(rotary(_pos)?_emb\..*|rope\.freqs|position_ids)")
_EXPERTS = re.compile(r"(?P<place>.*\.experts)\.(?P<name>gate_up_proj|down_proj)(\.weight)?(?P<scale>_scale_inv)?")
# Ends of names that quantized weights have, and whose they are.
_QUANTIZED = {
    ".qweight": "GPTQ or AWQ", ".qzeros": "GPTQ or AWQ", ".absmax": "bitsandbytes", ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes", ".scales": "MLX",
}  # fmt: skip


def refuse_adapter(directory: Path) -> None:
    """Raise UserError where a directory has an adapter (LoRA and the like), which changes the weights beside it."""
    found = [directory / "adapter_config.json", *sorted(directory.glob("adapter_model.*"))]
    for file in found:
        if file.is_file():
            raise UserError(
                f"'{directory}' has {file.name}: adapters are not merged here, so merge it with PEFT "
                "(merge_and_unload), save the whole model and load that"
            )


def brought_to(
    path: Path, tensors: Tensors, weights: Sequence[Weight], known: Collection[str], renames: Sequence[tuple[str, str]]
) -> Tensors:
    """The tensors of `path` under the names of the table `weights`, without those that are computed.

    `known` are other names that the family's files have, as patterns; `renames` are what other releases of it call the
    same. Names that are none of these stay, to be refused by name. Raises UserError for weights that are quantized or
    of an adapter, and for two tensors of one name.
    """
    is_known = re.compile("|".join([*(_pattern(weight.source) for weight in weights), *known]))
    prefixes = dict.fromkeys(f"{weight.source.partition('.')[0]}." for weight in weights if "." in weight.source)
    found: Tensors = {}
    for old, tensor in _one_by_one(tensors).items():
        name = _WRAPPER.sub("", old)
        if "lora_" in name:
            raise UserError(f"'{path}' has '{old}' of an adapter: merge it with PEFT (merge_and_unload) first")
        for end, tool in _QUANTIZED.items():
            if name.endswith(end):
                raise UserError(
                    f"'{path}' has '{old}', of weights that {tool} quantized: take a release of these weights that is "
                    "not quantized"
                )
        if _COMPUTED.fullmatch(name):
            continue
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if not is_known.fullmatch(name):
            name = next((prefix + name for prefix in prefixes if is_known.fullmatch(prefix + name)), name)
        if name in found:
            raise UserError(f"'{path}' has '{old}' and another tensor that stands for '{name}'")
        found[name] = tensor
    return found


def _pattern(source: str) -> str:
    return re.sub(r"\\\{\w+\\\}", r"\\d+", re.escape(source))


def _one_by_one(tensors: Tensors) -> Tensors:
    """The tensors with each expert by itself where all of a layer are one: gate and up projection [E, 2F, D], down
    projection [E, D, F]."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if (match := _EXPERTS.fullmatch(name)) is None or len(tensor.shape) != 3:
            found[name] = tensor
            continue
        place, scale = match["place"], match["scale"] or ""
        for i in range(tensor.shape[0]):
            expert: Tensor = Item(tensor, i)
            parts = {"down_proj": expert}
            if match["name"] == "gate_up_proj":
                rows = expert.shape[0]
                parts = {"gate_proj": Cut(expert, 0, 0, rows // 2), "up_proj": Cut(expert, 0, rows // 2, rows)}
            found |= {f"{place}.{i}.{part}.weight{scale}": value for part, value in parts.items()}
    return found
