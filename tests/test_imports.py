"""The order of the house: who may import whom, type-only imports counted, and whose names stay at home."""

import ast
import subprocess
import sys
from pathlib import Path

import fastweights

FOLDER = Path(fastweights.__file__).parent
# a file or folder may import what stands before it, never what stands behind it
ORDER = [
    *("files", "version", "progress"),
    *(
        "flags",
        "binding",
        "watch",
        "activations",
        "inputs",
        "sampling",
        "checks",
        "numbers",
        "kernels",
    ),  # the ground floor
    *("rules", "families", "rope", "windows", "config_json", "config", "state", "carried", "cache", "model"),
    *(
        "bpe",
        "spm",
        "chat",
        "stream",
        "tokenizer",
        "hub",
        "gguf_families",
        "gguf_config",
        "gguf",
        "stored",
        "quantised",
        "weights",
        "anatomy",
    ),  # checkpoints
    "probes",
    *("sae_files", "sae"),
    *("episode_state", "passes", "plastic", "backward"),
    "engine",
    *("waiting", "feed"),
    *("generation", "lanes", "probe", "snapshot", "episode", "exchange"),
    *("attach", "comparison", "reach", "context", "ridge"),
    *("report", "perplexity", "record", "surgery", "harness", "__init__", "benchmarks", "__main__"),
]
GROUND = ORDER[: ORDER.index("kernels")]  # import nothing of ours
# attributes of torch, numpy and Python that begin with an underscore and have no public form
NOT_OURS = {
    *("_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks", "_version", "_C", "_current_level"),
    *("_global_forward_hooks", "_global_forward_pre_hooks", "_are_functorch_transforms_active"),
    *("_fields", "_fields_", "_replace", "_exit", "_getframe", "_scaled_dot_product_flash_attention"),
}


def files():
    linked = [file for name in ("kernels", "benchmarks") for file in (FOLDER / name).glob("*.py")]
    return sorted({*FOLDER.rglob("*.py"), *linked})


def name_of(file):
    return ".".join(file.relative_to(FOLDER).with_suffix("").parts)


def imported(file):
    """Files of ours that a file imports, by their dotted names, and every other top-level package."""
    ours, others = set(), set()
    package = file.relative_to(FOLDER).parts[:-1]
    known = {name_of(other) for other in files()}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            path = [
                *package[: len(package) - node.level + 1],
                *(part for part in (node.module or "").split(".") if part),
            ]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastweights":
            path = node.module.split(".")[1:]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            others |= {name.split(".")[0] for name in names if not name.startswith("fastweights")}
            ours |= {name.removeprefix("fastweights.") for name in names if name.startswith("fastweights.")}
            ours |= {"__init__"} if "fastweights" in names else set()
            continue
        else:
            continue
        base = ".".join(path)
        for alias in node.names:
            inner = f"{base}.{alias.name}".lstrip(".")
            ours.add(inner if inner in known else base if base in known else f"{base}.__init__".lstrip("."))
    return ours, others


def test_imports_point_down_the_order_only():
    for file in files():
        here = name_of(file).split(".")[0]
        for there in {name.split(".")[0] for name in imported(file)[0]} - {here}:
            assert ORDER.index(there) < ORDER.index(here), f"{name_of(file)} imports {there}"
            assert here not in GROUND, f"{here} is of the ground floor and imports {there}"


def test_there_is_no_circle_of_files():
    arrows = {name_of(file): imported(file)[0] - {name_of(file)} for file in files()}
    while arrows:
        free = {name for name, targets in arrows.items() if not targets & arrows.keys()}
        assert free, f"a circle among {sorted(arrows)}"
        arrows = {name: targets for name, targets in arrows.items() if name not in free}


def test_every_file_stands_in_the_order():
    assert {name_of(file).split(".")[0] for file in files()} <= set(ORDER)


def test_no_file_reaches_for_a_name_of_another_that_begins_with_an_underscore():
    for file in files():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        own |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for node in ast.walk(tree):
            names = [node.attr] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("fastweights")):
                names = [alias.name for alias in node.names]
            for name in names:
                private = name.startswith("_") and not name.startswith("__")
                assert not private or name in own | NOT_OURS, f"{name_of(file)}:{node.lineno} reaches for {name}"


def test_the_library_never_imports_transformers():
    users = {name_of(file).split(".")[0] for file in files() if "transformers" in imported(file)[1]}
    assert users <= {"benchmarks"}


def test_kernels_is_no_package_of_its_own():
    """A top-level importable `kernels` would shadow the PyPI package that transformers imports."""
    assert not (FOLDER / "kernels" / "__init__.py").exists()
    assert (FOLDER / "kernels").is_symlink()
    code = "import fastweights.kernels.read, importlib.util; print(importlib.util.find_spec('kernels'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout == "None\n", done.stderr
