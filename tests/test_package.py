"""What is installed: every folder with code, the C sources, the mark of a typed package, and one version."""

import ast
import re
from pathlib import Path

import fastweights as fw

FOLDER = Path(fw.__file__).resolve().parent
PROJECT = (FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8")


def listed(key):
    """What pyproject.toml says for `key`, a list of texts."""
    return ast.literal_eval(re.search(rf"(?<!\w){re.escape(key)} = (\[.*?\])", PROJECT, re.DOTALL)[1])


def test_every_folder_with_code_is_installed():
    tops = (FOLDER, FOLDER / "kernels", FOLDER / "benchmarks")  # the last two are links, which rglob does not follow
    folders = {file.parent for top in tops for file in top.rglob("*.py")}
    assert {".".join(folder.relative_to(FOLDER.parent).parts) for folder in folders} == set(listed("packages"))


def test_every_file_that_is_no_python_is_installed():
    kernels = {file.suffix for file in (FOLDER / "kernels").iterdir() if file.is_file()} - {".py"}
    assert {f"*{suffix}" for suffix in kernels} == set(listed('"fastweights.kernels"'))
    assert (FOLDER / "py.typed").is_file()
    assert "py.typed" in listed('{ "fastweights"')


def test_the_version_stands_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", fw.__version__)
    assert not re.search(r"^version = \"", PROJECT, re.MULTILINE)
    assert f"## {fw.__version__}" in (FOLDER.parent / "CHANGELOG.md").read_text(encoding="utf-8")
