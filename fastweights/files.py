"""Files that appear whole or not at all, the cache folder, and warnings that point at the caller."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], meta: dict[str, str]) -> None:
    """Writes a safetensors file, and its folder, whole or not at all; tensors of any device."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, temporary, meta)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no file; ValueError names a file that holds something else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object of settings")
    return value


def one_line(error: BaseException) -> str:
    """What an error says, on one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def cache_folder() -> Path | None:
    """FASTWEIGHTS_CACHE, else fastweights in XDG_CACHE_HOME or ~/.cache; None where nobody has a home folder."""
    root, caches = os.environ.get("FASTWEIGHTS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if not (root or caches) and os.environ.get("HOME") == "":  # ~ would be the root folder
        return None
    try:
        return Path(root or Path(caches or "~/.cache", "fastweights")).expanduser()
    except RuntimeError:  # no HOME, and a user without an entry in the password file
        return None


def why_not_ours(path: Path) -> str | None:
    """Why somebody else may have written what lies at `path`; None where only this user could."""
    status = path.stat()
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        return f"{path} belongs to another user"
    if os.name == "posix" and status.st_mode & 0o022:
        return f"{path} can be written by others (chmod go-w {path})"
    return None


def say(text: str) -> None:
    """A line on stderr: stdout belongs to the caller's results."""
    print(f"fastweights: {text}", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """A UserWarning of one line that points at the caller's code, not into this package, torch or contextlib."""
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in (
        __package__,
        "torch",
        "contextlib",
    ):
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    warnings.warn(text, stacklevel=level)
