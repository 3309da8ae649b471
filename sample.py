"""Continue texts with a trained model: `python sample.py PATH [--prompt TEXT ...]`."""

import sys

from llama_jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
