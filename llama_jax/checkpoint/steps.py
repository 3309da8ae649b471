"""Checkpoints of a run by the names of their files: which are whole, which files are read, which are damaged.

Of a run in an object store, the names show which checkpoints are whole, and which files have to be fetched.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from llama_jax.checkpoint.manifest import MANIFEST_FILE, check_manifest
from llama_jax.config import UserError

CHECKPOINTS_DIRECTORY = "checkpoints"
DAMAGED_DIRECTORY = "damaged"  # of checkpoints that a run was not continued from
# Orbax writes this file into every checkpoint. It is uploaded last and removed first, so it marks a whole one.
COMMIT_FILE = "_CHECKPOINT_METADATA"
_STEP_FILE = re.compile(r"checkpoints/(\d+)/(.+)")
_ARRAYS = "state/"  # the large files of a checkpoint
# Files for other libraries, and those that a run writes for viewers.
_UNUSED = re.compile(r".*\.(h5|msgpack|ot|onnx|onnx_data|tflite|gguf|mlmodel)$|(tensorboard|profile|wandb|samples)\b.*")
# Weights of a Hugging Face directory, and other forms of them that are not read where the first are there.
_PREFERRED = re.compile(r"model(-.*)?\.safetensors")
_SAME_WEIGHTS = re.compile(r"pytorch_model.*\.bin(\.index\.json)?|consolidated\..*")


def step_of(name: str) -> int | None:
    """Return the step of the checkpoint that a file of a run directory belongs to, None for other files.

    `name` is relative to the directory.
    """
    match = _STEP_FILE.fullmatch(name)
    return int(match[1]) if match else None


def whole_steps(names: Iterable[str]) -> list[int]:
    """Return the steps of the checkpoints whose upload was finished, ascending."""
    steps = (step_of(name) for name in names if name.endswith(f"/{COMMIT_FILE}"))
    return sorted(step for step in steps if step is not None)


def committed_steps(directory: Path) -> list[int]:
    """Return the steps with a checkpoint in the local directory of a run by their files' names, ascending.

    A process may do so alone; a `CheckpointStore` all processes open together. Raises UserError where the directory
    cannot be read.
    """
    return saved_steps(directory / CHECKPOINTS_DIRECTORY)


def saved_steps(directory: Path) -> list[int]:
    """Return the steps of the checkpoints in a directory, ascending. Raises UserError where it cannot be read."""
    steps = []
    with reading(directory):
        for place in directory.iterdir() if directory.is_dir() else ():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # removed meanwhile; a file of the user's
                # A checkpoint that has lost one of the two is damaged, not absent.
                if place.name.isdigit() and not {COMMIT_FILE, MANIFEST_FILE}.isdisjoint(os.listdir(place)):
                    steps.append(int(place.name))
    return sorted(steps)


@contextlib.contextmanager
def reading(place: Path) -> Iterator[None]:
    """Raise a UserError where the operating system keeps a checkpoint from being read: that is not damage."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"'{error.filename or place}' cannot be read ({error.strerror or error}): check its permissions and its "
            "disk, and run the same command again"
        ) from error


def damage(directory: Path, step: int | None = None) -> str | None:
    """Return a clause about what is wrong with a directory, as `check_manifest`; None where it has no manifest, too.

    Raises UserError where it cannot be read.
    """
    with reading(directory):
        problems = check_manifest(directory, step)
    if not problems:
        return None
    more = f" and {len(problems) - 1} more" if problems[1:] else ""
    return f"'{directory}' is damaged ({problems[0]}{more})"


def newest_good(directory: Path) -> tuple[int, list[str]]:
    """Return (step of the newest checkpoint of a run that is not damaged, 0 without any; lines for the log).

    Damaged ones after it are moved to the run's directory `damaged`. Raises UserError, and moves nothing, where all are
    damaged, and where one cannot be read.
    """
    damaged: dict[Path, str] = {}
    for step in reversed(committed_steps(directory)):
        checkpoint = directory / CHECKPOINTS_DIRECTORY / str(step)
        if (problem := damage(checkpoint, step)) is None:
            break
        damaged[checkpoint] = problem
    else:
        if damaged:
            first = next(iter(damaged.values()))
            raise UserError(f"checkpoint {first}, and no other is good: put a copy back, or give another --run-dir")
        return 0, []
    lines = []
    for checkpoint, problem in damaged.items():
        place = directory / DAMAGED_DIRECTORY / checkpoint.name
        place.parent.mkdir(exist_ok=True)
        while place.exists():  # the same step was damaged before
            place = place.with_name(f"{place.name}-again")
        checkpoint.rename(place)
        lines.append(f"checkpoint {problem}: moved to '{place}', the run continues from step {step}")
    return step, lines


def run_files(names: Iterable[str], step: int | None = None, *, arrays: bool = True) -> list[str]:
    """Return those files of a run or a saved model that are read, of its checkpoints `step` (None: the latest).

    Of other whole checkpoints they are all but the arrays; without `arrays`, of every checkpoint.
    """
    names = list(names)
    steps = whole_steps(names)
    wanted = max(steps, default=None) if step is None else step
    found = []
    for name in names:
        own = step_of(name)
        if own is None:
            # Neither a checkpoint that was never finished, nor one that was set aside.
            if not name.startswith((f"{CHECKPOINTS_DIRECTORY}/", f"{DAMAGED_DIRECTORY}/")):
                found.append(name)
        elif own in steps and ((own == wanted and arrays) or not name.split("/", 2)[2].startswith(_ARRAYS)):
            found.append(name)
    return found


def model_files(names: Iterable[str], step: int | None = None) -> list[str]:
    """Return those files of a directory, of any kind, that `load` reads; `step` as in `run_files`."""
    found = run_files(names, step)
    names = [name for name in found if not _UNUSED.fullmatch(name)]
    models = [name for name in found if name.endswith(".gguf") and "/" not in name]
    if len(models) == 1 and not any(_PREFERRED.fullmatch(n) or _SAME_WEIGHTS.fullmatch(n) for n in names):
        names += models
    if "config.json" in names and any(_PREFERRED.fullmatch(name) for name in names):
        names = [name for name in names if not _SAME_WEIGHTS.fullmatch(name)]
    # In released directories, folders hold other forms of the same weights.
    kept = ("checkpoints/", "tokenizer/", "additional_chat_templates/")
    return [name for name in names if "/" not in name or name.startswith(kept)]
