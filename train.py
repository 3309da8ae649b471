"""Train a config, or continue a run: `python train.py CONFIG [--key value ...] [--run-dir DIR]`."""

import sys

from llama_jax.__main__ import console

if __name__ == "__main__":
    console(["train", *sys.argv[1:]])
