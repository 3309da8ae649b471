"""`prepare` and `convert` on a disk that is full, read-only, lost or forbidden in mid-work.

The command ends in one sentence, what is on the disk is as it was, nothing half-made is left, and the same command
works when it can.
"""

import ctypes
import errno
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_jax.__main__ import main
from llama_jax.data.corpus import shards
from llama_jax.run import Run

COMMANDS = {
    "prepare": "prepare TEXTS --tokenizer RUN/tokenizer --output PLACE/new --validation-fraction 0.3 --num-workers 1",
    "convert to hf": "convert RUN PLACE/new --to hf",
    "convert to native": "convert PLACE/old PLACE/new --to native",
}
NO_ROOM = "(No space left on device): make room there and run the same command again"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB; skips where none may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture(scope="module")
def exported(finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "old"
    assert main(["convert", str(finished_run.directory), str(folder), "--to", "hf"]) == 0
    return folder


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


class Work:
    """A command that writes `new` on a disk that has `old`, an export of a run."""

    def __init__(self, command: str, place: Path, run: Run, texts: Path, old: Path, capsys: Any):
        shutil.copytree(old, place / "old")
        places = {"TEXTS": texts, "RUN": run.directory, "PLACE": place}
        words = COMMANDS[command].split()
        self.words = [next((w.replace(k, str(v)) for k, v in places.items() if k in w), w) for w in words]
        self.place, self.capsys, self.old = place, capsys, files_of(place / "old")
        self.new = place / "new"

    def fails(self, code: int, said: str, *, removes: bool = True) -> bool:
        """Return whether it ends in a sentence with `said`, and leaves what is promised (`removes`: it may remove)."""
        self.capsys.readouterr()
        found = main(self.words)
        lines = self.capsys.readouterr().err.splitlines()
        lines = [line for line in lines if not line.startswith(("tokenizing", "warning: the checkpoint of step 0"))]
        whole = {name for name in files_of(self.place) if not name.startswith(("old/", "filler"))}
        # Shards that are whole are kept, and the locks of the directory.
        left = {name for name in whole if not name.startswith("new/") and not name.endswith(".lock")}
        left |= {name for name in whole if "partial" in name and removes}
        left |= {name for name in whole if self.words[0] == "convert"}
        good = found == code and len(lines) == 1 and said in lines[0] and "partial" not in lines[0] and not left
        assert good, (found, lines, left)
        assert files_of(self.place / "old") == self.old
        return good

    def works(self) -> dict[str, bytes]:
        assert main(self.words) == 0
        assert main(["verify", str(self.new)]) == 0
        assert not [*self.new.rglob("*partial*")]
        return files_of(self.new)


@pytest.fixture
def work(
    finished_run: Run,
    tmp_path: Path,
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Work]:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(8):
        (texts / f"{number}.txt").write_text(f"the cat sat on mat {number} and ran\n" * 300)
    monkeypatch.setattr(shards, "BATCH_CHARS", 20_000)
    return lambda command, place: Work(command, place, finished_run, texts, exported, capsys)


def fill(disk: Path, free: int) -> Path:
    """Leave so many bytes of a disk."""
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - free))
    return filler


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk(command: str, work: Callable[..., Work], disk: Path, tmp_path: Path, tally: Any, num_trials: Any):
    (tmp_path / "roomy").mkdir()
    expected = work(command, tmp_path / "roomy").works()
    size, made = sum(map(len, expected.values())), work(command, disk)
    held, trials = 0, num_trials(2, 20)
    for number in range(trials):
        filler = fill(disk, int(size * (number + 0.5) / trials * 0.9))
        held += made.fails(1, NO_ROOM)
        filler.unlink()
        if number % 2 == 0:  # of others, what is kept is used
            shutil.rmtree(made.new, ignore_errors=True)
    again = made.works()
    held -= command == "prepare" and again != expected
    tally(f"a disk that is full in mid-{command}", "one sentence; it works when there is room", tried=trials, held=held)


@pytest.mark.parametrize("command", ["prepare", "convert to hf", "convert to native"])
def test_a_disk_that_is_read_only(command: str, work: Callable[..., Work], disk: Path, tally: Any):
    made = work(command, disk)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    held = made.fails(2, "(Read-only file system): ")
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    held += bool(made.works())
    tally(f"a read-only disk: {command}", "one sentence; it works when it can be written", tried=2, held=held)


@pytest.fixture
def as_owner() -> Iterator[Callable[[bool], None]]:
    """Take root's right to pass over permissions from this thread, and give it back."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, before = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0

    def take(on: bool) -> None:
        sets = (ctypes.c_uint32 * 6)(*before)
        sets[0] &= ~(0b111 if on else 0)  # CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH of the effective ones
        assert libc.capset(header, sets) == 0

    yield take
    take(False)


def at_flush(monkeypatch: pytest.MonkeyPatch, number: int, then: Callable[[], object]) -> None:
    """Do something when `prepare` writes for the nth time."""
    calls, original = itertools.count(), shards._SplitWriter.flush

    def flush(self: Any) -> None:
        if next(calls) == number:
            then()
        original(self)

    monkeypatch.setattr(shards._SplitWriter, "flush", flush)


@pytest.mark.parametrize("number", [0, 3])
def test_permission_lost_in_mid_prepare(
    number: int, work: Callable[..., Work], tmp_path: Path, as_owner: Any, monkeypatch: pytest.MonkeyPatch, tally: Any
):
    (tmp_path / "place").mkdir()
    made = work("prepare", tmp_path / "place")
    as_owner(True)
    with monkeypatch.context() as patch:
        at_flush(patch, number, lambda: made.new.chmod(0o500))
        held = made.fails(2, "(Permission denied): change its permissions or give another place", removes=False)
    if made.new.exists():  # else it was empty, and is removed
        made.new.chmod(0o700)
    held += bool(made.works())
    tally("permission lost in mid-prepare", "one sentence; it works when it is back", tried=2, held=held)


@pytest.mark.parametrize("number", [0, 3])
def test_a_directory_removed_in_mid_prepare(
    number: int, work: Callable[..., Work], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Any
):
    (tmp_path / "place").mkdir()
    made = work("prepare", tmp_path / "place")
    with monkeypatch.context() as patch:
        at_flush(patch, number, lambda: shutil.rmtree(made.new))
        held = made.fails(2, "is not there (No such file or directory): bring it back, or give another place")
    held += bool(made.works())
    tally("the directory removed in mid-prepare", "one sentence; it works again", tried=2, held=held)


@pytest.mark.parametrize("command", ["prepare", "convert to hf", "convert to native"])
def test_a_quota(command: str, work: Callable[..., Work], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Any):
    """Simulated where a file gets its name: the system's own would need another user."""
    (tmp_path / "place").mkdir()
    made = work(command, tmp_path / "place")
    held, trials, replace = 0, 3, Path.replace
    for number in range(trials):
        with monkeypatch.context() as patch:
            calls = itertools.count()

            def refused(path: Path, target: Path, original: Any = replace) -> Any:
                if next(calls) == number:  # noqa: B023
                    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
                return original(path, target)

            patch.setattr(Path, "replace", refused)
            held += made.fails(1, "(Disk quota exceeded): make room there and run the same command again")
    held += bool(made.works())
    tally(f"a quota in mid-{command}", "one sentence; it works when there is room", tried=trials + 1, held=held)
