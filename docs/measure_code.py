"""Measure the size of the code and write the table in architecture.md.

    python docs/measure_code.py           # write the table
    python docs/measure_code.py --check   # exit 1 where the table is not what is measured
    python docs/measure_code.py --frames  # print every file and frame that is counted

A file is on the way of a token when one of its functions runs while the corpus, the first batch and one step of a
small Llama are computed from a text file, or while the model continues a prompt. Functions that run at import do not
count. In a whole run, `train` also checks, reports and saves, and `load` reads a directory. Frames are those of the
package, from the train step to the einsum of the projection deepest below it. Complexity is ruff's C901 (McCabe).
"""

import argparse
import ast
import atexit
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from markdown_table import markdown

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llama_jax"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- code: written by docs/measure_code.py -->", "<!-- end of code -->"
NUM_LONGEST = 5

# What the numbers may be at most; tests/docs/test_measure_code.py compares.
MAX_FILES = 48
MAX_FRAMES = 12
MAX_COMPLEXITY = 15
MAX_LINES = 47_800


class Recorder:
    """Record the files of the package whose functions run, and the stack of the deepest projection's einsum.

    Shards may be made by other processes, which have the same recorder (`start_in_children`): each appends a file's
    path to `log` when it is first seen.
    """

    def __init__(self, log: Path):
        self.log = log
        self.seen: set[str] = set()
        self.frames: list[str] = []
        sys.monitoring.use_tool_id(sys.monitoring.PROFILER_ID, "measure_code")
        sys.monitoring.register_callback(sys.monitoring.PROFILER_ID, sys.monitoring.events.PY_START, self._called)

    def start(self) -> None:
        """Begin to record."""
        sys.monitoring.set_events(sys.monitoring.PROFILER_ID, sys.monitoring.events.PY_START)
        atexit.register(sys.monitoring.set_events, sys.monitoring.PROFILER_ID, sys.monitoring.events.NO_EVENTS)

    def stop(self) -> list[str]:
        """Return the files since `start`, of this process and its children, and record nothing more."""
        sys.monitoring.set_events(sys.monitoring.PROFILER_ID, sys.monitoring.events.NO_EVENTS)
        found = set(self.log.read_text("utf-8").split()) if self.log.exists() else set()
        self.log.unlink(missing_ok=True)
        self.seen.clear()
        sys.monitoring.restart_events()
        return sorted(found)

    def _called(self, code: CodeType, _offset: int) -> object:
        is_einsum = code.co_name == "einsum" and "numpy" in code.co_filename
        if not is_einsum and not code.co_filename.startswith(str(PACKAGE)):
            return sys.monitoring.DISABLE
        frames = [frame for frame in stack(sys._getframe(1)) if frame.f_code.co_filename.startswith(str(PACKAGE))]
        if is_einsum:
            self._multiplied(frames)
            return None
        if any(frame.f_code.co_name == "<module>" for frame in frames):
            return None  # at import: the next call may not be
        if code.co_filename not in self.seen:
            self.seen.add(code.co_filename)
            with self.log.open("a", encoding="utf-8") as log:
                log.write(str(Path(code.co_filename).relative_to(ROOT)) + "\n")
        return sys.monitoring.DISABLE

    def _multiplied(self, frames: list[FrameType]) -> None:
        names = [f"{Path(f.f_code.co_filename).relative_to(ROOT)}:{f.f_code.co_qualname}" for f in frames]
        top = max((i for i, frame in enumerate(frames) if frame.f_code.co_name == "train_step"), default=-1)
        if any(name.endswith("Projection.__call__") for name in names) and top + 1 > len(self.frames):
            self.frames = names[top::-1]


def stack(frame: FrameType | None) -> Iterator[FrameType]:
    """Iterate over a frame and its callers, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def start_in_children(folder: Path, log: Path) -> None:
    """Let every Python process that this one starts record into `log` as well."""
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'docs')!r})\n"
        "from pathlib import Path\nfrom measure_code import Recorder\n"
        f"Recorder(Path({str(log)!r})).start()\n"
    )
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def record_run(folder: Path) -> dict[str, list[str]]:
    """Train one step and sample; return the files of each stage, and the frames."""
    import jax

    import llama_jax
    from llama_jax.tokenizers import train_tokenizer
    from llama_jax.training import init_state, make_train_step

    text = "\n".join(f"Line {i}: the quick brown fox jumps over the lazy dog, while others watch." for i in range(500))
    (folder / "text.txt").write_text(text)
    tokenizer = train_tokenizer([text], vocab_size=300).save(folder / "tokenizer")
    config = llama_jax.load_config(
        "tiny_python",
        {
            "num_steps": 1, "global_batch_size": 2, "sequence_length": 16, "data.path": str(folder / "text.txt"),
            "data.exclude": (), "data.cache_dir": str(folder / "cache"), "data.validation_fraction": 0.0,
            "tokenizer.path": str(tokenizer), "model.hidden_size": 16, "model.num_layers": 2,
            "logging.sample_prompts": (),
        },
    )  # fmt: skip
    recorder = Recorder(folder / "log")
    start_in_children(folder, folder / "log")
    found = {}

    recorder.start()
    run = llama_jax.train(config, folder / "run")
    found["train"] = recorder.stop()

    recorder.start()
    lm = llama_jax.load(run.directory)
    llama_jax.generate_text(lm, ["the"], max_new_tokens=2, temperature=0.8, seed=0)
    found["load_and_sample"] = recorder.stop()

    # Once more without everything around it: nothing is tokenized, traced or loaded yet, or already.
    shutil.rmtree(folder / "cache")
    jax.clear_caches()
    run = llama_jax.open_run(folder / "run")
    assert run.tokenizer is not None
    hyper = config.optimizer.hyper(config.num_steps)
    state = init_state(llama_jax.build(config.model).params(), hyper)
    recorder.start()
    make_train_step(config.model, config.compute)(state, run.batch(0), hyper)
    found["to_loss"] = recorder.stop()

    recorder.start()
    llama_jax.generate_text(lm, ["the"], max_new_tokens=2, temperature=0.8, seed=0)
    found["to_token"] = recorder.stop()
    return found | {"frames": recorder.frames}


def recorded() -> dict[str, list[str]]:
    """`record_run` in a process of its own: what this one has compiled would not be traced again."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
        program = [sys.executable, __file__, "--record", folder]
        found = subprocess.run(program, env=os.environ | environment, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(found.stderr)
    return json.loads(found.stdout.splitlines()[-1])


def lines_by_package() -> Counter[str]:
    """Lines of all .py files, by package (or module) directly below llama_jax/."""
    counts: Counter[str] = Counter()
    for file in sorted(PACKAGE.rglob("*.py")):
        part = file.relative_to(PACKAGE).parts
        counts[part[0] + "/" if len(part) > 1 else part[0]] += len(file.read_text("utf-8").splitlines())
    return counts


def functions() -> dict[tuple[str, int], tuple[str, int]]:
    """Return (file: qualified name, lines) of all functions by their file and first line."""
    found: dict[tuple[str, int], tuple[str, int]] = {}

    def collect(node: ast.AST, file: str, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                collect(child, file, prefix)
                continue
            if not isinstance(child, ast.ClassDef):
                assert child.end_lineno is not None
                found[file, child.lineno] = (f"{file}: {prefix}{child.name}", child.end_lineno - child.lineno + 1)
            collect(child, file, f"{prefix}{child.name}.")

    for file in sorted(PACKAGE.rglob("*.py")):
        collect(ast.parse(file.read_text("utf-8")), str(file.relative_to(PACKAGE)), "")
    return found


def largest_first(numbers: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    return sorted(numbers, key=lambda pair: (-pair[1], pair[0]))


def complexities(names: dict[tuple[str, int], tuple[str, int]]) -> list[tuple[str, int]]:
    """Return (name, complexity) of the functions that branch more than twice."""
    command = [
        str(Path(sys.executable).with_name("ruff")), "check", "--isolated", "--select", "C901", "--exit-zero",
        "--config", "lint.mccabe.max-complexity=3", "--output-format", "json", str(PACKAGE),
    ]  # fmt: skip
    messages = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found = []
    for message in messages:
        match = re.fullmatch(r"`.+` is too complex \((\d+) > 3\)", message["message"])
        assert match is not None, message
        place = (str(Path(message["filename"]).relative_to(PACKAGE)), message["location"]["row"])
        found.append((names[place][0], int(match[1])))
    return found


def measure() -> dict[str, Any]:
    """All measures; `files` and `frames` are lists of names."""
    names = functions()
    return recorded() | {
        "lines": lines_by_package(),
        "longest": largest_first(names.values()),
        "most_complex": largest_first(complexities(names)),
    }


def tables(measures: dict[str, Any]) -> str:
    """Return the measures as the page shows them."""
    passed = [
        ("files on the way from text to loss", len(measures["to_loss"]), MAX_FILES),
        ("files on the way from prompt to token", len(measures["to_token"]), MAX_FILES),
        ("frames from the train step to a projection's einsum", len(measures["frames"]), MAX_FRAMES),
        ("highest complexity of a function", measures["most_complex"][0][1], MAX_COMPLEXITY),
        ("lines of the package", f"{measures['lines'].total():,}", f"{MAX_LINES:,}"),
        ("files in a whole run of one step: `train`", len(measures["train"]), ""),
        ("files in `load` and `generate_text`", len(measures["load_and_sample"]), ""),
    ]
    lines = [(f"`{name}`", f"{count:,}") for name, count in measures["lines"].items()]
    longest = [(f"`{name}`", count) for name, count in measures["longest"][:NUM_LONGEST]]
    complex_ = [(f"`{name}`", count) for name, count in measures["most_complex"][:NUM_LONGEST]]
    total = ("all", f"{measures['lines'].total():,}")
    return "\n\n".join(
        [
            markdown("what a reader meets|number>|at most>", passed),
            markdown("package|lines>", [*lines, total]),
            markdown("longest functions|lines>", longest),
            markdown("most complex functions|complexity>", complex_),
        ]
    )


def written(measures: dict[str, Any]) -> str:
    """Return the page with the tables of these measures."""
    text = PAGE.read_text("utf-8")
    block = f"{BEGIN}\n{tables(measures)}\n{END}"
    text, count = re.subn(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: block, text, flags=re.DOTALL)
    assert count == 1, f"{PAGE.name} has lost the marks of its table"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the table is out of date")
    parser.add_argument("--frames", action="store_true", help="print the files and frames instead")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.record:
        print(json.dumps(record_run(args.record)))
        return 0
    measures = measure()
    if args.frames:
        for name in ("train", "load_and_sample", "to_loss", "to_token", "frames"):
            print(f"{name}: {len(measures[name])}", *measures[name], sep="\n  ")
        return 0
    page = written(measures)
    if args.check:
        return int(page != PAGE.read_text("utf-8"))
    PAGE.write_text(page, encoding="utf-8")
    print(tables(measures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
