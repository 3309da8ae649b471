"""Which files of a model or run in an object store have to be fetched, and which of its checkpoints are whole."""

import re
from collections.abc import Iterable

# Orbax writes this file into every checkpoint. It is uploaded last and removed first.
COMMIT_FILE = "_CHECKPOINT_METADATA"
_STEP_FILE = re.compile(r"checkpoints/(\d+)/(.+)")
_ARRAYS = "state/"  # what is large in a checkpoint
# What other libraries read, and what a run writes for viewers.
_UNUSED = re.compile(r".*\.(h5|msgpack|ot|onnx|onnx_data|tflite|gguf|mlmodel)$|(tensorboard|profile|wandb|samples)\b.*")

# Weights of a Hugging Face directory, and other forms of them that are not read where these are there.
_PREFERRED = re.compile(r"model(-.*)?\.safetensors")
_SAME_WEIGHTS = re.compile(r"pytorch_model.*\.bin(\.index\.json)?|consolidated\..*")


def step_of(name: str) -> int | None:
    """The checkpoint that a file of a run directory belongs to, by the file's relative name; None for other files."""
    match = _STEP_FILE.fullmatch(name)
    return int(match[1]) if match else None


def whole_steps(names: Iterable[str]) -> list[int]:
    """Steps of the checkpoints whose upload was finished, ascending."""
    steps = (step_of(name) for name in names if name.endswith(f"/{COMMIT_FILE}"))
    return sorted(step for step in steps if step is not None)


def run_files(names: Iterable[str], step: int | None = None, *, arrays: bool = True) -> list[str]:
    """Of the files of a run or a saved model those that are read: of its checkpoints `step` (None: the latest).

    Of other whole checkpoints only their metrics and what says that they are there; without `arrays`, of all.
    """
    names = list(names)
    steps = whole_steps(names)
    wanted = max(steps, default=None) if step is None else step
    found = []
    for name in names:
        own = step_of(name)
        if own is None:
            if not name.startswith("checkpoints/"):  # a checkpoint that was never finished
                found.append(name)
        elif own in steps and ((own == wanted and arrays) or not name.split("/", 2)[2].startswith(_ARRAYS)):
            found.append(name)
    return found


def model_files(names: Iterable[str], step: int | None = None) -> list[str]:
    """Of the files of a directory that `load` takes, of any kind, those that it reads; `step` as in `run_files`."""
    names = [name for name in run_files(names, step) if not _UNUSED.fullmatch(name)]
    if "config.json" in names and any(_PREFERRED.fullmatch(name) for name in names):
        names = [name for name in names if not _SAME_WEIGHTS.fullmatch(name)]
    # Of other people's directories, folders hold other forms of the same weights.
    kept = ("checkpoints/", "tokenizer/", "additional_chat_templates/")
    return [name for name in names if "/" not in name or name.startswith(kept)]
