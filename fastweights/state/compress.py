"""Low-rank truncation of a sum of rank-1 events, with a bound on what it loses.

    M = Σ_j w_j u_j [k_j | s_j]ᵀ                              ‖M − Σ_{r ≤ keep} σ_r p_r v_rᵀ‖₂ = σ_{keep+1}
    the best possible (Eckart–Young); σ_r is split evenly over both factors: √σ_r p_r and √σ_r v_r are stored

The bias key s is one more column of the keys, so a bound for M = [ΔW | Δb] is one for ΔW and for Δb. float64 factors
go by QR and the SVD of the small core; float32 ones by Gram matrices, at half the cost: what is kept is a mixture
of slots, and only matrices of the number of slots leave the device. Everything runs in float64; only the kept factors
are rounded to the dtype they are stored in. `fold` is torch's; `fold_` works in place, on a CPU in C (`kernels.fold`).
Shape suffixes: S slots, R kept, O out, I in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import fold as in_c

EPSILON = torch.finfo(torch.float64).eps
AMPLE = 32  # rows of norm √σ are shorter than so many times that, even where slack is as large as σ


@dataclass(frozen=True)
class Folded:
    """The best R rank-1 terms of M, and how far they are from it."""

    U_RO: Tensor
    K_RI: Tensor
    bias_R: Tensor
    error_2: float
    error_F: float


@dataclass(frozen=True)
class Best:
    """The best R terms in float64, before they are rounded to the dtype that they are stored in.

    `arithmetic` bounds the rounding error of UᵀK in the Frobenius norm. `lost` are the dropped singular values of M,
    as computed. The true ones are bounded with `slack`: σ² ≤ lost² + slack², and Σ σ² ≤ Σ lost² + slack².
    """

    U_RO: Tensor
    K_RI: Tensor
    sigma_R: Tensor
    lost: Tensor
    slack: float
    arithmetic: float


def _by_qr(U_SO: Tensor, K_SI: Tensor, w_S: Tensor, keep: int) -> Best:
    """M = Y_u A (Y_k B)ᵀ with orthonormal Y and small A, B: the SVD of A Bᵀ is that of M."""
    Y_u, A = torch.linalg.qr((U_SO * w_S[:, None]).T)
    Y_k, B = torch.linalg.qr(K_SI.T)
    P, sigma, Vh = torch.linalg.svd(A @ B.T, full_matrices=False)
    root = sigma[:keep].sqrt()
    arithmetic = _terms(U_SO, K_SI) * EPSILON * float((U_SO * w_S[:, None]).norm() * K_SI.norm())
    U_RO, K_RI = (Y_u @ (P[:, :keep] * root)).T, (Y_k @ (Vh[:keep].T * root)).T
    return Best(U_RO, K_RI, sigma[:keep], sigma[keep:], 0.0, arithmetic)


def _by_grams(U_SO: Tensor, K_SI: Tensor, w_S: Tensor, keep: int) -> Best:
    """The best terms as mixtures of the slots. A GPU is waited for once: for the Gram matrices and w."""
    S = len(U_SO)
    G_u, G_k, w_1S = torch.cat([U_SO @ U_SO.T, K_SI @ K_SI.T, w_S[None]]).cpu().split([S, S, 1])
    C_2RS, sigma_R, lost, slack, arithmetic = _coefficients(G_u, G_k, w_1S[0], keep, _terms(U_SO, K_SI))
    C_u, C_k = C_2RS.to(U_SO.device, non_blocking=True)
    return Best(C_u @ U_SO, C_k @ K_SI, sigma_R, lost, slack, arithmetic)


def _coefficients(
    G_u: Tensor, G_k: Tensor, w_S: Tensor, keep: int, terms: int
) -> tuple[Tensor, Tensor, Tensor, float, float]:
    """C [2, R, S] with U_RO = C_u U and K_RI = C_k K, and what else there is in `Best`; on the CPU.

    M = Uᵀ D K, of slots scaled to length 1 with Gram matrices G_u = L Lᵀ and G_k:

        (D L)ᵀ G_k (D L) = Y diag(σ²) Yᵀ,  V = diag(1/σ) Yᵀ (D L)ᵀ K,  M Vᵀ = Uᵀ D G_k (D L) Y diag(1/σ)

    V is orthonormal whatever L is, and M Vᵀ V the projection of M onto it. δ on the diagonal of G_u makes its Cholesky
    factor exist; the σ² are then those of M and a little more, never less. All that but for rounding: with
    N² = ‖D L‖² ‖G_k‖, σ² is known to within slack², and V Vᵀ is 1 to within slack² / σ². Sums of many alike terms, in
    the Gram matrices, round most: slack² = (16 + (O + I + S) / 8) ε N² is ten times what they were seen to. Terms with
    σ² ≤ 16 ε N² are not kept.
    """
    norm_u, norm_k = G_u.diagonal().sqrt(), G_k.diagonal().sqrt()
    scale_u, scale_k = (torch.where(norm > 0, 1 / norm, 0.0) for norm in (norm_u, norm_k))
    G_u, G_k = (G * scale * scale[:, None] for G, scale in ((G_u, scale_u), (G_k, scale_k)))
    D_S1 = (w_S * norm_u * norm_k)[:, None]
    unit = float(D_S1.abs().max()) or 1.0  # squares of tiny weights would vanish
    D_S1 /= unit
    delta, failed = len(G_u) * EPSILON / 16, 1
    while failed and delta < 1:  # no δ helps a NaN
        delta *= 16
        L, failed = torch.linalg.cholesky_ex(G_u.diagonal_scatter(torch.full_like(norm_u, 1 + delta)))
    DL = D_S1 * L
    squares, Y = torch.linalg.eigh(DL.T @ G_k @ DL)
    squares, Y = squares.flip(0), Y.flip(1)[:, :keep]
    rounding = EPSILON * float(DL.square().sum() * G_k.norm())
    squared = (16 + terms / 8) * rounding
    live_R = squares[:keep] > 16 * rounding
    sigma_R = torch.where(live_R, squares[:keep], 0.0).sqrt()
    inverse_R = torch.where(live_R, 1 / sigma_R, 0.0)
    C_k = DL @ Y * (unit * inverse_R).sqrt()
    C_u = D_S1 * (G_k @ (C_k * inverse_R))
    lost = squares.clamp(min=0).sqrt()
    lost[:keep][live_R] = 0
    arithmetic = squared * float(inverse_R.norm())
    C_2RS = torch.stack([C_u.T * scale_u, C_k.T * scale_k])
    return C_2RS, unit * sigma_R, unit * lost, unit * squared**0.5, unit * arithmetic


def _terms(U_SO: Tensor, K_SI: Tensor) -> int:
    return U_SO.shape[1] + K_SI.shape[1] + len(U_SO)


def fold(U_SO: Tensor, K_SI: Tensor, bias_S: Tensor, w_S: Tensor, keep: int) -> Folded:
    """Folds S slots of weight w [S] (float64) into the best `keep` ≤ min(S, O, I + 1); σ_r is split evenly over both.

    The bounds are on the stored factors Û, K̂ in exact arithmetic. With δ_u = η √σ + t √O, δ_k = η √σ + t √(I + 1) the
    rounding of rows of norm √σ_r that are orthogonal to each other (η: half an epsilon of their dtype, t: half of its
    smallest number):

        ‖M − ÛᵀK̂‖_F ≤ (Σ_{r > keep} σ_r² + slack²)^½ + ‖√σ δ_u‖ + ‖√σ δ_k‖ + ‖δ_u‖ ‖δ_k‖ + arithmetic

    and ‖·‖₂ with σ_{keep+1}² in place of the first sum. `slack` and `arithmetic` are for float64 itself, see `Best`:
    not the proven worst case, but ten times what is seen.

    Raises:
        ValueError: a kept factor does not fit its dtype.
    """
    U, K = U_SO.double(), torch.empty(len(K_SI), K_SI.shape[1] + 1, dtype=torch.float64, device=K_SI.device)
    K[:, :-1], K[:, -1] = K_SI, bias_S
    wide, info = U_SO.dtype == torch.float64, torch.finfo(U_SO.dtype)
    best = (_by_qr if wide else _by_grams)(U, K, w_S, keep)
    U_RO, K_RI = best.U_RO.to(U_SO.dtype), best.K_RI.to(K_SI.dtype)
    root_R = best.sigma_R.sqrt()
    fits = AMPLE * float(root_R[0]) < info.max  # and so does every entry of a row of norm √σ: nobody has to look
    if not fits and not bool(U_RO.isfinite().all() & K_RI.isfinite().all()):
        raise ValueError(f"the sum of the events, of norm {float(best.sigma_R.norm()):.3g}, does not fit {U_SO.dtype}")
    eta, t = (0.0, 0.0) if wide else (info.eps / 2, info.smallest_normal * info.eps / 2)
    d_u, d_k = (torch.where(root_R > 0, eta * root_R + t * X.shape[1] ** 0.5, 0.0) for X in (U, K))
    rounding = float((root_R * d_u).norm() + (root_R * d_k).norm() + d_u.norm() * d_k.norm()) + best.arithmetic
    error_2, error_F = (
        math.hypot(lost, best.slack) + rounding
        for lost in (max(best.lost.tolist(), default=0.0), float(best.lost.norm()))
    )
    return Folded(U_RO, K_RI[:, :-1], K_RI[:, -1], error_2, error_F)


def fold_(U_SO: Tensor, K_SI: Tensor, bias_S: Tensor, w_S: Tensor, keep: int) -> tuple[float, float]:
    """`fold` in place: the result goes into the first `keep` slots. Returns (error_2, error_F).

    Raises:
        ValueError: a kept factor does not fit its dtype; nothing changes then.
    """
    errors = in_c.fold_(U_SO, K_SI, bias_S, w_S, keep)
    if errors is not None:
        return errors
    best = fold(U_SO, K_SI, bias_S, w_S, keep)
    U_SO[:keep], K_SI[:keep], bias_S[:keep] = best.U_RO, best.K_RI, best.bias_R
    return best.error_2, best.error_F


def spectrum(U_SO: Tensor, K_SI: Tensor) -> Tensor:
    """The singular values of Σ_j u_j k_jᵀ, descending, float64."""
    R_u, R_k = (torch.linalg.qr(factor.double().T, mode="r").R for factor in (U_SO, K_SI))
    return torch.linalg.svdvals(R_u @ R_k.T)


def effective_rank(sigma_R: Tensor) -> float:
    """exp(−Σ p ln p) of p = σ / Σσ (Roy & Vetterli 2007); 0 where every σ is."""
    if not sigma_R.sum() > 0:
        return 0.0
    return float(torch.special.entr(sigma_R / sigma_R.sum()).sum().exp())
