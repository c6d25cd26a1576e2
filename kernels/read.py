"""read: what the fast weights add to a linear's output.

    y = ((x Kᵀ + kb) ⊙ w) U

Many rows may share one pair of factors and differ only in `w`: the same model at different moments
(DESIGN §3.3). A slot of weight 0 is dead: whatever it holds, NaN included, it adds nothing.
"""

from __future__ import annotations

import torch


def reference(
    x_BTI: torch.Tensor,
    U_BRO: torch.Tensor,
    K_BRI: torch.Tensor,
    kb_BR: torch.Tensor | None,
    w: torch.Tensor,
) -> torch.Tensor:
    """The definition, in torch: factors of batch 1 (or of stride 0) serve every row of x."""
    dtype = U_BRO.dtype
    B, T, _ = x_BTI.shape
    R, O = U_BRO.shape[1:]
    if R == 0:
        return x_BTI.new_zeros(B, T, O, dtype=dtype)
    w_BTR = (w if w.dim() == 3 else w[:, None]).to(dtype).expand(B, T, R)
    x_BTI = x_BTI.to(dtype)
    if B > 1 and _shared(U_BRO) and _shared(K_BRI):  # one large product instead of B small ones
        kb_BR = None if kb_BR is None else kb_BR.expand(B, R)[:, None].expand(B, T, R).reshape(1, B * T, R)
        y = _masked(x_BTI.reshape(1, B * T, -1), U_BRO[:1], K_BRI[:1], kb_BR, w_BTR.reshape(1, B * T, R))
        return y.view(B, T, O)
    kb_BR = None if kb_BR is None else kb_BR[:, None]
    return _masked(x_BTI, U_BRO, K_BRI, kb_BR, w_BTR)


def _shared(factor: torch.Tensor) -> bool:
    return factor.shape[0] == 1 or factor.stride(0) == 0


def _masked(x_BTI, U_BRO, K_BRI, kb_BTR, w_BTR):
    c_BTR = x_BTI @ K_BRI.mT
    if kb_BTR is not None:
        c_BTR = c_BTR + kb_BTR
    c_BTR = (c_BTR * w_BTR).masked_fill(w_BTR == 0, 0)
    y_BTO = c_BTR @ U_BRO
    if y_BTO.device.type == "cpu" and bool(y_BTO.detach().sum().isfinite()):
        return y_BTO
    # 0 · NaN is NaN: take what is not finite out of U, and give NaN only to who reads it alive
    finite = U_BRO.isfinite()
    poisoned = (w_BTR != 0).to(c_BTR.dtype) @ (~finite).to(c_BTR.dtype)
    return (c_BTR @ U_BRO.masked_fill(~finite, 0)).masked_fill(poisoned > 0, float("nan"))


def read(
    x_BTI: torch.Tensor,
    U_BRO: torch.Tensor,
    K_BRI: torch.Tensor,
    kb_BR: torch.Tensor | None,
    w: torch.Tensor,
    backend: str = "torch",
) -> torch.Tensor:
    """What the fast weights add: ((x Kᵀ + kb) ⊙ w) U, shape [B, T, O] in the factors' dtype.

    x [B, T, I] any float dtype; U [B, R, O], K [B, R, I], kb [B, R] or None (no fast bias), each with batch
    B or 1; w [B, R], or [B, T, R] when tokens look at different moments. Differentiable in x.
    """
    match backend:
        case "torch":
            return reference(x_BTI, U_BRO, K_BRI, kb_BR, w)
        case _:
            raise ValueError(f'read() got backend {backend!r}, expected "torch" or "triton"')
