"""LayerNorm over the last dimension, together with the additions before it.

    h = x + v + residual        xh = (h - mean) rstd        y = xh w + b        mean, rstd: of each row of h as stored

v is the bias of the product that made x, a number for each column: adding it here is free, where in that product it
is not (65,536 rows of 320 on an H100: 58 us instead of 36).

Backward, with e the gradient that reaches h from elsewhere, and E the mean over a row:

    dh = e + rstd (w dy - E[w dy] - xh E[w dy xh])        dw = sum dy xh        db = sum dy        sums over rows

dx and dresidual are both dh; dv is its sum over rows.
"""

import torch
import triton
import triton.language as tl
from sidfast.kernels.backend import UNFUSED, require, share, triton_runs_on, widen
from sidfast.kernels.channel_stats import column_sums, sum_rows


def layer_norm_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5,
                         residual: torch.Tensor | None = None, bias_of_x: torch.Tensor | None = None
                         ) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [..., C]; weight, bias, bias_of_x [C]. Returns h and y, both [..., C] in x's type."""
    h = sum((widen(v) for v in (bias_of_x, residual) if v is not None), widen(x)).to(x.dtype)
    centred = widen(h) - widen(h).mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    y = centred / (variance + eps).sqrt() * widen(weight) + widen(bias)
    return h, y.to(x.dtype)


@triton.jit
def _layer_norm_kernel(p_x, p_bias_of_x, p_residual, p_weight, p_bias, p_h, p_y, p_mean, p_rstd, T, C, eps,
                       BIAS: tl.constexpr, ADD: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_c = tl.arange(0, BC)
    m_t, m_c = o_t < T, o_c < C
    m = m_t[:, None] & m_c[None, :]
    o = o_t[:, None] * C + o_c[None, :]
    b_h = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    if BIAS:
        b_h += tl.load(p_bias_of_x + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if ADD:
        b_h += tl.load(p_residual + o, mask=m, other=0.0).to(tl.float32)
    if BIAS or ADD:
        b_stored = b_h.to(p_h.dtype.element_ty)
        tl.store(p_h + o, b_stored, mask=m)
        b_h = b_stored.to(tl.float32)
    b_mean = tl.sum(b_h, 1) / C
    b_centred = tl.where(m, b_h - b_mean[:, None], 0.0)
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_centred * b_centred, 1) / C + eps)
    b_weight = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_y = b_centred * b_rstd[:, None] * b_weight[None, :] + b_bias[None, :]
    tl.store(p_y + o, b_y.to(p_y.dtype.element_ty), mask=m)
    tl.store(p_mean + o_t, b_mean, mask=m_t)
    tl.store(p_rstd + o_t, b_rstd, mask=m_t)


@triton.jit
def _layer_norm_backward_kernel(p_dy, p_h, p_mean, p_rstd, p_weight, p_residual, p_dh, p_sums, T, C, blocks,
                                ADD: tl.constexpr, AFFINE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    i_p = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    b_weight = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([BT, BC], tl.float32)
    b_dbias = tl.zeros([BT, BC], tl.float32)
    b_dh_sum = tl.zeros([BT, BC], tl.float32)
    for i in tl.range(blocks, num_stages=3 if BC <= 2048 else 1):            # (shared memory for two stages ahead)
        o_t = (i_p * blocks + i) * BT + tl.arange(0, BT)
        m_t = o_t < T
        m = m_t[:, None] & m_c[None, :]
        o = o_t[:, None] * C + o_c[None, :]
        b_dy = tl.load(p_dy + o, mask=m, other=0.0).to(tl.float32)
        b_h = tl.load(p_h + o, mask=m, other=0.0).to(tl.float32)
        b_mean = tl.load(p_mean + o_t, mask=m_t, other=0.0)
        b_rstd = tl.load(p_rstd + o_t, mask=m_t, other=0.0)
        b_xh = (b_h - b_mean[:, None]) * b_rstd[:, None]
        b_g = b_dy * b_weight[None, :]                   # 0 beyond the row, as rstd is beyond the last row
        b_level = tl.sum(b_g, 1) / C
        b_slope = tl.sum(b_g * b_xh, 1) / C
        b_dh = b_rstd[:, None] * (b_g - b_level[:, None] - b_xh * b_slope[:, None])
        if ADD:
            b_dh += tl.load(p_residual + o, mask=m, other=0.0).to(tl.float32)
        tl.store(p_dh + o, b_dh.to(p_dh.dtype.element_ty), mask=m)
        if AFFINE:
            b_dweight += b_dy * b_xh
            b_dbias += b_dy
            b_dh_sum += b_dh
    if AFFINE:
        p = p_sums + i_p * 3 * C + o_c
        tl.store(p, tl.sum(b_dweight, 0), mask=m_c)
        tl.store(p + C, tl.sum(b_dbias, 0), mask=m_c)
        tl.store(p + 2 * C, tl.sum(b_dh_sum, 0), mask=m_c)


def _tile(C, elements):
    """A whole row, and as many rows as make about `elements`: sixteen for a thread while 8 warps can have them (more
    warps leave a thread too few registers)."""
    BC = triton.next_power_of_2(C)
    BT = max(1, elements // BC)
    return UNFUSED | {"BT": BT, "BC": BC, "num_warps": min(8 if BC <= 8192 else 16, BT * BC // 512)}


def layer_norm_forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float,
                       residual: torch.Tensor | None = None, bias_of_x: torch.Tensor | None = None
                       ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(h, y, mean [T], rstd [T]) for x and residual [..., C] of T rows, weight, bias, bias_of_x [C], all contiguous.

    h and y have x's shape and type, h is x itself with nothing to add; mean and rstd are fp32. ValueError for shapes
    that do not fit, or strides.
    """
    C, T = x.shape[-1], x.shape[:-1].numel()
    require("layer_norm_forward", *((v, x.shape) for v in (x, residual)),
            *((v, (C,)) for v in (weight, bias, bias_of_x)))
    h = x if residual is None and bias_of_x is None else torch.empty_like(x)
    y, tile = torch.empty_like(x), _tile(C, 2048)
    mean, rstd = (x.new_empty(T, dtype=torch.float32) for _ in range(2))
    _layer_norm_kernel[(triton.cdiv(T, tile["BT"]),)](
        p_x=x, p_bias_of_x=bias_of_x, p_residual=residual, p_weight=weight, p_bias=bias, p_h=h, p_y=y, p_mean=mean,
        p_rstd=rstd, T=T, C=C, eps=eps, BIAS=bias_of_x is not None, ADD=residual is not None, **tile)
    return h, y, mean, rstd


def layer_norm_backward(dy: torch.Tensor, h: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor,
                        residual: torch.Tensor | None = None, affine: bool = True
                        ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dh, dweight, dbias, dh_sum) of layer_norm_forward.

    residual: a gradient of h's shape that is added to dh. dh has h's shape and type; dweight, dbias and dh_sum, the sum
    of dh over rows, are [C] in weight's type, or None without `affine`. ValueError for shapes that do not fit, or
    strides.
    """
    C, T = h.shape[-1], h.shape[:-1].numel()
    require("layer_norm_backward", *((v, h.shape) for v in (dy, h, residual)), *((v, (T,)) for v in (mean, rstd)),
            (weight, (C,)))
    dh, tile = torch.empty_like(h), _tile(C, 1024)
    programs, blocks = share(triton.cdiv(T, tile["BT"]), h.device, density=4 if affine else 8)
    sums = mean.new_empty(programs, 3, C) if affine else None
    _layer_norm_backward_kernel[(programs,)](
        p_dy=dy, p_h=h, p_mean=mean, p_rstd=rstd, p_weight=weight, p_residual=residual, p_dh=dh, p_sums=sums, T=T, C=C,
        blocks=blocks, ADD=residual is not None, AFFINE=affine, **tile)
    return dh, *(sum_rows(sums.flatten(1), weight.dtype).view(3, C) if affine else (None, None, None))


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, bias_of_x, eps):
        h, y, mean, rstd = layer_norm_forward(x, weight, bias, eps, residual, bias_of_x)
        ctx.save_for_backward(h, mean, rstd, weight)
        ctx.set_materialize_grads(False)
        return h, y

    @staticmethod
    def backward(ctx, dh, dy):
        h, mean, rstd, weight = ctx.saved_tensors
        _, need_residual, *need_sums, _ = ctx.needs_input_grad
        dh = None if dh is None else dh.contiguous()
        if dy is None:                                   # (weight and bias have no part in h)
            sums = None, None, column_sums(dh.flatten(0, -2), dh.dtype) if need_sums[2] else None
        else:
            dh, *sums = layer_norm_backward(dy.contiguous(), h, mean, rstd, weight, dh, any(need_sums))
        return dh, dh if need_residual else None, *(v if need else None for v, need in zip(
            sums, need_sums, strict=True)), None


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5,
               residual: torch.Tensor | None = None, bias_of_x: torch.Tensor | None = None
               ) -> tuple[torch.Tensor, torch.Tensor]:
    """(h, y): h = x + bias_of_x + residual (x itself without them), y = LayerNorm of h over the last dimension.

    x, residual [..., C], weight, bias, bias_of_x [C], in any of fp32, bf16, fp16; h and y have x's type. Differentiable
    in all. ValueError of the kernels for shapes that do not fit.
    """
    if not triton_runs_on(x):
        return layer_norm_reference(x, weight, bias, eps, residual, bias_of_x)
    tensors = [None if v is None else v.contiguous() for v in (x, residual, weight, bias, bias_of_x)]
    return _LayerNorm.apply(*tensors, eps)
