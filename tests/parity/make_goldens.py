"""Makes tests/parity/goldens: tiny random checkpoints and what their original code computes from them.

Run where torch and transformers are installed (they are no dependencies of this project):

    python tests/parity/make_goldens.py               # all
    python tests/parity/make_goldens.py gpt2 bert_mlm # some; what is made of another golden needs that one

Deterministic: the same versions give the same files. Every parameter is random and not small, norms and biases too, so
that none can be forgotten unnoticed; logits have standard deviation 1.
"""

import importlib
import pkgutil
import sys

import golden_makers
import torch

# What every module of the folder makes.
NAMES = [found.name for found in pkgutil.iter_modules(golden_makers.__path__)]
MODULES = [importlib.import_module(f"golden_makers.{name}") for name in NAMES]
CASES = {name: make for module in MODULES for name, make in getattr(module, "CASES", {}).items()}


@torch.no_grad()
def main(names: list[str]) -> None:
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    if unknown := [name for name in names if name not in CASES]:
        raise SystemExit(f"no golden '{unknown[0]}': {', '.join(CASES)}")
    for name in names or CASES:
        CASES[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
