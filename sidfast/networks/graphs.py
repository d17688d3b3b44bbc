"""CUDA graphs."""

import torch


class GraphedStep:
    """A whole training step (no arguments, tensors out), replayed as one CUDA graph where there is a GPU.

    Calling it runs the step once more and returns the step's outputs, which the next call overwrites. Building it
    runs `warmup` steps for real, so that lazy initialisation (cuDNN's search, optimizer state, constants) is over
    before capture. Without a GPU every call just runs the step.
    """

    def __init__(self, step, device, warmup=3):
        self._step, self._graph = step, None
        if device.type != "cuda":
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(warmup):
                step()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = step()

    def __call__(self):
        if self._graph is None:
            return self._step()
        self._graph.replay()
        return self._outputs
