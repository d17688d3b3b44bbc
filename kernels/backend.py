"""Where the Triton kernels run, and what their host functions share.

They run on a GPU, and anywhere through Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported: for tests).
Elsewhere the public functions evaluate their references.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from triton.runtime.jit import KernelInterface

INTERPRETED = triton.knobs.runtime.interpret             # read once, as Triton does when it decorates a kernel
TYPES = (torch.float32, torch.bfloat16, torch.float16)
# A launch option for kernels that sum products over threads. Fused, a thread's own product is added to that of another
# unrounded: both hold the sum then, a last bit apart, and which of them is stored is chance.
UNFUSED = {"enable_fp_fusion": False}


def triton_runs_on(x: torch.Tensor) -> bool:
    """Whether the kernels take this tensor; float64, for example, is left to the references. On the meta device (see
    `without_launches`) they do."""
    return x.dtype in TYPES and (x.is_cuda or x.is_meta or INTERPRETED)


@contextmanager
def without_launches() -> Iterator[None]:
    """Inside the block a kernel that gets tensors of the meta device is not launched: results have their shapes and
    bytes, and no numbers. For plans of memory."""
    original = KernelInterface.__getitem__

    def launch(kernel, grid):
        run = original(kernel, grid)

        def unless_meta(*args, **options):
            if not any(isinstance(v, torch.Tensor) and v.is_meta for v in (*args, *options.values())):
                run(*args, **options)

        return unless_meta

    KernelInterface.__getitem__ = launch
    try:
        yield
    finally:
        KernelInterface.__getitem__ = original


def widen(x: torch.Tensor) -> torch.Tensor:
    """x in fp32 or, where it has more already, as it is: what references and statistics are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def require(name: str, *expected: tuple[torch.Tensor | None, Sequence[int]]) -> None:
    """ValueError naming the function unless every (tensor, shape) fits, has elements and is contiguous; a tensor of
    None fits.

    The kernels themselves check nothing: another tensor would be read past its end, or in the wrong order.
    """
    require_shapes(name, *expected)
    for x, _ in expected:
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name}: a tensor of shape {tuple(x.shape)}, strides {x.stride()}, should be contiguous")


def require_shapes(name: str, *expected: tuple[torch.Tensor | None, Sequence[int]]) -> None:
    """The same without the order in memory, for functions that bring it about themselves."""
    for x, shape in expected:
        if x is not None and x.shape != tuple(shape):
            raise ValueError(f"{name}: a tensor of shape {tuple(x.shape)} should be {tuple(shape)}")
        if x is not None and not x.numel():
            raise ValueError(f"{name}: a tensor of shape {tuple(x.shape)} is empty")


def share(blocks: int, device: torch.device, columns: int = 1, density: int = 16) -> tuple[int, int]:
    """How to split `blocks` blocks of rows: (programs, blocks for each), about `density` programs a multiprocessor.

    `columns`: the programs side by side that each block of rows needs. The interpreter gets few programs, so that the
    loop over blocks is run through.
    """
    if INTERPRETED:
        wanted = 4
    else:                                                # (an H100 stands for the meta device)
        gpu = device.type == "cuda"
        wanted = density * (torch.cuda.get_device_properties(device).multi_processor_count if gpu else 132)
    each = max(1, triton.cdiv(blocks * columns, wanted))
    return triton.cdiv(blocks, each), each


def flat_like(x: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors with one order of elements inside a sample, that of x [N, C, H, W], so that kernels can run along
    memory: channels last if x is, plain otherwise. Those that lie otherwise are copied."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if channels_last and not x.is_contiguous() else torch.contiguous_format
    return tuple(v.contiguous(memory_format=order) for v in (x, *others))


@triton.jit
def tile_of(i, C, BC: tl.constexpr):
    """Which block of columns (channels), and which of rows (positions), program i works on.

    All columns of some rows come next to each other. One dimension of the grid is for both, because CUDA's others end
    at 65,535.
    """
    columns = tl.cdiv(C, BC)
    return i % columns, i // columns


@triton.jit
def last_to_finish(p_done, n):
    """Whether this program is the last of n to come here; what the others stored before can then be read.

    p_done: an int32 that starts at 0.
    """
    tl.debug_barrier()                                   # all threads have stored before one says so
    return tl.atomic_add(p_done, 1, sem="acq_rel") == n - 1


@triton.jit
def sum_parts(p_part, n, STRIDE: tl.constexpr, B: tl.constexpr):
    """The sum of n fp32 numbers that other programs stored, STRIDE apart; always in the same order."""
    b_sum = tl.zeros([B], tl.float32)
    for start in range(0, n, B):
        i = start + tl.arange(0, B)
        b_sum += tl.load(p_part + i * STRIDE, mask=i < n, other=0.0, cache_modifier=".cg")
    return tl.sum(b_sum)
