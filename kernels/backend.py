"""Where the Triton kernels run, and what their host functions share.

They run on a GPU, and anywhere through Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported: for tests).
Elsewhere the public functions evaluate their references.
"""

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret             # read once, as Triton does when it decorates a kernel
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def triton_runs_on(x):
    """Whether the kernels take this tensor; float64, for example, is left to the references."""
    return x.dtype in TYPES and (x.is_cuda or INTERPRETED)


def widen(x):
    """x in fp32 or, where it has more already, as it is: what references and statistics are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def require(name, *expected):
    """ValueError naming the function unless every (tensor, shape) fits and is contiguous; a tensor of None fits.

    The kernels themselves check nothing: another tensor would be read past its end, or in the wrong order.
    """
    for x, shape in expected:
        if x is not None and not (x.shape == tuple(shape) and x.is_contiguous()):
            raise ValueError(f"{name}: a tensor of shape {tuple(x.shape)}, strides {x.stride()}, "
                             f"should be {tuple(shape)}, contiguous")


def share(blocks, device, columns=1, density=16):
    """How to split `blocks` blocks of rows: (programs, blocks for each), about `density` programs a multiprocessor.

    `columns`: the programs side by side that each block of rows needs. The interpreter gets few programs, so that the
    loop over blocks is run through.
    """
    wanted = 4 if INTERPRETED else density * torch.cuda.get_device_properties(device).multi_processor_count
    each = max(1, triton.cdiv(blocks * columns, wanted))
    return triton.cdiv(blocks, each), each
