"""The C files beside this one as a shared library, compiled once, by the machine's own `cc`, into the cache folder.

MKL's product for one row reaches less than half of the memory's read stream on some CPUs, and a decode step is nothing
but such products. Where the library cannot be built, a warning says so and torch computes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from ..files import cache_folder, one_line, warn, why_not_ours

SOURCES = [
    Path(__file__).with_name(name) for name in ("cpu.c", "tiles.c", "scan.c", "fold.c", "decode_body.inc", "cpu.h")
]
# sums in any order, but NaN and inf as ever: -ffast-math would lose them
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")
MOST_ROWS = 8  # of the products of a few rows and a decode step
TALL, ACROSS, KEYS = 8, 48, 64  # of tiles.c: a tile of a product, the keys of an attention
MOST_TOKENS = 128  # of scan.c: a block


@functools.cache
def mkl_uses_avx512() -> bool:
    """Whether torch's own products of many rows are the faster ones: MKL uses AVX-512 on Intel's processors alone."""
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "GenuineIntel" in cpu.read_text()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None with a warning that says why. FASTWEIGHTS_CC="" asks for None."""
    compiler = os.environ.get("FASTWEIGHTS_CC", "cc")
    if not compiler:
        return None
    try:
        loaded = _loaded(compiler)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        warn(f"no C helper, decode on the CPU runs on torch's slower product: {reason}")
        return None
    pointer, long, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    gemv = [*[pointer] * 4, *[long] * 3, number]
    decode = [pointer, pointer, long, *[pointer] * 7, *[long] * 3, number]
    functions: dict[str, list] = {
        "gemv": gemv,
        "gemv_bfloat16": gemv,
        "product_rows": [*[pointer] * 4, *[long] * 3, pointer, number],
        "product_columns": [*[pointer, long] * 3, *[long] * 3, number, number],
        "attention": [pointer, pointer, number],
        "scan_block": [pointer, number],
        "adjoint_block": [pointer, number],
        "settled": [pointer, pointer, long, long, ctypes.c_float],
        "back_float32": [*[pointer] * 4, *[long] * 3, number],
        "back_bfloat16": [*[pointer] * 4, *[long] * 3, number],
        "fold": [pointer, pointer, pointer, number],
        "fold_scratch": [long, long, long, number],
        "decode_float32": decode,
        "decode_bfloat16": decode,
        "put": [pointer, long, long],
    }
    for name, arguments in functions.items():
        if hasattr(loaded, name):  # the products of many rows, what is built of them, and folds need AVX-512
            getattr(loaded, name).argtypes = arguments
            getattr(loaded, name).restype = None
    loaded.put.restype = loaded.settled.restype = number
    if hasattr(loaded, "fold"):
        loaded.fold.restype, loaded.fold_scratch.restype = number, long
    return loaded


def _loaded(compiler: str) -> ctypes.CDLL:
    """The library from the cache folder, built there once; where that folder is not safe or of no use, from a
    temporary folder of this process, with a warning. A library that another user could have written is never loaded."""
    if shutil.which(compiler) is None:
        raise FileNotFoundError(f"there is no compiler {compiler!r}")
    name, folder = _name(compiler), cache_folder()
    if folder is None:
        reason = "HOME and FASTWEIGHTS_CACHE are not set"
    else:
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            if not (reason := why_not_ours(folder) or ""):
                if not os.path.lexists(folder / name):
                    _build(compiler, folder, name)
                reason = why_not_ours(folder / name) or ""
            if not reason:
                return ctypes.CDLL(str(folder / name))
        except OSError as error:  # a read-only or full disk, or a library built on another machine
            reason = one_line(error)
    with tempfile.TemporaryDirectory(prefix="fastweights-") as private:  # mode 0700
        _build(compiler, Path(private), name)
        loaded = ctypes.CDLL(str(Path(private, name)))  # stays loaded when the file goes
    warn(f"the C helper was compiled for this process alone, and will be again for the next: {reason}")
    return loaded


def _name(compiler: str) -> str:
    """A file name for each source, compiler and processor."""
    cpu = Path("/proc/cpuinfo")  # -march=native must not meet another processor in a shared home folder
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    flags = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    sources = [source.read_bytes() for source in SOURCES]
    identity = (sources, compiler, *FLAGS, platform.machine(), platform.processor(), flags)
    return f"cpu-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.so"


def _build(compiler: str, folder: Path, name: str) -> None:
    """Compiles the library into `folder`, where it appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        built = Path(temporary) / name
        sources = [str(source) for source in SOURCES if source.suffix == ".c"]
        command = [compiler, *FLAGS, "-shared", "-fPIC", "-o", str(built), *sources, "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
        built.chmod(0o755)  # whatever the umask: nobody else may write it
        os.replace(built, folder / name)
