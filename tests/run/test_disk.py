"""A disk that is full or cannot be written ends every command in a sentence, and the same command goes on later."""

import errno
import os
import signal
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_jax import compare_command
from llama_jax.__main__ import background_error, main
from llama_jax.files import disk_failure
from llama_jax.run import Run, RunConfig, open_run

TINY = Path(__file__).parent.parent / "tiny_run.py"


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the files whose names contain a text fail to be written, or to be opened for it."""

    def breaks(name: str, number: int, *, opened: bool = False) -> None:
        path_open = Path.open

        def fail(*_: Any) -> None:
            raise OSError(number, os.strerror(number))

        class File:
            def __init__(self, file: Any):
                self._file, self.write = file, fail

            def __getattr__(self, key: str) -> Any:
                return getattr(self._file, key)

            def __enter__(self) -> "File":
                return self

            def __exit__(self, *_: object) -> None:
                self._file.close()

        def broken_open(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if name not in path.name or mode.startswith("r"):
                return path_open(path, mode, *args, **kwargs)
            if opened:
                raise OSError(number, os.strerror(number), str(path))
            return File(path_open(path, mode, *args, **kwargs))

        monkeypatch.setattr(Path, "open", broken_open)

    return breaks


def files_of(directory: Path) -> list[str]:
    return sorted(str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("config.json", "tokenizer.model", "samples.txt", "train-00000", "index.json")
        ),
    ],
)
def test_a_run_on_a_full_disk_says_where_and_goes_on_when_there_is_room(
    name: str,
    breaks: Callable[..., None],
    run_config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    cache = tmp_path / "cache"
    words = ["train", str(TINY), "--data.path", run_config.data.path[0], "--run-dir", str(tmp_path / "run")]
    words += ["--data.cache-dir", str(cache), "--num-steps", "1", "--compute.preflight", "false"]
    words += [] if name == "samples.txt" else ["--logging.sample-prompts", ""]
    breaks(name, errno.ENOSPC)
    assert main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"failed: '{cache if name.startswith(('train', 'index')) else tmp_path / 'run'}")
    assert "cannot be written (No space left on device): make room there and run the same command again" in line
    assert ".partial" not in line + " ".join(files_of(tmp_path))
    monkeypatch.undo()
    assert main(words) == 0
    assert len(open_run(tmp_path / "run").metrics()) == 1


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("tokenizer train TEXTS --vocab-size 300 --output OUT", "tokenizer.model"),
        ("prepare TEXTS --tokenizer RUN/tokenizer --output OUT", "validation-00000"),
        ("convert RUN OUT --to hf", "config.json"),
    ],
)
@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EROFS, 2), (errno.EACCES, 2)])
def test_other_commands_end_in_the_same_sentence(
    command: str,
    name: str,
    number: int,
    code: int,
    breaks: Callable[..., None],
    finished_run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    breaks(name, number, opened=code == 2)
    places = {"TEXTS": finished_run.config.data.path[0], "RUN": str(finished_run.directory), "OUT": f"{tmp_path}/out"}
    for word, place in places.items():
        command = command.replace(word, place)
    assert main(command.split()) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{'failed' if code == 1 else 'error'}: '{tmp_path}/out")
    assert f"({os.strerror(number)}): " in line
    assert not [file for file in files_of(tmp_path) if name in file]


def test_a_run_directory_that_cannot_be_written_is_refused_before_anything_else(
    run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    words = ["train", str(TINY), "--data.path", "nowhere", "--run-dir", str(tmp_path / "run")]
    assert main(words) == 2
    assert capsys.readouterr().err == (
        f"error: run directory '{tmp_path}/run' cannot be written: give another --run-dir\n"
    )


def test_errors_of_libraries_are_known_by_their_text():
    assert disk_failure(RuntimeError("IoError(No space left on device (os error 28))")) == (
        "the output cannot be written (No space left on device): make room there and run the same command again",
        True,
    )
    assert disk_failure(RuntimeError("libx.so: cannot open: No such file or directory")) is None
    assert disk_failure(KeyError("x")) is None


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ENFILE, errno.EDQUOT, errno.ESTALE, errno.EPERM])
def test_the_cause_of_an_error_is_what_is_said(number: int):
    try:
        try:
            raise OSError(number, os.strerror(number), "/somewhere")
        except OSError as error:
            raise ValueError("Orbax could not") from error
    except ValueError as error:
        sentence, again = disk_failure(error) or ("", False)
    assert sentence.startswith("'/somewhere' ")
    assert f"({os.strerror(number)}): " in sentence
    assert again == (number != errno.EPERM)


def test_commands_without_jax_say_it_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def fail(_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/somewhere")

    monkeypatch.setattr(compare_command, "compare_command", fail)
    assert main(["compare", "/somewhere"]) == 1
    said = "failed: '/somewhere' cannot be read or written (Input/output error): check the disk, then run the same"
    assert capsys.readouterr().err == f"{said} command again\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Event loop is closed"), ""),
        (OSError(errno.ENOSPC, "full"), "in the background: OSError: [Errno 28] full\n"),
    ],
)
def test_errors_of_threads_are_a_line(error: Exception, said: str, capsys: pytest.CaptureFixture[str]):
    background_error(types.SimpleNamespace(exc_type=type(error), exc_value=error))
    assert capsys.readouterr().err == said


def test_an_interrupt_that_a_destructor_swallows_comes_again():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        background_error(types.SimpleNamespace(exc_type=KeyboardInterrupt, exc_value=KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            time.sleep(5)
    finally:
        signal.signal(signal.SIGINT, before)
