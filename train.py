"""Train a config, or continue a run: `python train.py CONFIG [--key value ...] [--run-dir DIR]`."""

import sys

from llama_jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
