"""Run notebooks in full and keep them with their outputs in `.cache/notebooks`, where `make docs` finds them.

python docs/run_notebooks.py [NAME ...]
"""

import datetime
import difflib
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import nbclient
import nbformat
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
FOLDER, KEPT = ROOT / "notebooks", ROOT / ".cache" / "notebooks"


def execute(path: Path, folder: Path, *, quick: bool = False) -> nbformat.NotebookNode:
    """Run a notebook in `folder`, where its temporary files go as well, and return it with its outputs.

    `quick`: in the reduced mode of the tests. Raises nbclient's CellExecutionError where a cell fails.
    """
    notebook = nbformat.read(path, 4)
    # One device, as on a laptop, whatever this process has; a helper module is found in the notebook's folder, where
    # Jupyter starts a kernel.
    paths = [str(FOLDER), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {key: value for key, value in os.environ.items() if key != "LLAMA_JAX_QUICK"}
    env |= {"TMPDIR": str(folder), "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if quick:  # programs this small are compiled for longer than they run
        flags = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
        env |= {"LLAMA_JAX_QUICK": "1", "XLA_FLAGS": flags}
    client = nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3")
    client.extra_arguments = ["--log-level=ERROR"]  # else the kernel warns about its connection
    client.execute(env=env, cwd=str(folder))
    return notebook


def keep(path: Path) -> str:
    """Run a notebook in full and keep it with the date, the machine and its times; return these as one line."""
    with tempfile.TemporaryDirectory(prefix=f"{path.stem}_") as folder:
        begin, before = time.perf_counter(), os.times()
        notebook = execute(path, Path(folder))
        seconds, after = time.perf_counter() - begin, os.times()
    busy = sum(after[i] - before[i] for i in (2, 3))  # of children that have ended: the kernel and its own
    line = (
        f"run on {datetime.datetime.now(datetime.UTC):%Y-%m-%d} in {minutes(seconds)} ({minutes(busy)} of processor "
        f"time) on {machine()}, with JAX {version('jax')} and llama_jax {version('llama_jax')}"
    )
    notebook.metadata["llama_jax"] = line
    KEPT.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, KEPT / path.name)
    return line


def minutes(seconds: float) -> str:
    """Return a time as text: 3 min 10 s."""
    whole, rest = divmod(round(seconds), 60)
    return f"{whole} min {rest} s" if whole else f"{rest} s"


def machine() -> str:
    """Return the number of usable cores and the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{cores} core{'s' * (cores > 1)} of {names[0] if names else platform.processor() or platform.machine()}"


def main(names: list[str]) -> int:
    """Run the notebooks of these names, all where none is given; return the exit code."""
    found = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    for name in names:
        if name not in found:
            near = difflib.get_close_matches(name, found, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(found)}"
            print(f"NOTEBOOK={name} does not exist in notebooks/: {hint}", file=sys.stderr)
            return 2
    for name in names or found:
        try:
            print(f"{name}: {keep(found[name])}", flush=True)
        except CellExecutionError as error:
            print(f"{name}: a cell failed\n{error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
