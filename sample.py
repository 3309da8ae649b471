"""Continue texts with a trained model: `python sample.py PATH [--prompt TEXT ...]`."""

import sys

from llama_jax.__main__ import console

if __name__ == "__main__":
    console(["sample", *sys.argv[1:]])
