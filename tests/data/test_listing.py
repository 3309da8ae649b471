"""A directory, its glob and a list of its files are the same corpus."""

import glob
import os
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, strategies as st

from llama_jax.config import UserError
from llama_jax.data import DataConfig
from llama_jax.data.corpus.files import find_files
from llama_jax.data.readers import read_unit
from llama_jax.data.readers.opening import is_left_out
from llama_jax.data.readers.records import SkippedFile, Unit

TAKEN = ["a.txt", "a", "b", "sub", "z.jsonl", "a~b", "#c", "x.swp.txt"]
LEFT_OUT = [".git", ".x.txt", "a.txt~", "a.swp", "#a.txt#", "b.bak", "__pycache__", ".ipynb_checkpoints", "._a.txt"]


def found(*path: Path | str, **options) -> list[str]:
    return [file.path for file in find_files(DataConfig(path=tuple(map(str, path)), **options))]


def test_which_names_are_left_out():
    assert not any(map(is_left_out, TAKEN))
    assert all(map(is_left_out, LEFT_OUT))


@given(st.lists(st.lists(st.sampled_from(TAKEN + LEFT_OUT), min_size=1, max_size=3), min_size=1, max_size=9))
def test_directory_glob_and_list_are_one(tmp_path_factory, paths: list[list[str]]):
    top = tmp_path_factory.mktemp("tree")
    for parts in paths:
        directory = top.joinpath("top", *parts[:-1])
        if not any(p.is_file() for p in (directory, *directory.parents)) and not (directory / parts[-1]).exists():
            directory.mkdir(parents=True, exist_ok=True)
            (directory / parts[-1]).write_text("text")
    top /= "top"
    every = sorted(path for path in top.rglob("*") if path.is_file())
    kept = [p for p in every if not any(map(is_left_out, p.relative_to(top).parts))] if top.exists() else []
    if not kept:
        with pytest.raises(UserError, match="no directory with files"):
            found(top)
        return
    expected = list(map(str, kept))
    assert found(top) == found(top / "**") == found(top / "*") == found(*kept) == expected
    assert found(*every) == list(map(str, every))  # what is named is taken
    python = {Path(p) for p in glob.glob(f"{top}/**/a*", recursive=True)}
    if matched := [str(p) for p in kept if python & {p, *p.parents}]:
        assert found(top / "**" / "a*") == matched
    store = fsspec.filesystem("memory")
    try:
        store.put(f"{top}/", "/tree", recursive=True)
        remote = [f"memory:///tree{p.removeprefix(str(top))}" for p in expected]
        assert found("memory://tree") == found("memory://tree/**") == found("memory://tree/*") == remote
    finally:
        store.rm("/tree", recursive=True)


def test_a_pattern_that_names_what_is_left_out(tmp_path: Path):
    for name in (".hidden/a.txt", ".hidden/.b.txt", "c.bak", "d.txt", "sub/.e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    for pattern, names in (
        ("*", ["d.txt"]), (".*", [".hidden/a.txt"]), ("*.bak", ["c.bak"]), ("**/.*.txt", ["sub/.e.txt"]),
        (".hidden/*", [".hidden/a.txt"]), (".hidden", [".hidden/a.txt"]), (".hidden/.b.txt", [".hidden/.b.txt"]),
    ):  # fmt: skip
        assert found(tmp_path / pattern) == [str(tmp_path / name) for name in names]
    with pytest.raises(UserError, match="have to be named one by one"):
        found(tmp_path / "sub")
    assert found(tmp_path / "*", tmp_path / "c.bak", exclude=("d*",)) == [str(tmp_path / "c.bak")]


def test_links(tmp_path: Path):
    top, outside = tmp_path / "top", tmp_path / "outside"
    (top / "real" / "deep").mkdir(parents=True)
    (outside / "more").mkdir(parents=True)
    for name in ("top/real/a.txt", "top/real/deep/b.txt", "outside/more/c.txt"):
        (tmp_path / name).write_text(name)
    (top / "a-link").symlink_to(outside)
    (top / "b-link").symlink_to(outside)
    (top / "sibling").symlink_to(top / "real")
    (top / "real" / "deep" / "up").symlink_to(top)
    (outside / "back").symlink_to(top)
    (top / "file").symlink_to(outside / "more" / "c.txt")
    (top / "gone.txt").symlink_to("nowhere.txt")
    (top / "loop").symlink_to("loop")
    os.mkfifo(top / "pipe")
    names = ["a-link/more/c.txt", "file", "gone.txt", "loop", "pipe", "real/a.txt", "real/deep/b.txt"]
    files = find_files(DataConfig(path=(str(top),)))
    assert [file.path.removeprefix(f"{top}/") for file in files] == names
    assert found(top / "**") == found(top / "*") == [file.path for file in files]
    items = [item for file in files for item in read_unit(Unit(file, 0, 1), DataConfig(path=()))]
    skipped = [item for item in items if isinstance(item, SkippedFile)]
    assert skipped[0] == SkippedFile(str(top / "gone.txt"), "a link to 'nowhere.txt', which is not there")
    assert [os.path.basename(item.path) for item in skipped] == ["gone.txt", "loop", "pipe"]
    assert [item.parts[0] for item in items if item not in skipped] == [
        "outside/more/c.txt", "outside/more/c.txt", "top/real/a.txt", "top/real/deep/b.txt",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"gone.txt' is a link to 'nowhere.txt', which is not there"):
        found(top / "gone.txt")
    assert found(top / "sibling") == [str(top / "sibling" / name) for name in ("a.txt", "deep/b.txt")] + [
        str(top / "sibling" / "deep" / "up" / "a-link" / "more" / "c.txt"),
        *(str(top / "sibling" / "deep" / "up" / name) for name in ("file", "gone.txt", "loop", "pipe")),
    ]
