"""Train a config, or continue a run: `python train.py CONFIG [--key value ...] [--run-dir DIR]`."""

import os
import sys

# A step on a CPU takes and frees all its memory: let glibc take huge pages, and keep them. It is told so when a process
# starts; `benchmarks/` says what it gains.
TUNABLES = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1"
    ":glibc.malloc.trim_threshold=4611686018427387904"
}
if __name__ == "__main__" and sys.platform == "linux" and TUNABLES.keys().isdisjoint(os.environ):
    os.execve(sys.executable, sys.orig_argv, os.environ | TUNABLES)

from llama_jax.__main__ import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
