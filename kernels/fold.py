"""fold_: the fold of one row's float32 slots in one call of C; `state.compress.fold` is its slow twin.

On many cores the products use every thread. No sum depends on the number of threads.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .linear import c_library_for

MOST_SLOTS = 256  # the eigenvectors of more are found sooner by LAPACK
LEAST_TERMS = 1 << 21  # of the products: below this they cost less than waking the threads
LEAST_THREADS = 4  # two save a tenth of a fold of 96 slots where the cores are idle, and double it where one is not


class Fold(ctypes.Structure):
    """Field for field the record of `fold.c`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("U", "K", "bias", "w")),
        *((name, ctypes.c_long) for name in ("S", "O", "I", "R")),
    ]


def fold_(U_SO: Tensor, K_SI: Tensor, bias_S: Tensor, w_S: Tensor, keep: int) -> tuple[float, float] | None:
    """Puts the best `keep` terms of the S slots into the first `keep` of them, and returns (error_2, error_F).

    None, and nothing is changed, where C does not take it: other dtypes or devices, more than MOST_SLOTS slots, factors
    that may not fit float32, eigenvalues that do not converge. w [S] float64.
    """
    (S, O), I = U_SO.shape, K_SI.shape[1]
    helper = c_library_for(U_SO, K_SI, bias_S)
    every = (U_SO, K_SI, bias_S, w_S)
    if helper is None or not hasattr(helper, "fold") or U_SO.dtype != torch.float32 or S > MOST_SLOTS:
        return None
    if not all(t.is_contiguous() for t in every) or w_S.dtype != torch.float64 or not w_S.is_cpu:
        return None
    threads = torch.get_num_threads()
    if threads < LEAST_THREADS or S * S * (O + I) < LEAST_TERMS:
        threads = 1
    scratch = torch.empty(helper.fold_scratch(S, O, I, threads), dtype=torch.float64, device="cpu")
    record, errors = Fold(*(t.data_ptr() for t in every), S, O, I, keep), (ctypes.c_double * 2)()
    if helper.fold(ctypes.addressof(record), errors, scratch.data_ptr(), threads):
        return None
    return errors[0], errors[1]
