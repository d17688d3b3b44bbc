"""Differentiable operations of the fused UNet: `sidfast.kernels` and matrix products, with backward passes by hand.

Images are [N, H, W, C] (channels last in memory), tokens [N, S, C]. What makes them fast:

- A GroupNorm gets its statistics from whoever wrote its input, and a skip connection is never concatenated.
- A tensor that a norm reads and that goes on beside it comes back from the norm unchanged, so that its gradient is
  added inside the norm's backward kernel.
- The bias of a product is added by the norm that reads the product, and gets its gradient there (`bias_of_x`). GEGLU
  gives the gradient, too, but leaves the adding to the product: it would lose more time than the product gains.
- Frozen weights (requires_grad False) save no activation for a gradient that nobody wants.
- What is saved of a weight is the parameter itself: ZeRO stage 3 takes its memory back between the passes.

"Statistics" are those of `add_channel_stats`, fp32 [N, chunks, 2, C]. For shapes or strides that they do not take, the
kernels raise ValueError.
"""

import torch
from torch import nn

from sidfast.accel.prepacked import channels_last, concat_rows
from sidfast.kernels.channel_stats import add_channel_stats, column_sums
from sidfast.kernels.group_norm import group_norm as fused_group_norm
from sidfast.kernels.layer_norm import layer_norm as fused_layer_norm
from sidfast.kernels.upsample import combine_taps, interleave, separate, separate_taps

_aten = torch.ops.aten


def conv(x: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor | None = None, bias: torch.Tensor | None = None,
         residual: torch.Tensor | None = None, stride: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """y = conv(x) + bias + residual [N, H', W', K], and its statistics for the next GroupNorm.

    x [N, H, W, C]; weight [K, C, 3, 3] (padding 1), [K, C, 1, 1] or [K, C]; `packed`: the same channels last, made in
    either pass if None; bias [K]; residual like y. `stride` applies to 3x3 kernels alone.
    """
    return _Conv.apply(x, weight, packed, bias, residual, stride)


def upsample_conv(x: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor | None, bias: torch.Tensor
                  ) -> tuple[torch.Tensor, torch.Tensor]:
    """conv of x at twice the size, nearest neighbour, plus bias; and its statistics for the next GroupNorm.

    x [N, H, W, C]; weight [K, C, 3, 3] (padding 1); `packed`: `combine_taps` of it, made in either pass if None; bias
    [K]. The result is [N, 2H, 2W, K].
    """
    return _UpsampleConv.apply(x, weight, packed, bias)


def group_norm(x: torch.Tensor, stats: torch.Tensor, norm: nn.Module, silu: bool = False,
               shift: torch.Tensor | None = None, skip: torch.Tensor | None = None,
               skip_stats: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(y, x, skip): GroupNorm `norm` (a module) of x + shift, with `skip` as further channels, then SiLU or not.

    x [N, H, W, C1], skip [N, H, W, C2]; stats of both from `conv`; shift [N, C1 + C2]; y [N, H, W, C1 + C2]. Use the
    returned x and skip for whatever else reads them.
    """
    return fused_group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu, shift, skip, stats, skip_stats)


def layer_norm(x: torch.Tensor, norm: nn.Module, bias_of_x: torch.Tensor | None = None,
               residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(h, y): h = x + bias_of_x + residual, y = LayerNorm `norm` (a module) of h; all [N, S, C], `bias_of_x` [C]."""
    return fused_layer_norm(x, norm.weight, norm.bias, norm.eps, residual, bias_of_x)


def add(x: torch.Tensor, bias_of_x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """x + bias_of_x + residual, all [N, S, C], `bias_of_x` [C]: for what no norm reads next."""
    return _Add.apply(x, bias_of_x, residual)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., C], weight [K, C] or [K, C, 1, 1] -> [..., K]; `bias` [K], detached, has its gradient from GEGLU."""
    return _Linear.apply(x, weight, bias)


def joint_linear(x: torch.Tensor, skip: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """x [N, H, W, C1] and skip [N, H, W, C2] (or None), as if concatenated, through weight [K, C1 + C2, 1, 1]."""
    return _JointLinear.apply(x, skip, weight)


def projections(x: torch.Tensor, packed: torch.Tensor | None, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x [N, S, C] through several weights [K, C] in one product: a tuple of [N, S, K]. `packed`: the weights as one,
    made of them if None."""
    return _Projections.apply(x, packed, *weights)


def _pointwise(weight):
    return weight.ndim == 2 or weight.shape[2:] == (1, 1)


def _weight_gradient(dy, x):
    """[K, C]: the gradient of a weight between x [..., C] and dy [..., K]."""
    return dy.flatten(0, -2).t() @ x.flatten(0, -2)


def _convolve(x, weight, stride=1):
    if _pointwise(weight):
        return x @ weight.flatten(1).t()
    y = _aten.convolution(x.permute(0, 3, 1, 2), weight, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1)
    return y.permute(0, 2, 3, 1).contiguous()


def _convolve_backward(dy, x, x_shape, weight, stride, need_x, need_weight):
    """(dx, dweight); x may be None without need_weight."""
    if _pointwise(weight):
        dx = dy @ weight.flatten(1) if need_x else None
        return dx, _weight_gradient(dy, x).view_as(weight) if need_weight else None
    if x is None:
        x = dy.new_empty(x_shape)                        # its values are not read
    dx, dweight, _ = _aten.convolution_backward(
        dy.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1,
        [need_x, need_weight, False])
    return dx.permute(0, 2, 3, 1).contiguous() if need_x else None, dweight


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, packed, bias, residual, stride):
        y = _convolve(x, channels_last(weight) if packed is None else packed, stride)
        y, stats = add_channel_stats(y, residual, bias, out=y)
        ctx.save_for_backward(x if weight.requires_grad else None, weight, packed)
        ctx.stride, ctx.x_shape = stride, x.shape
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)                 # (of the statistics: zeros in a launch of their own)
        return y, stats

    @staticmethod
    def backward(ctx, dy, _):
        x, weight, packed = ctx.saved_tensors
        need_x, need_weight, _, need_bias, need_residual, _ = ctx.needs_input_grad
        dy = dy.contiguous()
        packed = channels_last(weight) if packed is None else packed
        dx, dweight = _convolve_backward(dy, x, ctx.x_shape, packed, ctx.stride, need_x, need_weight)
        dbias = column_sums(dy.flatten(0, -2), weight.dtype) if need_bias else None
        return dx, dweight, None, dbias, dy if need_residual else None, None


class _UpsampleConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, packed, bias):
        y, stats = interleave(_convolve(x, combine_taps(weight) if packed is None else packed), bias)
        ctx.save_for_backward(x if weight.requires_grad else None, weight, packed)
        ctx.x_shape = x.shape
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return y, stats

    @staticmethod
    def backward(ctx, dy, _):
        x, weight, packed = ctx.saved_tensors
        need_x, need_weight, _, need_bias = ctx.needs_input_grad
        dy = dy.contiguous()
        packed = combine_taps(weight) if packed is None else packed
        dx, dpacked = _convolve_backward(separate(dy), x, ctx.x_shape, packed, 1, need_x, need_weight)
        dbias = column_sums(dy.flatten(0, -2), packed.dtype) if need_bias else None
        return dx, separate_taps(dpacked) if need_weight else None, None, dbias


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias_of_x, residual):
        return add_channel_stats(x, residual, bias_of_x)[0]                  # (the statistics cost no time beside it)

    @staticmethod
    def backward(ctx, dy):
        dy = dy.contiguous()
        return dy, column_sums(dy.flatten(0, -2), dy.dtype) if ctx.needs_input_grad[1] else None, dy


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return _aten.linear(x, weight.flatten(1), bias)  # (at stage 3 DeepSpeed's own is in F.linear's place)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        dy = dy.contiguous()
        dx = dy @ weight.flatten(1) if need_x else None
        return dx, _weight_gradient(dy, x).view_as(weight) if need_weight else None, None


class _JointLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, skip, weight):
        matrix, C1 = weight.flatten(1), x.shape[-1]
        y = x @ matrix[:, :C1].t()
        if skip is not None:
            y = torch.addmm(y.flatten(0, 2), skip.flatten(0, 2), matrix[:, C1:].t()).view_as(y)
        ctx.save_for_backward(*((x, skip) if weight.requires_grad else (None, None)), weight)
        ctx.C1 = C1
        return y

    @staticmethod
    def backward(ctx, dy):
        *inputs, weight = ctx.saved_tensors
        need_x, need_skip, need_weight = ctx.needs_input_grad
        dy, matrix, dweight = dy.contiguous(), weight.flatten(1), None
        if need_weight:
            dweight = torch.cat([_weight_gradient(dy, v) for v in inputs if v is not None], 1).view_as(weight)
        return (dy @ matrix[:, :ctx.C1] if need_x else None, dy @ matrix[:, ctx.C1:] if need_skip else None, dweight)


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, *weights):
        ctx.save_for_backward(x if any(w.requires_grad for w in weights) else None, *weights)
        ctx.x_shape = x.shape
        packed = concat_rows(weights) if packed is None else packed
        return (x @ packed.t()).split([len(w) for w in weights], -1)

    @staticmethod
    def backward(ctx, *dys):
        x, *weights = ctx.saved_tensors
        dys, dx = [dy.flatten(0, -2) for dy in dys], None                    # (may copy: once, then)
        if ctx.needs_input_grad[0]:
            dx = dys[0] @ weights[0]
            for dy, weight in zip(dys[1:], weights[1:], strict=True):
                dx.addmm_(dy, weight)
            dx = dx.view(ctx.x_shape)
        return dx, None, *(_weight_gradient(dy, x) if need else None for dy, need in zip(
            dys, ctx.needs_input_grad[2:], strict=True))
