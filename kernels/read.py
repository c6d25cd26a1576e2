"""read: what the fast weights add to a linear's output.

    y = ((x Kᵀ + bias) ⊙ w) U

Many rows may share one pair of factors and differ only in `w`: the same model at different moments
(DESIGN §3.3). A slot of weight 0 is dead: whatever it holds, NaN included, it adds nothing.
"""

from __future__ import annotations

import torch

from .linear import product
from .values import FUSED, jit, on_its_gpu, require_triton, tl, triton


def reference(
    x_BTI: torch.Tensor,
    U_BRO: torch.Tensor,
    K_BRI: torch.Tensor,
    bias_BR: torch.Tensor | None,
    w: torch.Tensor | None,
) -> torch.Tensor:
    """The definition, in torch: factors of batch 1 (or of stride 0) serve every row of x."""
    dtype = U_BRO.dtype
    B, T, _ = x_BTI.shape
    R, O = U_BRO.shape[1:]
    if R == 0:
        return x_BTI.new_zeros(B, T, O, dtype=dtype)
    if w is None:
        c_BTR = _times(x_BTI.to(dtype), K_BRI.mT)
        return _times(c_BTR if bias_BR is None else c_BTR + bias_BR[:, None], U_BRO)
    w_BTR = (w if w.dim() == 3 else w[:, None]).to(dtype).expand(B, T, R)
    x_BTI = x_BTI.to(dtype)
    if B > 1 and _shared(U_BRO) and _shared(K_BRI):  # one large product instead of B small ones
        bias_BR = None if bias_BR is None else bias_BR.expand(B, R)[:, None].expand(B, T, R).reshape(1, B * T, R)
        y = _masked(x_BTI.reshape(1, B * T, -1), U_BRO[:1], K_BRI[:1], bias_BR, w_BTR.reshape(1, B * T, R))
        return y.view(B, T, O)
    bias_BR = None if bias_BR is None else bias_BR[:, None]
    return _masked(x_BTI, U_BRO, K_BRI, bias_BR, w_BTR)


def _shared(factor: torch.Tensor) -> bool:
    return factor.shape[0] == 1 or factor.stride(0) == 0


def _times(x_BTI: torch.Tensor, W_BIO: torch.Tensor) -> torch.Tensor:
    if len(W_BIO) == 1:
        return product(x_BTI, W_BIO[0].T)
    # bmm, where the batches agree, saves `@` its look at every dimension: this runs at each token
    return torch.bmm(x_BTI, W_BIO) if len(x_BTI) == len(W_BIO) else x_BTI @ W_BIO


def _masked(x_BTI, U_BRO, K_BRI, bias_BTR, w_BTR):
    c_BTR = _times(x_BTI, K_BRI.mT)
    if bias_BTR is not None:
        c_BTR = c_BTR + bias_BTR
    c_BTR = (c_BTR * w_BTR).masked_fill(w_BTR == 0, 0)
    y_BTO = _times(c_BTR, U_BRO)
    if y_BTO.is_cpu and not torch.compiler.is_compiling() and bool(y_BTO.detach().sum().isfinite()):
        return y_BTO
    # 0 · NaN is NaN: take what is not finite out of U, and give NaN only to who reads it alive
    finite = U_BRO.isfinite()
    poisoned = (w_BTR != 0).to(c_BTR.dtype) @ (~finite).to(c_BTR.dtype)
    return (c_BTR @ U_BRO.masked_fill(~finite, 0)).masked_fill(poisoned > 0, float("nan"))


# ---- Triton


@jit
def _coefficients(
    x_ptr, K_ptr, bias_ptr, w_ptr, c_ptr, T, I, R, K_sb, bias_sb, w_sb, w_st, BIAS: tl.constexpr,
    BT: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c [B, T, R] = (x Kᵀ + bias) ⊙ w, 0 where w is 0."""
    b = tl.program_id(2).to(tl.int64)  # before any multiply: offsets pass 2**31
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    r = tl.program_id(1).to(tl.int64) * BR + tl.arange(0, BR)
    t_in, r_in = (t < T)[:, None], (r < R)[None, :]
    c = tl.full([BT, BR], 0.0, tl.float32)
    for i0 in range(0, I, BI):
        i = i0 + tl.arange(0, BI)
        x = tl.load(x_ptr + (b * T + t)[:, None] * I + i[None, :], mask=t_in & (i < I)[None, :], other=0.0)
        K = tl.load(K_ptr + b * K_sb + r[None, :] * I + i[:, None], mask=r_in & (i < I)[:, None], other=0.0)
        c = tl.dot(x.to(tl.float32), K, c, input_precision=PRECISION)
    if BIAS:
        c += tl.load(bias_ptr + b * bias_sb + r, mask=r < R, other=0.0)[None, :]
    w = tl.load(w_ptr + b * w_sb + t[:, None] * w_st + r[None, :], mask=t_in & r_in, other=0.0)
    c = tl.where(w != 0, c * w, 0.0)
    tl.store(c_ptr + (b * T + t)[:, None] * R + r[None, :], c, mask=t_in & r_in)


@jit
def _combine(
    c_ptr, U_ptr, w_ptr, y_ptr, T, O, R, U_sb, w_sb, w_st,
    BT: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [B, T, O] = c U, without what dead slots hold."""
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o = tl.program_id(1).to(tl.int64) * BO + tl.arange(0, BO)
    t_in, o_in = (t < T)[:, None], (o < O)[None, :]
    y = tl.full([BT, BO], 0.0, tl.float32)
    bad = 0  # values that are not finite
    for r0 in range(0, R, BR):
        r = r0 + tl.arange(0, BR).to(tl.int64)
        c = tl.load(c_ptr + (b * T + t)[:, None] * R + r[None, :], mask=t_in & (r < R)[None, :], other=0.0)
        U = tl.load(U_ptr + b * U_sb + r[:, None] * O + o[None, :], mask=(r < R)[:, None] & o_in, other=0.0)
        finite = tl.abs(U) < float("inf")
        bad += tl.sum(tl.where(finite, 0, 1))
        y = tl.dot(c, tl.where(finite, U, 0.0), y, input_precision=PRECISION)
    if bad > 0:  # 0 · NaN is NaN, so they were left out: now NaN for those who read them alive
        U_row = U_ptr + b * U_sb + o
        for r in range(0, R):
            w = tl.load(w_ptr + b * w_sb + t * w_st + r, mask=t < T, other=0.0)
            U_r = tl.load(U_row, mask=o < O, other=0.0)
            U_row += O
            poisoned = (w != 0)[:, None] & ~(tl.abs(U_r) < float("inf"))[None, :]
            y = tl.where(poisoned, float("nan"), y)
    tl.store(y_ptr + (b * T + t)[:, None] * O + o[None, :], y, mask=t_in & o_in)


@on_its_gpu
def launch(
    x_BTI: torch.Tensor,
    U_BRO: torch.Tensor,
    K_BRI: torch.Tensor,
    bias_BR: torch.Tensor | None,
    w: torch.Tensor,
) -> torch.Tensor:
    """The read by Triton, float32: two launches, coefficients and combination. x of half precision asks for TF32."""
    require_triton(x_BTI, U_BRO, K_BRI)
    precision = "tf32" if x_BTI.dtype.itemsize < 4 else "ieee"
    (B, T, I), (R, O) = x_BTI.shape, U_BRO.shape[1:]
    x_BTI = x_BTI.contiguous()
    y_BTO = torch.empty(B, T, O, dtype=torch.float32, device=x_BTI.device)
    if R == 0 or y_BTO.numel() == 0:
        return y_BTO.zero_()
    w_BTR = (w if w.dim() == 3 else w[:, None]).float().expand(B, T, R)
    U_BRO, K_BRI = (f if f.stride()[1:] == (f.shape[2], 1) else f.contiguous() for f in (U_BRO, K_BRI))
    if w_BTR.stride(2) != 1:
        w_BTR = w_BTR.contiguous()
    bias = K_BRI if bias_BR is None else bias_BR
    if bias.stride(-1) != 1:
        bias = bias.contiguous()
    rows, tokens = B, T
    if B > 1 and _shared(U_BRO) and _shared(K_BRI) and (bias_BR is None or _shared(bias)):
        rows, tokens = 1, B * T  # shared factors: one row of many tokens fills the tiles
        w_BTR = w_BTR.reshape(1, B * T, R)

    def stride(x: torch.Tensor) -> int:
        return 0 if x.shape[0] == 1 else x.stride(0)

    c = torch.empty(rows, tokens, R, dtype=torch.float32, device=x_BTI.device)
    BT = 16 if tokens <= 16 else 32
    _coefficients[(triton.cdiv(tokens, BT), triton.cdiv(R, 32), rows)](
        x_BTI, K_BRI, bias, w_BTR, c, tokens, I, R, stride(K_BRI), stride(bias), w_BTR.stride(0), w_BTR.stride(1),
        BIAS=bias_BR is not None, BT=BT, BR=32, BI=32, PRECISION=precision, num_warps=4, **FUSED,
    )  # fmt: skip
    _combine[(triton.cdiv(tokens, BT), triton.cdiv(O, 64), rows)](
        c, U_BRO, w_BTR, y_BTO, tokens, O, R, stride(U_BRO), w_BTR.stride(0), w_BTR.stride(1),
        BT=BT, BO=64, BR=16, PRECISION=precision, num_warps=4, **FUSED,
    )  # fmt: skip
    return y_BTO


# ---- as an operator: lives inside torch.compile and CUDA graphs


@torch.library.custom_op("fastweights::read", mutates_args=(), device_types="cuda")
def _op(x: torch.Tensor, U: torch.Tensor, K: torch.Tensor, bias: torch.Tensor | None, w: torch.Tensor) -> torch.Tensor:
    return launch(x, U, K, bias, w)


@_op.register_kernel("cpu")
def _(x, U, K, bias, w):
    return reference(x, U, K, bias, w)


@_op.register_fake
def _(x, U, K, bias, w):
    return x.new_empty(x.shape[0], x.shape[1], U.shape[2], dtype=U.dtype)


def _save(ctx, inputs, output):
    x, U, K, _, w = inputs
    ctx.save_for_backward(U, K, w)
    ctx.dtype = x.dtype


def _backward(ctx, grad):
    U, K, w = ctx.saved_tensors
    grad_x = _op(grad, K, U, None, w).to(ctx.dtype)  # the same read, keys and values swapped
    return grad_x, None, None, None, None


_op.register_autograd(_backward, setup_context=_save)


def read(
    x_BTI: torch.Tensor,
    U_BRO: torch.Tensor,
    K_BRI: torch.Tensor,
    bias_BR: torch.Tensor | None,
    w: torch.Tensor | None,
    backend: str = "torch",
) -> torch.Tensor:
    """What the fast weights add: ((x Kᵀ + bias) ⊙ w) U, shape [B, T, O] in the factors' dtype.

    x [B, T, I] any float dtype; U [B, R, O], K [B, R, I], bias [B, R] or None (no fast bias), each with batch
    B or 1; w [B, R], or [B, T, R] when tokens look at different moments; None: every slot is alive and weighs 1.
    Differentiable in x.
    """
    match backend:
        case "torch":
            return reference(x_BTI, U_BRO, K_BRI, bias_BR, w)
        case "triton":
            if w is None:
                w = torch.ones_like(K_BRI[..., 0])
            run = _op if x_BTI.is_cuda else launch  # on the CPU: Triton's interpreter
            return run(x_BTI, U_BRO, K_BRI, bias_BR, w)
        case _:
            raise ValueError(f'read() got backend {backend!r}, expected "torch" or "triton"')
