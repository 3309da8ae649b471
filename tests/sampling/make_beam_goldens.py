"""Write beam_goldens.json: what transformers' beam search finds with small random models.

    python tests/sampling/make_beam_goldens.py

needs transformers 5.23 and torch, and runs in seconds on a CPU.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, __version__

HERE = Path(__file__).parent
PARITY = HERE.parent / "parity" / "goldens"

PROMPTS = [[5, 9, 33, 20, 7], [11, 30, 3]]
EOS = [2, 17, 40, 8, 23, 51, 60, 33]
# As released files have them, and as people give them: settings of the files, then arguments of generate.
FILES: dict[str, dict] = {
    "t5_v1_0": {"decoder_start_token_id": 0, "pad_token_id": 0},
    "bart": {"decoder_start_token_id": 2, "pad_token_id": 1, "forced_bos_token_id": 0, "forced_eos_token_id": 2,
             "no_repeat_ngram_size": 3, "min_length": 5},
    "marian": {"decoder_start_token_id": 63, "pad_token_id": 63, "bad_words_ids": [[63]], "forced_eos_token_id": 8},
    "llama_gqa": {"pad_token_id": 0, "repetition_penalty": 1.3},
    "gpt2": {"pad_token_id": 0, "bad_words_ids": [[7], [3, 4]]},
}  # fmt: skip
ARGUMENTS: list[dict] = [
    {"num_beams": 2, "eos": 1, "max_new_tokens": 6},
    {"num_beams": 4, "num_samples": 4, "eos": 8},
    {"num_beams": 4, "num_samples": 2, "eos": 8, "length_penalty": 2.0, "early_stopping": True},
    {"num_beams": 3, "num_samples": 3, "eos": 3, "length_penalty": 0.6, "early_stopping": "never"},
    {"num_beams": 3, "num_samples": 2, "eos": 8, "length_penalty": -1.0, "early_stopping": "never"},
    {"num_beams": 5, "num_samples": 5, "eos": 2, "length_penalty": 0.0, "early_stopping": True, "max_new_tokens": 9},
]
NEW = 12


def found(name: str, arguments: dict) -> list:
    kind = AutoModelForCausalLM if name in ("llama_gqa", "gpt2") else AutoModelForSeq2SeqLM
    options = {"max_new_tokens": NEW, **arguments}
    eos, samples = EOS[: options.pop("eos")], options.pop("num_samples", 1)
    settings = FILES[name] | {"eos_token_id": eos}
    with tempfile.TemporaryDirectory() as place:
        folder = shutil.copytree(PARITY / name, Path(place) / name)
        (folder / "generation_config.json").write_text(json.dumps(settings))
        model = kind.from_pretrained(folder)
    rows = []
    for prompt in PROMPTS:
        result = model.generate(
            torch.tensor([prompt]), do_sample=False, num_return_sequences=samples, return_dict_in_generate=True,
            output_scores=True, **options,
        )  # fmt: skip
        start = len(prompt) if kind is AutoModelForCausalLM else 1
        for sequence, beam, score in zip(result.sequences, result.beam_indices, result.sequences_scores, strict=True):
            new = int((beam >= 0).sum())
            rows.append([sequence[start : start + new].tolist(), round(float(score), 6)])
    return [name, settings, arguments, rows]


if __name__ == "__main__":
    cases = [found(name, arguments) for name in FILES for arguments in ARGUMENTS]
    lines = ",\n".join(json.dumps(case) for case in cases)
    head = f'"transformers": "{__version__}", "prompts": {PROMPTS}, "eos": {EOS}, "new": {NEW}'
    text = f'{{{head}, "cases": [\n{lines}\n]}}\n'
    (HERE / "beam_goldens.json").write_text(text)
