"""Lets transformers answer again what expected.json in each of the folders has, into answers.json; a traceback, too.

python tests/directories/ask_transformers.py FOLDER...
"""

import json
import sys
import traceback
from pathlib import Path

import torch
from make_goldens import answers


@torch.no_grad()
def main(folders: list[str]) -> None:
    torch.set_num_threads(1)
    for folder in map(Path, folders):
        asked = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
        texts = [entry["text"] for entry in asked["texts"]]
        conversations = [entry["messages"] for entry in asked["conversations"]]
        try:
            found = answers(folder, texts, conversations)
        except Exception:  # one directory's must not hide the others'
            found = {"error": traceback.format_exc()}
        (folder / "answers.json").write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
