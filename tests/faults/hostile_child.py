"""The process that reads hostile inputs: `hostile_child.py LOG FIRST [COUNT]`, a line in LOG before and after each.

With a COUNT they are that many changed files for each reader, else the table of files that were made to harm.

It may be killed by an input: the test starts another behind it.
"""

import contextlib
import itertools
import json
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

SECONDS = 30  # until the process is killed
MEMORY = 12 << 30  # bytes of address space beyond those of the imports


def memory(kind: str) -> int:
    """Return the bytes that this process has in memory ("RSS"), or has had at most since they were reset ("HWM")."""
    return int(Path("/proc/self/status").read_text().split(f"Vm{kind}:")[1].split()[0]) * 1024


def guard() -> None:
    """Limit the memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def note(log: IO[str], **values: Any) -> None:
    log.write(json.dumps(values) + "\n")
    log.flush()


def main(log_file: str, first: int, count: int) -> None:
    import hostile_fuzz
    import hostile_texts

    from llama_jax.config import UserError

    with tempfile.TemporaryDirectory() as folder:
        cases = list(hostile_fuzz.cases(Path(folder), count)) if count else hostile_texts.cases()
    guard()
    with open(log_file, "a") as log:
        for number, case in itertools.islice(enumerate(cases), first, None):
            with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
                path = case.make(Path(folder))
                files = path.rglob("*") if path.is_dir() else [path]
                size = sum(file.stat().st_size for file in files)
                Path("/proc/self/clear_refs").write_text("5")
                before, began = memory("RSS"), time.process_time()
                note(log, number=number)
                signal.alarm(SECONDS)
                try:
                    case.enter(path)
                    outcome = "read"
                except UserError as error:
                    outcome = f"refused: {str(error)[:300]}"
                except BaseException as error:  # Rust's panics too
                    outcome = f"{type(error).__name__}: {str(error)[:300]}"
                signal.alarm(0)
                seconds, grown = time.process_time() - began, memory("HWM") - before
                canary = (Path(folder) / "canary").exists()
                note(log, number=number, outcome=outcome, size=size, seconds=seconds, grown=grown, canary=canary)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int((*sys.argv, 0)[3]))
