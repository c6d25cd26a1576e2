"""Who may import whom: dependencies point up the list only."""

import ast
import subprocess
import sys
from pathlib import Path

import fastweights

FOLDER = Path(fastweights.__file__).parent
# each may import what stands before it; "rules", "state" and the kernels import nothing of ours
ORDER = [
    *("config", "tokenizer", "hub", "kernels", "watch", "fused", "model", "gguf", "weights"),
    *("rules", "state", "probes", "inputs", "sampling"),
    *(
        "passes",
        "options",
        "plastic",
        "probing",
        "snapshot",
        "stacks",
        "captured",
        "generation",
        "episode",
        "surgery",
        "report",
        "benchmarks",
        "__main__",
        "__init__",
    ),
]
ALONE = {"config": set(), "rules": set(), "state": {"state"}}
ALONE |= {"kernels": {"kernels"}, "probes": {"probes", "model"}, "watch": set(), "fused": {"kernels", "watch"}}
ALONE |= {"model": {"config", "kernels", "fused"}}


def imported(file):
    """Modules of ours that a file imports at run time, and every other top-level package."""
    ours, others = set(), set()
    package = file.relative_to(FOLDER).parts[:-1]
    tree = ast.parse(file.read_text())
    typing = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    skipped = {id(inner) for block in typing for inner in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            path = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            names = [part for part in path if part]
            ours |= {names[0]} if names else {alias.name for alias in node.names}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            others |= {name.split(".")[0] for name in names}
            ours |= {name.split(".")[1] for name in names if name.startswith("fastweights.")}
    return ours, others


def files():
    linked = [file for name in ("kernels", "benchmarks") for file in (FOLDER / name).glob("*.py")]
    for file in sorted({*FOLDER.rglob("*.py"), *linked}):
        relative = file.relative_to(FOLDER).parts
        yield relative[0].removesuffix(".py"), file


def test_dependencies_point_up_the_list_only():
    for module, file in files():
        for other in imported(file)[0] & set(ORDER):
            inside = other == module and module in ("kernels", "state", "probes", "benchmarks")
            assert inside or ORDER.index(other) < ORDER.index(module), f"{module} imports {other}"
            assert module not in ALONE or other in ALONE[module], f"{module} imports {other}"


def test_every_module_stands_in_the_list():
    assert {module for module, _ in files()} <= set(ORDER)


def test_the_library_never_imports_transformers():
    users = {module for module, file in files() if "transformers" in imported(file)[1]}
    assert users <= {"benchmarks"}


def test_kernels_is_no_package_of_its_own():
    """A top-level importable `kernels` would shadow the PyPI package that transformers imports."""
    assert not (FOLDER / "kernels" / "__init__.py").exists()
    assert (FOLDER / "kernels").is_symlink()
    code = "import fastweights.kernels.read, importlib.util; print(importlib.util.find_spec('kernels'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout == "None\n", done.stderr
