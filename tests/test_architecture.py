"""The packages are as docs/architecture.md describes them: imports in one direction, strangers, lengths, docstrings."""

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import subprocess
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import llama_jax

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llama_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
# A package (or module) imports only from those before it. A new one takes its place here.
ORDER = (
    "__version__", "installation", "stopping", "values", "config", "parser", "files", "gguf_header", "figures", "chips",
    "remote", "screen", "parallel", "tokenizers", "data", "nn", "models", "zoo", "training", "checkpoint", "sampling",
    "evaluation", "serving", "run_config", "planning", "run", "inspect", "ablation", "compare_command", "reports",
    "evaluate_command", "report_command", "verify_command", "sample_flags", "chat_terminal", "sample_command",
    "serve_command", "text_commands", "compilations", "key_help", "commands", "__main__",
)  # fmt: skip
MAX_LINES = 400


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of what a module imports, at its top or in a function; of a `from` import, with the name itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the package that they reach into"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def wrong_imports(package: str, source: str) -> list[str]:
    """Return the imports that a file of `package` must not have."""
    wrong = []
    for name in imports(ast.parse(source)):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        at_home = {"orbax": "checkpoint", "grain": "data", "torch": None}
        stranger = top in at_home and package != at_home[top]
        below = top == "llama_jax" and package != "__init__" and target not in ORDER[: ORDER.index(package) + 1]
        # From outside, names come from the package itself: only what it exports is for others.
        deep = top == "llama_jax" and target != package and rest.count(".") > 1
        if stranger or below or deep:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_only_from_packages_before(file: Path):
    package = package_of(file)
    assert package in (*ORDER, "__init__"), f"'{package}' is new: give it a place in ORDER and in docs/architecture.md"
    assert wrong_imports(package, file.read_text(encoding="utf-8")) == []


def test_wrong_imports_are_found():
    source = """
import torch.nn
import orbax.checkpoint as ocp
from llama_jax import training
from llama_jax.config import UserError
def later():
    from llama_jax.run.loop import run
    import grain.python
"""
    forbidden = ["torch.nn", "orbax.checkpoint", "llama_jax.training", "llama_jax.run.loop.run", "grain.python"]
    assert wrong_imports("models", source) == forbidden
    assert wrong_imports("checkpoint", source) == ["torch.nn", "llama_jax.run.loop.run", "grain.python"]
    assert wrong_imports("data", source) == [name for name in forbidden if name != "grain.python"]
    assert wrong_imports("__init__", "from llama_jax.run import train") == []
    deep = "from llama_jax.nn.base import Mask"
    assert wrong_imports("models", deep) == ["llama_jax.nn.base.Mask"]
    assert wrong_imports("nn", deep) == []
    assert wrong_imports("config", "import llama_jax") == ["llama_jax"]


def test_files_are_short():
    lines = {str(f.relative_to(ROOT)): len(f.read_text(encoding="utf-8").splitlines()) for f in FILES}
    assert {name: n for name, n in lines.items() if n > MAX_LINES} == {}


def test_every_module_has_a_docstring():
    silent = [str(f.relative_to(ROOT)) for f in FILES if not ast.get_docstring(ast.parse(f.read_text("utf-8")))]
    assert silent == []
    folders = {f.parent for f in FILES}
    assert [d for d in folders if not (d / "__init__.py").is_file()] == []


def undocumented(cls: type) -> list[str]:
    """Return the public methods and properties of a class that have no docstring, also none in a base class."""
    kinds = (types.FunctionType, classmethod, staticmethod, property, functools.cached_property)
    own = [name for name, value in vars(cls).items() if isinstance(value, kinds) and not name.startswith("_")]
    fields = {name for base in cls.__mro__ for name in vars(base).get("__annotations__", {})}  # described by the class
    described = {name for base in cls.__mro__ for name, value in vars(base).items() if inspect.getdoc(value)}
    names = [name for name in own if name not in fields | described]
    return [f"{cls.__module__}.{cls.__name__}.{name}" for name in names]


def test_public_methods_are_documented():
    """An override inherits the docstring of what it overrides; ruff checks functions and classes."""
    missing = []
    for found in pkgutil.walk_packages(llama_jax.__path__, "llama_jax."):
        if found.name != "llama_jax.__main__":
            module = importlib.import_module(found.name)
            classes = [value for name, value in vars(module).items() if isinstance(value, type) and name[0] != "_"]
            missing += [name for cls in classes if cls.__module__ == found.name for name in undocumented(cls)]
    assert missing == []


def test_no_path_of_anyones_machine():
    homes = re.compile("/(work|root|tmp|home|Users)" + "/")
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: the repository's own files are not known")
    assert "llama_jax/config.py" in listed
    present = [name for name in listed if (ROOT / name).is_file()]
    assert [name for name in present if homes.search((ROOT / name).read_text("utf-8", errors="replace"))] == []
