"""Makes tests/directories/goldens: whole directories of tiny models, and what transformers makes of each.

Run where torch, transformers, tokenizers and sentencepiece are installed (transformers is no dependency of this
project):

    python tests/directories/make_goldens.py             # all
    python tests/directories/make_goldens.py llama2 bart # some

Deterministic: the same versions give the same files. `expected.json` beside the weights has, for several texts, the
prompt's ids, the greedy ids, text and stop; for conversations, the rendered text too. The weights are of the first seed
whose greedy tokens are clear (the best is MARGIN above the second) and of which some texts end by a stop and some at
the length.
"""

import importlib
import json
import pkgutil
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))

import directory_makers
from directory_makers.cases import Case, model_class
from directory_makers.tokenizer_files import write
from golden_makers.common import randomize

# What every module of the folder makes.
NAMES = [found.name for found in pkgutil.iter_modules(directory_makers.__path__)]
MODULES = [importlib.import_module(f"directory_makers.{name}") for name in NAMES]
CASES = {name: make for module in MODULES for name, make in getattr(module, "CASES", {}).items()}
GOLDENS = Path(__file__).parent / "goldens"
NEW_TOKENS, MARGIN = 12, 0.02


def stop_ids(tokenizer: Any, names: tuple[str, ...]) -> list[int]:
    ids = tokenizer.convert_tokens_to_ids(list(names))
    assert tokenizer.convert_ids_to_tokens(ids) == list(names)
    return ids


def build(case: Case, tokenizer: Any) -> Any:
    kind = model_class(case)
    config = {"vocab_size": len(tokenizer) - case.missing_rows + case.extra_rows} | case.config(tokenizer)
    stops = stop_ids(tokenizer, case.stops)
    if case.config_stops is not None:
        ids = stop_ids(tokenizer, case.config_stops)
        config["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    elif case.stops and not kind.config_class().is_encoder_decoder:
        config["eos_token_id"] = stops[0]
    model = kind(kind.config_class(**config)).float().eval()
    if case.stops:
        model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
        model.generation_config.update(**(case.generation or {}))
        if case.generation is None:
            model.generation_config.eos_token_id = model.config.eos_token_id
    return model


def writable(tokenizer: Any, vocab_size: int) -> torch.Tensor:
    """True at ids that are plain text, [V]: no byte, no other script, no name of a special token."""
    found = torch.zeros(vocab_size, dtype=torch.bool)
    for i in range(min(vocab_size, len(tokenizer))):
        text = tokenizer.decode([i])
        found[i] = i not in tokenizer.all_special_ids and text.strip().isascii() and text.strip().isalnum()
        found[i] &= not tokenizer.convert_ids_to_tokens(i).startswith("<")
    return found


def draw(model: Any, seed: int, tokenizer: Any, stops: list[int]) -> None:
    """Random weights that write plain text and the stops."""
    randomize(model, seed, gain=1.3)
    head, size = model.get_output_embeddings().weight, model.config.vocab_size
    allowed = writable(tokenizer, size)
    allowed[stops] = True
    head.data[~allowed] *= 0.1
    head.data[stops] *= 1.2
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias *= 0.2 * allowed
        for name, parameter in model.model.decoder.named_parameters():
            if name.endswith("bias"):
                parameter.data *= 0.2
            if "q_proj" in name:  # sharp, so that the next token is not always the same
                parameter.data *= 6.0
        for (word,) in model.generation_config.bad_words_ids or []:
            model.final_logits_bias[0, word] = 5.0  # what is forbidden would come at every place


def generate(model: Any, ids: list[int]) -> tuple[list[int], float]:
    """The new ids, without the decoder's start token, and the smallest distance of the best from the second."""
    found = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        do_sample=False,
        num_beams=1,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_scores=True,
    )
    new = found.sequences[0, 1 if model.config.is_encoder_decoder else len(ids) :].tolist()
    best = [score[0].topk(2).values for score in found.scores]
    return new, min(float(a - b) for a, b in best)


def prompts(case: Case, tokenizer: Any) -> list[list[int]]:
    chats = [tokenizer.apply_chat_template(list(c), add_generation_prompt=True) for c in case.conversations]
    return [tokenizer(text).input_ids for text in case.texts] + [chat["input_ids"] for chat in chats]


def clear(model: Any, encoded: list[list[int]], stops: list[int], wanted: int, variety: int) -> bool:
    """Whether every continuation is clear and varied, and `wanted` stops end some, and none others."""
    ends, margins = [], []
    for ids in encoded:
        new, margin = generate(model, ids)
        if margin < MARGIN or len(set(new)) < min(variety, len(new)):
            return False
        margins.append(margin)
        ends.append(new[-1] if new[-1] in stops and 2 < len(new) < NEW_TOKENS else None)
    return len({*ends} - {None}) >= wanted and None in ends


def load(folder: Path) -> tuple[Any, Any]:
    config = AutoConfig.from_pretrained(folder)
    kind = AutoModelForMaskedLM if config.architectures[0].endswith("MaskedLM") else AutoModelForCausalLM
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else kind
    options = {"attn_implementation": "eager", "experts_implementation": "eager", "output_loading_info": True}
    model, info = kind.from_pretrained(folder, **options)
    assert not any(info.values()), info
    return model.float().eval(), AutoTokenizer.from_pretrained(folder)


def answer(model: Any, tokenizer: Any, ids: list[int]) -> dict[str, Any]:
    new, _ = generate(model, ids)
    stops = eos_ids(model)
    if model.config.is_encoder_decoder:
        text = tokenizer.decode(new, skip_special_tokens=True)
    else:
        before = tokenizer.decode(ids, skip_special_tokens=True)
        text = tokenizer.decode(ids + new, skip_special_tokens=True)
        assert text.startswith(before)
        text = text[len(before) :]
    return {"greedy_ids": new, "greedy_text": text, "stopped_by": new[-1] if new[-1] in stops else None}


def eos_ids(model: Any) -> list[int]:
    found = model.generation_config.eos_token_id
    return [found] if isinstance(found, int) else found or []


def by_file(folder: Path, text: str, affixes: bool) -> list[int]:
    """The ids by tokenizer.json alone."""
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=affixes).ids


def answers(folder: Path, texts: Sequence[str], conversations: Sequence[Sequence[dict[str, str]]]) -> dict[str, Any]:
    """What the original code makes of a directory: ids, and greedy text and stop or an encoder's logits."""
    model, tokenizer = load(folder)
    found: dict[str, Any] = {"texts": [], "conversations": []}
    if model.can_generate():
        found |= {"eos_ids": eos_ids(model), "max_new_tokens": NEW_TOKENS}
    for text in texts:
        ids = tokenizer(text).input_ids
        entry = {"text": text, "ids": ids}
        if model.can_generate():
            entry |= answer(model, tokenizer, ids)
        else:
            logits = model(torch.tensor([ids])).logits[0]
            entry |= {"best_ids": logits.argmax(-1).tolist(), "first_logits": [round(x, 5) for x in logits[0].tolist()]}
        found["texts"].append(entry)
    for conversation in conversations:
        messages = list(conversation)
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        entry = {"messages": messages, "rendered": rendered, "ids": ids} | answer(model, tokenizer, ids)
        found["conversations"].append(entry)
    return found


def check_files(folder: Path, found: dict[str, Any]) -> None:
    """Texts are whole; tokenizer.json, where there is one, says the same of the prompts as transformers."""
    assert not [entry for entry in found["texts"] + found["conversations"] if "�" in entry.get("greedy_text", "")]
    if (folder / "tokenizer.json").exists():
        for entry in found["texts"]:
            assert entry["ids"] == by_file(folder, entry["text"], True), entry
        for entry in found["conversations"]:
            assert entry["ids"] == by_file(folder, entry["rendered"], False), entry


def as_text(value: dict[str, Any]) -> str:
    """JSON with one line for every list of numbers."""
    lists: dict[str, str] = {}

    def short(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: short(v) for key, v in item.items()}
        if isinstance(item, list) and item and all(isinstance(x, int | float) for x in item):
            lists[f"@{len(lists)}@"] = json.dumps(item)
            return f"@{len(lists) - 1}@"
        return [short(x) for x in item] if isinstance(item, list) else item

    text = json.dumps(short(value), indent=1, ensure_ascii=False) + "\n"
    for key, line in lists.items():
        text = text.replace(f'"{key}"', line)
    return text


@torch.no_grad()
def make(name: str) -> None:
    case = CASES[name]()
    with tempfile.TemporaryDirectory() as place:
        raw, folder = Path(place) / "raw", Path(place) / name
        write(raw, case.files)
        (raw / "config.json").write_text(json.dumps({"model_type": model_class(case).config_class.model_type}))
        tokenizer = AutoTokenizer.from_pretrained(raw)
        model = build(case, tokenizer)
        stops = stop_ids(tokenizer, case.stops)
        encoded = prompts(case, tokenizer)
        wanted = min(2 if case.conversations else 1, len(stops))
        for seed in range(3000):
            draw(model, seed, tokenizer, stops)
            if not stops or clear(model, encoded, stops, wanted, case.variety):
                break
        else:
            raise SystemExit(f"{name}: no seed gives clear continuations")
        model.save_pretrained(folder)
        if case.generation is None:
            (folder / "generation_config.json").unlink(missing_ok=True)
        if case.saved:
            tokenizer.save_pretrained(folder)
        else:
            write(folder, case.files)
        found = answers(folder, case.texts, case.conversations)
        check_files(folder, found)
        (folder / "expected.json").write_text(as_text(found))
        shutil.rmtree(GOLDENS / name, ignore_errors=True)
        shutil.copytree(folder, GOLDENS / name)
    size = sum(path.stat().st_size for path in (GOLDENS / name).rglob("*") if path.is_file())
    print(f"{name}: seed {seed}, {size // 1000} kB", flush=True)


def main(names: list[str]) -> None:
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    if unknown := [name for name in names if name not in CASES]:
        raise SystemExit(f"no golden '{unknown[0]}': {', '.join(CASES)}")
    for name in names or CASES:
        make(name)


if __name__ == "__main__":
    main(sys.argv[1:])
