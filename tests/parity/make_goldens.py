"""Makes tests/parity/goldens: tiny random checkpoints and what their original code computes from them.

Run where torch and transformers are installed (they are no dependencies of this project):

    python tests/parity/make_goldens.py               # all
    python tests/parity/make_goldens.py gpt2 bert_mlm # some; what is made of another golden needs that one

Deterministic: the same versions give the same files. Every parameter is random and not small, norms and biases too, so
that none can be forgotten unnoticed; logits have standard deviation 1.
"""

import sys

import torch
from golden_makers import decoders, deepseek, encoder_decoders, encoders, llama

CASES = llama.CASES | decoders.CASES | encoders.CASES | encoder_decoders.CASES | deepseek.CASES


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
