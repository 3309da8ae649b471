"""Hook of mkdocs: the pages of the site, at their paths in the repository, and the pages of the API.

Every file that pages link to is on the site under the path that it has in the repository, so a relative link works on
GitHub and on the site. A page of the API has what the package exports.
"""

import ast
import fnmatch
import re
import subprocess
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from notebook_page import link_pages, notebook_page

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = (
    "*.md", "LICENSE", "configs/*.py", "docs/*.css", "docs/*.json", "docs/*.png", "docs/*.sbatch", "docs/*.sh",
    "docs/*.yaml", "examples/*.py", "notebooks/*.ipynb", "tests/test_extensions.py",
)  # fmt: skip
# In the order of a run. `llama_jax` itself is first.
PACKAGES = (
    "llama_jax", "llama_jax.config", "llama_jax.run_config", "llama_jax.models", "llama_jax.nn", "llama_jax.zoo",
    "llama_jax.tokenizers", "llama_jax.data", "llama_jax.training", "llama_jax.run", "llama_jax.checkpoint",
    "llama_jax.sampling", "llama_jax.planning", "llama_jax.inspect", "llama_jax.parallel",
)  # fmt: skip


# In the order of their table.
NOTEBOOKS = re.findall(r"\((\w+)\.ipynb\)", (ROOT / "notebooks" / "README.md").read_text("utf-8"))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of notebooks and of the API into the navigation."""
    assert config.nav is not None
    for entry in config.nav:
        if "API" in entry:
            entry["API"] = [{package: f"api/{package}.md"} for package in PACKAGES]
        if "Notebooks" in entry:
            entry["Notebooks"] = ["notebooks/README.md", *(f"notebooks/{name}.md" for name in NOTEBOOKS)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of docs_dir by the repository's pages, at their own paths, and those of notebooks and API."""
    found = Files([file for file in files if file.src_dir != config.docs_dir])
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for path in listed:
        if any(fnmatch.fnmatch(path, pattern) for pattern in PATTERNS) and (ROOT / path).is_file():
            found.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for name in NOTEBOOKS:
        file = f"{name}.ipynb"
        content, figures = notebook_page(ROOT / "notebooks" / file, ROOT / ".cache" / "notebooks" / file, NOTEBOOKS)
        found.append(File.generated(config, f"notebooks/{name}.md", content=content))
        for path, data in figures.items():
            found.append(File.generated(config, f"notebooks/{path}", content=data))
    for package in PACKAGES:
        found.append(File.generated(config, f"api/{package}.md", content=api_page(package)))
    return found


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to notebooks to their pages; a notebook's page keeps the link to its file."""
    is_notebook = page.file.src_uri in [f"notebooks/{name}.md" for name in NOTEBOOKS]
    return markdown if is_notebook else link_pages(markdown, NOTEBOOKS)


def api_page(package: str) -> str:
    """Return a page with the docstring of a package or module and those of what it exports."""
    parts = [f"# {package}\n\n::: {package}\n    options:\n      members: false\n      show_root_heading: false\n"]
    parts += [f"::: {package}.{name}\n" for name in exported(package)]
    return "\n".join(parts)


def exported(package: str) -> list[str]:
    """Return the names that a package exports (in its stub where it has one), or that a module defines."""
    path = ROOT.joinpath(*package.split("."))
    file = next(f for f in (path / "__init__.pyi", path / "__init__.py", path.with_suffix(".py")) if f.is_file())
    names = []
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and file.stem == "__init__":
            module = node.module or ""  # none: a module, which has its own page
            ours = module != "" and (node.level > 0 or module.startswith("llama_jax"))
            names += [alias.asname or alias.name for alias in node.names if ours]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
    return [name for name in names if not name.startswith("_")]
