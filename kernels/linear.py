"""linear: W h + b. For a few rows of float32 on a CPU, a small C helper that reads W once at memory speed.

MKL's product for one row reaches less than half of the memory's read stream on some CPUs, and a decode step is
nothing but such products. The helper is compiled once, by the machine's own `cc`, into the user's cache folder;
where that fails, a warning says so and torch's product is used.
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
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

SOURCE = Path(__file__).with_name("gemv.c")
# sums in any order, but NaN and inf as ever: -ffast-math would lose them
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")
MOST_ROWS = 8
LEAST_WEIGHTS = 1 << 16  # below this a product costs less than waking the threads


def linear(h: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """W h + b, [..., O] in h's dtype; h [..., I]."""
    if (
        h.dtype == torch.float32
        and h.numel() <= MOST_ROWS * h.shape[-1]
        and weight_OI.numel() >= LEAST_WEIGHTS
        and h.is_cpu
        and not h.requires_grad
        and not torch.compiler.is_compiling()
        and type(h) is Tensor
        and weight_OI.dtype == torch.float32
        and weight_OI.is_contiguous()
        and (helper := gemv()) is not None
    ):
        h = h.contiguous()
        O, I = weight_OI.shape
        y = torch.empty(*h.shape[:-1], O)
        bias = None if bias_O is None else bias_O.data_ptr()
        helper(weight_OI.data_ptr(), h.data_ptr(), bias, y.data_ptr(), O, I, h.numel() // I)
        return y
    return F.linear(h, weight_OI, bias_O)


@functools.cache
def gemv():
    """The helper as a C function, or None with a warning that says why. FASTWEIGHTS_CC="" asks for None."""
    compiler = os.environ.get("FASTWEIGHTS_CC", "cc")
    if not compiler:
        return None
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        warnings.warn(f"no C helper, decode on the CPU runs on torch's slower product: {reason}", stacklevel=2)
        return None
    library.gemv.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 3
    library.gemv.restype = None
    return library.gemv


def _built(compiler: str) -> Path:
    """The shared library in the cache folder: one for each source, compiler and processor."""
    if shutil.which(compiler) is None:
        raise FileNotFoundError(f"there is no compiler {compiler!r}")
    cpu = Path("/proc/cpuinfo")  # -march=native must not meet another processor in a shared home folder
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    flags = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    identity = (SOURCE.read_text(), compiler, *FLAGS, platform.machine(), platform.processor(), flags)
    name = f"gemv-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.so"
    root = os.environ.get("FASTWEIGHTS_CACHE")
    folder = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastweights"
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary) / name
            command = [compiler, *FLAGS, "-shared", "-fPIC", "-o", str(built), str(SOURCE)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(built, folder / name)
    return folder / name
