"""Attention: the implementations there are, and the choice of the fastest one that is right on this card.

All take q [N, S, heads, d] and k, v [N, L, heads, d], any strides whose last is 1, and return [N, S, heads, d].
"""

import time
from collections.abc import Sequence

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sidfast.accel.graphs import GraphedStep
from sidfast.common.errors import UserError
from sidfast.common.extras import need


def _sdpa(backend):
    def attend(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    return attend


def _xformers(q, k, v):
    return need("xformers.ops", "xformers", "it").memory_efficient_attention(q, k, v)


IMPLEMENTATIONS = {"cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION), "flash": _sdpa(SDPBackend.FLASH_ATTENTION),
                   "xformers": _xformers, "efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
                   "math": _sdpa(SDPBackend.MATH)}
_BOUND = 3e-2                                            # relative error in bf16 and fp16; fp32 is far below


def choose_attention(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device,
                     names: Sequence[str] | None = None, repeat: int = 5) -> dict[str, float | str]:
    """Time implementations (all, or `names`) on the given shapes, forward and backward, and check them against the
    maths. On a GPU kernels alone are timed, as a CUDA graph: what launching costs differs from start to start.

    shapes: a list of (N, S, L, heads, d, times it occurs). Returns {implementation: total ms, or (text) why it is out},
    the best first; implementations that fail or are wrong (output or a gradient) come last.
    """
    results = {}
    for name in names or IMPLEMENTATIONS:
        attend = IMPLEMENTATIONS[name]
        try:
            results[name] = sum(count * _measure(attend, shape, dtype, device, repeat) for *shape, count in shapes)
        except (RuntimeError, NotImplementedError, ValueError, UserError) as error:
            results[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return dict(sorted(results.items(), key=lambda item: (isinstance(item[1], str), item[1])))


def _measure(attend, shape, dtype, device, repeat):
    """Milliseconds of a pass forward and backward. Raises ValueError if output or gradients are wrong."""
    N, S, L, heads, d = shape
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, do = (torch.randn(N, length, heads, d, generator=generator, device=device).to(dtype)
                   for length in (S, L, L, S))
    few = slice(0, 1)                                    # the maths needs memory for S x L scores
    got = _value_and_grads(attend, *(t[few] for t in (q, k, v, do)))
    want = _value_and_grads(IMPLEMENTATIONS["math"], *(t[few].float() for t in (q, k, v, do)))
    for name, g, w in zip(("output", "dq", "dk", "dv"), got, want, strict=True):
        error = ((g.float() - w).norm() / w.norm()).item()
        if not error <= _BOUND:
            raise ValueError(f"wrong: relative error of {name} {error:.1e}")
    run = GraphedStep(lambda: _value_and_grads(attend, q, k, v, do), device, warmup=1)
    run()
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    _wait(device)
    return (time.perf_counter() - start) / repeat * 1e3


def _value_and_grads(attend, q, k, v, do):
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    o = attend(q, k, v)
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do)


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
