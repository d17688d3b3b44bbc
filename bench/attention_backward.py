"""A question: is a backward pass of attention in Triton faster than cuDNN's? `python bench/attention_backward.py`.

Needs a GPU. Nothing of it is used elsewhere. Five products for each block of keys and each block of queries, as cuDNN
does it: the gradient of q is added up in fp32 by atomics, in any order. What could make it faster than cuDNN's:
nothing is paid for heads of 64 in the products over heads of 40 (`SPLIT`), and the three gradients lie in one tensor,
so that the products after it are one instead of three.

With p = exp(scale q k - lse) and delta = sum over d of o do:

    dv = p' do        ds = p (do v' - delta)        dk = scale ds' q        dq = scale ds k
"""

import subprocess
import sys

import torch
import triton
import triton.language as tl
from harness import find_machine, seconds
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

LOG2E = tl.constexpr(1.4426950408889634)
SHAPES = ((16, 4096, 8, 40), (16, 1024, 8, 80), (16, 4096, 10, 64))                 # N, S, heads, d
TILES = [(64, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 1), (64, 64, 8, 2), (128, 64, 8, 2), (32, 64, 4, 2),
         (128, 128, 8, 2)]                                                           # queries, keys, warps, stages
VARIANTS = {"plain": {}, "both products first": {"early": True}, "split": {"split": True}}


@triton.jit
def _delta_kernel(p_o, p_do, p_lse, p_delta, p_lse2, S, H, T, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Rows are (n, s, h) of [N, S, H, D]; delta and the logarithm's base go to [N, H, S]."""
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m = (o_t < T)[:, None] & (o_d < D)[None, :]
    o = o_t[:, None] * D + o_d[None, :]
    b = tl.load(p_o + o, mask=m, other=0.0).to(tl.float32) * tl.load(p_do + o, mask=m, other=0.0).to(tl.float32)
    o_to = o_t // (S * H) * (S * H) + o_t % H * S + o_t // H % S
    tl.store(p_delta + o_to, tl.sum(b, 1), mask=o_t < T)
    b_lse = tl.load(p_lse + o_to, mask=o_t < T, other=0.0)
    tl.store(p_lse2 + o_to, b_lse * LOG2E, mask=o_t < T)


@triton.jit
def _finish_kernel(p_dq, p_to, R, C, T, scale, BT: tl.constexpr, BC: tl.constexpr):
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m = (o_t < T)[:, None] & (o_c < C)[None, :]
    b = tl.load(p_dq + o_t[:, None] * C + o_c[None, :], mask=m, other=0.0) * scale
    tl.store(p_to + o_t[:, None] * R + o_c[None, :], b.to(p_to.dtype.element_ty), mask=m)


@triton.jit
def _attention_backward_kernel(p_q, p_k, p_v, p_do, p_lse2, p_delta, p_dq, p_dk, p_dv, S, H, R, RO, RD, scale,
                               D: tl.constexpr, SPLIT: tl.constexpr, EARLY: tl.constexpr, STAGES: tl.constexpr,
                               BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    i_j, i_nh = tl.program_id(0), tl.program_id(1)
    i_n, i_h = (i_nh // H).to(tl.int64), i_nh % H
    HALF: tl.constexpr = BD // 2
    o_d = tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    o_d = i_h * D + o_d[None, :]
    o_n = (i_n * S + i_j * BN + tl.arange(0, BN))[:, None]
    b_k = tl.load(p_k + o_n * R + o_d, mask=m_d, other=0.0)
    b_v = tl.load(p_v + o_n * R + o_d, mask=m_d, other=0.0)
    if SPLIT:
        o_1 = i_h * D + tl.arange(0, HALF)[None, :]
        o_2 = HALF + tl.arange(0, 16)
        m_2 = (o_2 < D)[None, :]
        o_2 = i_h * D + o_2[None, :]
        b_k1 = tl.load(p_k + o_n * R + o_1)
        b_k2 = tl.load(p_k + o_n * R + o_2, mask=m_2, other=0.0)
        b_v1 = tl.load(p_v + o_n * R + o_1)
        b_v2 = tl.load(p_v + o_n * R + o_2, mask=m_2, other=0.0)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    for start in tl.range(0, S, BM, num_stages=STAGES):
        o_s = start + tl.arange(0, BM)
        o_m = (i_n * S + o_s)[:, None]
        b_q = tl.load(p_q + o_m * R + o_d, mask=m_d, other=0.0)
        b_do = tl.load(p_do + o_m * RO + o_d, mask=m_d, other=0.0)
        b_lse2 = tl.load(p_lse2 + i_nh * S + o_s)
        b_delta = tl.load(p_delta + i_nh * S + o_s)
        if SPLIT:
            b_q1 = tl.load(p_q + o_m * R + o_1)
            b_q2 = tl.load(p_q + o_m * R + o_2, mask=m_2, other=0.0)
            b_do1 = tl.load(p_do + o_m * RO + o_1)
            b_do2 = tl.load(p_do + o_m * RO + o_2, mask=m_2, other=0.0)
            b_s = tl.dot(b_k2, tl.trans(b_q2), tl.dot(b_k1, tl.trans(b_q1)))
        else:
            b_s = tl.dot(b_k, tl.trans(b_q))             # [BN, BM]
        if EARLY:
            b_dp = tl.dot(b_v, tl.trans(b_do))
        b_p = tl.exp2(b_s * (scale * LOG2E) - b_lse2[None, :])
        b_dv += tl.dot(b_p.to(b_do.dtype), b_do)
        if not EARLY:
            if SPLIT:
                b_dp = tl.dot(b_v2, tl.trans(b_do2), tl.dot(b_v1, tl.trans(b_do1)))
            else:
                b_dp = tl.dot(b_v, tl.trans(b_do))
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
        b_dk += tl.dot(b_ds, b_q)
        b_dq = tl.dot(tl.trans(b_ds), b_k)
        tl.atomic_add(p_dq + o_m * (H * D) + o_d, b_dq, mask=m_d, sem="relaxed")
    tl.store(p_dk + o_n * RD + o_d, (b_dk * scale).to(p_dk.dtype.element_ty), mask=m_d)
    tl.store(p_dv + o_n * RD + o_d, b_dv.to(p_dv.dtype.element_ty), mask=m_d)


class Backward:
    """A backward pass of attention on q, k, v [N, S, H, d], with buffers of its own."""

    def __init__(self, q, k, v, o, lse, do, queries, keys, warps, stages, split=False, early=False):
        N, S, H, D = q.shape
        self.d = torch.empty(N, S, 3, H, D, dtype=q.dtype, device=q.device)
        self.dq = torch.empty(N, S, H, D, device=q.device)
        self.delta, self.lse2 = (torch.empty(N, H, S, device=q.device) for _ in range(2))
        self.tensors, self.tile = (q, k, v, o, lse, do), (queries, keys, warps, stages)
        self.options = {"SPLIT": split, "EARLY": early, "BD": max(16, triton.next_power_of_2(D)), "D": D}

    def __call__(self):
        """[N, S, 3, H, d]: the gradients of q, k and v."""
        (q, *_, o, lse, do), d = self.tensors, self.d
        N, S, H, D = q.shape
        self.dq.zero_()
        _delta_kernel[(triton.cdiv(N * S * H, 64),)](
            p_o=o, p_do=do, p_lse=lse, p_delta=self.delta, p_lse2=self.lse2, S=S, H=H, T=N * S * H, D=D, BT=64,
            BD=self.options["BD"], num_warps=4)
        self.products()
        _finish_kernel[(triton.cdiv(N * S, 32), triton.cdiv(H * D, 64))](
            p_dq=self.dq, p_to=d, R=d.stride(1), C=H * D, T=N * S, scale=D**-0.5, BT=32, BC=64, num_warps=4)
        return d

    def products(self):
        """The kernel that has them all."""
        (q, k, v, _, _, do), d = self.tensors, self.d
        N, S, H, D = q.shape
        queries, keys, warps, stages = self.tile
        _attention_backward_kernel[(S // keys, N * H)](
            p_q=q, p_k=k, p_v=v, p_do=do, p_lse2=self.lse2, p_delta=self.delta, p_dq=self.dq, p_dk=d[:, :, 1],
            p_dv=d[:, :, 2], S=S, H=H, R=q.stride(1), RO=do.stride(1), RD=d.stride(1), scale=D**-0.5, STAGES=stages,
            BM=queries, BN=keys, num_warps=warps, **self.options)


def cudnn(qkv, do):
    """q, k, v, the output, the logarithms of its sums [N, H, S], and a call of the backward pass."""
    q, k, v = qkv.unbind(2)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        y = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    with torch.no_grad():
        _, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *(x.detach().transpose(1, 2) for x in (q, k, v)), None, True)
    gradient = do.transpose(1, 2)
    return q, k, v, y, lse, lambda: torch.autograd.grad(y, (q, k, v), gradient, retain_graph=True)


def draw(N, S, H, D, device, dtype):
    generator = torch.Generator().manual_seed(0)
    qkv, do = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((N, S, 3, H, D), (N, S, H, D)))
    return qkv.requires_grad_(), do


def compare(variant, tile, device):
    """Prints the errors of all three gradients against float64, cuDNN's beside them."""
    qkv, do = draw(1, 1024, 2, 40, device, torch.bfloat16)
    q, k, v, y, lse, theirs = cudnn(qkv, do)
    exact = qkv.detach().double().requires_grad_()
    want = torch.autograd.grad(scaled_dot_product_attention(*(x.transpose(1, 2) for x in exact.unbind(2))), exact,
                               do.double().transpose(1, 2))[0]
    ours = Backward(*(x.detach() for x in (q, k, v)), y.detach().transpose(1, 2).contiguous(), lse.reshape(1, 2, 1024),
                    do, *tile, **VARIANTS[variant])()
    errors = [((got.double() - w).norm() / w.norm()).item() for got, w in zip(
        (*ours.unbind(2), *theirs()), 2 * want.unbind(2), strict=True)]
    print(f"  errors of dq, dk, dv {[f'{e:.4f}' for e in errors[:3]]}, cuDNN {[f'{e:.4f}' for e in errors[3:]]}")


def measure(variant, device):
    """Prints milliseconds of all tiles: on the first shape, plain on all."""
    for shape in SHAPES if variant == "plain" else SHAPES[:1]:
        qkv, do = draw(*shape, device, torch.bfloat16)
        q, k, v, y, lse, theirs = cudnn(qkv, do)
        print(f"{shape}, {variant}; cuDNN {1e3 * seconds(theirs, device):.3f} ms", flush=True)
        inputs = (*(x.detach() for x in (q, k, v)), y.detach().transpose(1, 2).contiguous(),
                  lse.reshape(shape[0], shape[2], shape[1]), do)
        for tile in TILES:
            try:
                ours = Backward(*inputs, *tile, **VARIANTS[variant])
                whole, products = (1e3 * seconds(f, device) for f in (ours, ours.products))
                print(f"  {tile}: {whole:.3f} ms, the products {products:.3f}", flush=True)
            except triton.runtime.errors.OutOfResources as e:
                print(f"  {tile}: {e}")
        if shape == SHAPES[0]:
            compare(variant, TILES[0], device)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("attention_backward.py: needs a GPU", file=sys.stderr)
        sys.exit(2)
    if len(sys.argv) > 1:
        measure(sys.argv[1], find_machine().device)
    else:                                                # (a fault of one ends its process alone)
        for name in VARIANTS:
            subprocess.run([sys.executable, __file__, name])
