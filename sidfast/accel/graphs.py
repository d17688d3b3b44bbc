"""CUDA graphs: what launches the same kernels on the same memory every time, replayed without Python's overhead."""

import functools

import torch


class GraphedStep:
    """A whole training step (no arguments, tensors out), replayed as one CUDA graph where there is a GPU.

    Calling it runs the step once more and returns the step's outputs, which the next call overwrites. Building it
    runs `warmup` steps for real, so that lazy initialisation (cuDNN's search, optimizer state, constants) is over
    before capture. Without a GPU every call just runs the step.
    """

    def __init__(self, step, device, warmup=3):
        self._step, self._replay = step, None
        if device.type == "cuda":
            warm_up(step, device, warmup)
            self._replay, self._outputs = Graphs().capture(step)

    def __call__(self):
        """The step's outputs."""
        if self._replay is None:
            return self._step()
        self._replay()
        return self._outputs


class Graphs:
    """CUDA graphs that share memory: they must take turns. Needs a GPU."""

    def __init__(self):
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, function):
        """A function as a CUDA graph: (replay, what it returned), tensors that every replay overwrites.

        Raises torch's RuntimeError for what no graph can hold. `warm_up` first.
        """
        graph = torch.cuda.CUDAGraph()
        # (thread_local: NCCL's watchdog thread queries events meanwhile)
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = function()
        return graph.replay, result


def warm_up(step, device, times):
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


def sequential(first, second, device):
    """(first(), second())."""
    return first(), second()


def concurrent(first, second, device):
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
