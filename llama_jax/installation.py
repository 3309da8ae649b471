"""Check of the Python that imports the package. Older Pythons read this file: nothing newer than f-strings."""

import os
import sys
from importlib.util import find_spec


def check():
    """Raise ImportError, or end a command with one sentence, where Python is too old or nothing is installed."""
    version = ".".join(map(str, sys.version_info[:3]))
    sentence = ""
    if sys.version_info[:2] < (3, 12):  # noqa: UP036
        sentence = f"llama_jax needs Python 3.12 or newer, and this is {version} ({sys.executable}): {_suggestion()}"
    elif find_spec("lazy_loader") is None:
        sentence = missing_package("lazy_loader")
    if sentence and os.path.basename((sys.argv or [""])[0]) in ("-m", "train.py", "sample.py"):
        sys.stderr.write(f"error: {sentence}\n")
        sys.exit(2)
    if sentence:
        raise ImportError(sentence)


def missing_package(name):
    """Return the sentence for a package that this one needs and that is not installed."""
    return f"the package '{name}' is not installed for {sys.executable}: {_suggestion()}"


def _suggestion():
    """Return how to get a Python that has everything."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not os.path.isfile(os.path.join(root, "Makefile")):
        return "`pip install llama_jax` with Python 3.12 or newer"
    python = os.path.join(root, ".venv", "bin", "python")
    if os.path.isfile(python) and os.path.realpath(sys.prefix) != os.path.realpath(os.path.join(root, ".venv")):
        return f"take the checkout's {python}"
    return f"run `make install` in {root}, then take {python}"
