"""Low-rank truncation of a sum of rank-1 events, with a bound on what it loses.

    M = Σ_j w_j u_j [k_j | s_j]ᵀ = Y_u A (Y_k B)ᵀ,  A w Bᵀ = P diag(σ) Vᵀ      Y orthonormal, A and B small, one SVD
    ‖M − Σ_{r ≤ keep} σ_r p_r v_rᵀ‖₂ = σ_{keep+1}                             the best possible (Eckart–Young)

The bias key s is one more column of the keys, so a bound for M = [ΔW | Δb] is one for ΔW and for Δb. float64 factors
are split by QR; float32 ones by the eigenvectors of their Gram matrix, at half the cost and without Y: what is kept is
a mixture of slots, and only matrices of the number of slots leave the device. Everything runs in float64; only the
kept factors are rounded to the dtype they are stored in. Shape suffixes: S slots, R kept, O out, I in.
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


class Orthogonal:
    """Xᵀ = Y A by QR: Y [width, S] orthonormal."""

    def __init__(self, X: Tensor):
        self.Y, self.A = torch.linalg.qr(X.T)

    def rows(self, C_SR: Tensor) -> Tensor:
        """(Y C)ᵀ, [R, width]."""
        return (self.Y @ C_SR).T


class Mixing:
    """The same from G = X Xᵀ of rows scaled to length 1, G = Q Λ Qᵀ: A = Λ^½ Qᵀ, and Yᵀ = Λ^-½ Qᵀ X is never formed.

    Directions of Λ within rounding of 0 are left out.
    """

    def __init__(self, X: Tensor):
        G = (X @ X.T).cpu()
        self.X, self.norm = X, G.diagonal().sqrt()
        self.scale = torch.where(self.norm > 0, 1 / self.norm, 0.0)
        eigenvalue, Q = torch.linalg.eigh(G * self.scale * self.scale[:, None])
        live = eigenvalue > len(G) * EPSILON * eigenvalue[-1]
        root = torch.where(live, eigenvalue.clamp(min=EPSILON).sqrt(), 0.0)
        self.unit = (Q * root).T  # A of the scaled rows
        self.inverse = torch.where(live[:, None], Q.T / root.clamp(min=EPSILON)[:, None], 0.0)
        self.A = self.unit * self.norm

    def mix(self, C_SR: Tensor) -> Tensor:
        """(Y C)ᵀ as a mixture of the scaled rows, [R, S]."""
        return C_SR.T @ self.inverse

    def rows(self, C_SR: Tensor) -> Tensor:
        """(Y C)ᵀ, [R, width]."""
        return (self.mix(C_SR) * self.scale).to(self.X.device) @ self.X


def fold(U_SO: Tensor, K_SI: Tensor, bias_S: Tensor, w_S: Tensor, keep: int) -> Folded:
    """Folds S slots of weight w [S] (float64) into the best `keep` ≤ min(S, O, I + 1); σ_r is split evenly over both.

    The bounds are on the stored factors Û, K̂ in exact arithmetic. With δ the rounding to their dtype, which is known,
    and rows u_r, k_r of norm √σ_r that are orthogonal to each other:

        ‖M − ÛᵀK̂‖_F ≤ (Σ_{r > keep} σ_r²)^½ + (Σ σ_r ‖δu_r‖²)^½ + (Σ σ_r ‖δk_r‖²)^½ + ‖δU‖ ‖δK‖ + arithmetic

    and ‖·‖₂ with σ_{keep+1} as its first term. `arithmetic` is for float64 itself. By QR: g ‖w U‖ ‖K‖ with
    g = ε (O + I + 1 + S). By Gram matrices, whose rounding g may hide a direction of size √g: with E what the mixtures
    leave of the slots' weights, √g (‖E Bᵀ‖ + ‖A E‖) + g ‖E‖. Not the proven worst case, but ten times and more what is
    seen.
    """
    U, K = U_SO.double(), torch.empty(len(K_SI), K_SI.shape[1] + 1, dtype=torch.float64, device=K_SI.device)
    K[:, :-1], K[:, -1] = K_SI, bias_S
    split = Orthogonal if U_SO.dtype == torch.float64 else Mixing
    left, right = split(U), split(K)
    w_S = w_S.to(left.A.device)
    P, sigma, Vh = torch.linalg.svd((left.A * w_S) @ right.A.T, full_matrices=False)
    root = sigma[:keep].sqrt()
    C_u, C_k = P[:, :keep] * root, Vh[:keep].T * root
    U_exact, K_exact = left.rows(C_u), right.rows(C_k)
    U_RO, K_RI = U_exact.to(U_SO.dtype), K_exact.to(K_SI.dtype)
    dU, dK = (
        (stored.double() - exact).norm(dim=1).to(root.device) for stored, exact in ((U_RO, U_exact), (K_RI, K_exact))
    )
    rounding = (root * dU).norm() + (root * dK).norm() + dU.norm() * dK.norm()
    g = EPSILON * (U.shape[1] + K.shape[1] + len(U))
    if isinstance(left, Mixing) and isinstance(right, Mixing):
        E = torch.diag(w_S * left.norm * right.norm) - left.mix(C_u).T @ right.mix(C_k)
        rounding += g**0.5 * ((E @ right.unit.T).norm() + (left.unit @ E).norm()) + g * E.norm()
    else:
        rounding += g * (U * w_S[:, None]).norm() * K.norm()
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
