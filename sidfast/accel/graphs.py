"""CUDA graphs: what launches the same kernels on the same memory every time, replayed without Python's overhead."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch


class GraphedStep:
    """`function(*tensors)`, replayed as one CUDA graph where there is a GPU, for tensors of the shapes of `inputs`.

    Calling it copies the tensors to where the graph reads them, runs the function once more and returns its outputs,
    which the next call overwrites. Building it runs `warmup` calls for real, so that lazy initialisation (cuDNN's
    search, optimizer state, constants) is over before capture. Without a GPU every call just runs the function.
    `capture`: Graphs.capture, or a stand-in for it that is used without a GPU too; by default the graph has memory of
    its own.
    """

    def __init__(self, function, device, inputs=(), warmup=3, capture=None):
        self._inputs = [value.clone() for value in inputs]
        self._run, self._replay = functools.partial(function, *self._inputs), None
        if capture or device.type == "cuda":
            warm_up(self._run, device, warmup)
            self._replay, self._outputs = (capture or Graphs().capture)(self._run)

    def __call__(self, *tensors):
        """The function's outputs. Raises ValueError for other shapes than those of `inputs`."""
        for static, value in zip(self._inputs, tensors, strict=True):
            if static.shape != value.shape:
                raise ValueError(f"captured for a tensor of shape {tuple(static.shape)}, got {tuple(value.shape)}")
            static.copy_(value)
        if self._replay is None:
            return self._run()
        self._replay()
        return self._outputs

    def fits(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether tensors have the shapes of `inputs`."""
        return [value.shape for value in tensors] == [static.shape for static in self._inputs]


class Graphs:
    """CUDA graphs that share memory: they must take turns. Needs a GPU."""

    def __init__(self):
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable) -> tuple[Callable, Any]:
        """A function as a CUDA graph: (replay, what it returned), tensors that every replay overwrites.

        Raises torch's RuntimeError for what no graph can hold. `warm_up` first.
        """
        graph = torch.cuda.CUDAGraph()
        # (thread_local: NCCL's watchdog thread queries events meanwhile)
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = function()
        return graph.replay, result


def warm_up(step: Callable, device: torch.device, times: int) -> None:
    """Run a step so many times, on a side stream as capture will (libraries initialise per stream)."""
    if device.type != "cuda":
        for _ in range(times):
            step()
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(times):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)


def sequential(first: Callable, second: Callable, device: torch.device) -> tuple[Any, Any]:
    """(first(), second())."""
    return first(), second()


def concurrent(first: Callable, second: Callable, device: torch.device) -> tuple[Any, Any]:
    """(first(), second()) at the same time on a GPU, so that the kernels of one run in the gaps between the other's.

    Their backward passes do likewise: autograd runs each where the forward pass ran. What `second` reads must live
    until this returns. Each has memory of its own, where one after the other would share.
    """
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        beside = second()
    result = first()
    current.wait_stream(side)
    return result, beside


@functools.cache
def _side_stream(device):
    return torch.cuda.Stream(device)                     # (one: PyTorch keeps memory for each)
