"""Let the `hf` model of lm-evaluation-harness answer requests from model directories, for the goldens and live tests.

Run where lm_eval, torch and transformers are installed:

    python tests/evaluation/ask_hf.py ANSWERS.json FOLDER...

writes, by the folder's name, what it answers to the requests below. The goldens are those of decoders in
tests/directories/goldens.
"""

import json
import sys
from pathlib import Path
from typing import Any

A, B = "the river sees a house", "Anna's letter, and then the king (at 12:30)\n\nslept."
LONG = " ".join(f"{A}. {B}" for _ in range(6))
LOGLIKELIHOOD = [
    (A, " and then"), (A, " x"), (A, " y"), (A, "."), ("", B), ("", "a"), (A + " ", "slept."), (B, "\n\nthe king"),
    (LONG, " was here"), (LONG, " x"), (LONG, " y"), (B, LONG[:80]), ("a", " can't  hear"), (B, " \u00e9 h"),
]  # fmt: skip
ROLLING = [A, B, LONG, "a"]
GENERATE = [
    (A, {"until": [], "max_gen_toks": 12}),
    (B, {"until": ["222", "ing"], "max_gen_toks": 12}),
    (A + " and", {"until": ["e", " t"], "max_gen_toks": 12}),
    (LONG, {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}),
    ("a", {"until": ["the king", "er"], "max_gen_toks": 12}),
]
CHATS = [
    [{"role": "user", "content": A}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": A}],
    [{"role": "user", "content": A}, {"role": "assistant", "content": "slept. "}, {"role": "user", "content": B}],
]
CONTINUED = [{"role": "user", "content": A}, {"role": "assistant", "content": "the king"}]


def instances(kind: Any, arguments: list) -> list:
    """Return requests as a task makes them."""
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=own if isinstance(own, tuple) else (own,), idx=i)
        for i, own in enumerate(arguments)
    ]


def answers(lm) -> dict:
    """Return what an `LM` answers to all requests."""
    return {
        "max_length": lm.max_length,
        "loglikelihood": [list(own) for own in lm.loglikelihood(instances("loglikelihood", LOGLIKELIHOOD))],
        "rolling": lm.loglikelihood_rolling(instances("loglikelihood_rolling", ROLLING)),
        "generated": lm.generate_until(instances("generate_until", GENERATE)),
    }


def chats(lm) -> list[str]:
    """Return the texts of the conversations."""
    return [lm.apply_chat_template(chat) for chat in CHATS] + [
        lm.apply_chat_template(CONTINUED, add_generation_prompt=False)
    ]


def main(output: str, folders: list[str]) -> None:
    import torch  # type: ignore[import-not-found]
    from lm_eval.models.huggingface import HFLM

    make: Any = HFLM

    torch.set_num_threads(1)
    found = {}
    for folder in map(Path, folders):
        lm = make(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
        found[folder.name] = answers(lm)
        if lm.tokenizer.chat_template:
            found[folder.name]["chats"] = chats(lm)
    Path(output).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
