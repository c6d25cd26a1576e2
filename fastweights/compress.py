"""Low-rank truncation of a sum of rank-1 events, with a bound on what it loses.

    M = Σ_j w_j u_j [k_j | s_j]ᵀ = Q_u R_u (Q_k R_k)ᵀ = (Q_u P) diag(σ) (Q_k V)ᵀ     two QRs, one small SVD
    ‖M − Σ_{r ≤ keep} σ_r p_r v_rᵀ‖₂ = σ_{keep+1}                                      the best possible (Eckart–Young)

The bias key s is one more column of the keys, so a bound for M = [ΔW | Δb] is one for ΔW and for Δb.
Everything runs in float64; only the kept factors are rounded to the dtype they are stored in.
Shape suffixes: S slots, R kept, O out, I in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Folded:
    """The best R rank-1 terms of M, and how far they are from it."""

    U_RO: Tensor
    K_RI: Tensor
    bias_R: Tensor
    error_2: float
    error_F: float


def fold(U_SO: Tensor, K_SI: Tensor, bias_S: Tensor, w_S: Tensor, keep: int) -> Folded:
    """Folds S slots of weight w [S] (float64) into the best `keep` ≤ min(S, O, I + 1); σ_r is split evenly over both.

    The bounds are on the stored factors Û, K̂ in exact arithmetic. With δ the rounding to their dtype, which is known,
    and rows u_r, k_r of norm √σ_r that are orthogonal to each other:

        ‖M − ÛᵀK̂‖_F ≤ (Σ_{r > keep} σ_r²)^½ + (Σ σ_r ‖δu_r‖²)^½ + (Σ σ_r ‖δk_r‖²)^½ + ‖δU‖ ‖δK‖
                        + ε (O + I + 1 + S) ‖w U‖ ‖K‖

    and ‖·‖₂ with σ_{keep+1} as its first term. The last term is for the float64 arithmetic of QR, SVD and products:
    not the proven worst case, but fifty times and more what is seen.
    """
    U, K = U_SO.double() * w_S[:, None], torch.cat([K_SI, bias_S[:, None]], dim=1).double()
    (Q_u, R_u), (Q_k, R_k) = torch.linalg.qr(U.T), torch.linalg.qr(K.T)
    P, sigma, Vh = torch.linalg.svd(R_u @ R_k.T, full_matrices=False)
    root = sigma[:keep].sqrt()
    U_exact, K_exact = (Q_u @ (P[:, :keep] * root)).T, (Q_k @ (Vh[:keep].T * root)).T
    U_RO, K_RI = U_exact.to(U_SO.dtype), K_exact.to(K_SI.dtype)
    dU, dK = (U_RO.double() - U_exact).norm(dim=1), (K_RI.double() - K_exact).norm(dim=1)
    rounding = (root * dU).norm() + (root * dK).norm() + dU.norm() * dK.norm()
    rounding += EPSILON * (U.shape[1] + K.shape[1] + len(U)) * U.norm() * K.norm()
    lost = sigma[keep:]
    error_2 = float(rounding + lost[:1].sum())  # σ is in descending order; the sum of nothing is 0
    return Folded(U_RO, K_RI[:, :-1], K_RI[:, -1], error_2, float(rounding + lost.norm()))


def spectrum(U_SO: Tensor, K_SI: Tensor) -> Tensor:
    """The singular values of Σ_j u_j k_jᵀ, descending, float64."""
    R_u, R_k = (torch.linalg.qr(factor.double().T, mode="r").R for factor in (U_SO, K_SI))
    return torch.linalg.svdvals(R_u @ R_k.T)


def effective_rank(sigma_R: Tensor) -> float:
    """exp(−Σ p ln p) of p = σ / Σσ (Roy & Vetterli 2007); 0 where every σ is."""
    if not sigma_R.sum() > 0:
        return 0.0
    return float(torch.special.entr(sigma_R / sigma_R.sum()).sum().exp())
