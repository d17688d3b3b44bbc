"""CUDA graphs: a step, or a loss with its gradients, replayed without Python and launch overhead."""

from contextlib import contextmanager

import torch

from sidfast.errors import NothingFinite


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
        _warm_up(step, device, warmup)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = step()

    def __call__(self):
        if self._graph is None:
            return self._step()
        self._graph.replay()
        return self._outputs


class GraphedLoss:
    """`compute(unet, *tensors) -> (loss, finite, *others)` as two CUDA graphs, one forward and one backward.

    loss: a scalar, differentiable in the UNet's parameters and in nothing else; finite: [N] (bool), which samples are;
    others: tensors without gradient. The gradients reach the parameters through autograd, so accumulation and
    DeepSpeed's hooks work as ever. The first call captures; later calls must bring tensors of the same shapes, and
    parameters must stay where they are in memory (ZeRO stages 0 to 2; stage 3 moves them). Graphs that share a `pool`
    share memory: a loss's backward pass must follow before another of them runs.

    The backward pass starts before the host knows whether every sample is finite, so that the GPU does not wait for the
    host. If one is not, both passes run again on `leave_out(tensors, finite)`, and only then do gradients go anywhere.
    Raises NothingFinite if that does not help. (What the forward pass returned stays as it was.)
    """

    leaves_out = True

    def __init__(self, compute, leave_out, pool=None, capture=None):
        self._compute, self._leave_out, self._pool = compute, leave_out, pool
        self._capture_passes = capture or capture_passes
        self._inputs = self._forward = None

    def __call__(self, unet, *tensors):
        if self._inputs is None:
            self.warm_up(unet, *tensors)
        if self._forward is None:
            self._capture()
        self._load(tensors)
        return _Replay.apply(self, *self._parameters)

    def warm_up(self, unet, *tensors):
        """Run both passes for real, as is needed before capture. Losses that share a pool are best all warmed up before
        the first is captured: what this takes of memory is then given back before the pool grows."""
        self._inputs = [v.clone() for v in tensors]
        self._parameters = [p for p in unet.parameters() if p.requires_grad]
        device = self._parameters[0].device
        self._d_loss = torch.ones((), device=device)
        self._all_finite = torch.ones((), dtype=torch.bool, pin_memory=device.type == "cuda")
        self._known = torch.cuda.Event() if device.type == "cuda" else None
        between = []                                     # the loss and what it is differentiated in

        def forward():
            aliases = _aliases(self._parameters)
            with _replaced(unet, self._parameters, aliases):
                loss, finite, *others = self._compute(unet, *self._inputs)
            between[:] = loss, aliases
            return loss, finite.all(), finite, *others

        def backward():
            loss, aliases = between
            between.clear()
            return torch.autograd.grad(loss, aliases, self._d_loss, allow_unused=True)

        def both():
            forward()
            backward()

        _warm_up(both, device, 2)
        self._passes = forward, backward

    def _capture(self):
        self._forward, self._backward, outputs, self._gradients = self._capture_passes(*self._passes, self._pool)
        self._loss, self._flag, *self._others = (v.detach() for v in outputs)     # (lets go of autograd's graph)

    def _load(self, tensors):
        for static, value in zip(self._inputs, tensors, strict=True):
            if static.shape != value.shape:
                raise ValueError(f"captured for a tensor of shape {tuple(static.shape)}, got {tuple(value.shape)}")
            static.copy_(value)

    def replay_forward(self):
        """Loss, finite and others of the inputs, as tensors that later replays leave alone."""
        self._forward()
        self._note()
        return tuple(v.clone() for v in (self._loss, *self._others))

    def replay_backward(self, d_loss):
        """The parameters' gradients (None where the loss does not depend on one), until the next replay."""
        self._d_loss.copy_(d_loss)
        self._backward()
        if not self._finite():
            self._load(self._leave_out(self._inputs, self._others[0].clone()))
            self._forward()
            self._note()
            self._backward()
            if not self._finite():
                raise NothingFinite
        return self._gradients

    def _note(self):
        """Have the forward pass's flag brought to the host, without waiting."""
        self._all_finite.copy_(self._flag, non_blocking=True)
        if self._known:
            self._known.record()

    def _finite(self):
        """Whether every sample of the last forward pass was finite; waits for that pass alone."""
        if self._known:
            self._known.synchronize()
        return bool(self._all_finite)


def capture_passes(forward, backward, pool=None):
    """Two functions, to be called in turn, as CUDA graphs: (replay forward, replay backward, what either returns).

    What they return are the tensors that every replay overwrites.
    """
    graphs, results, pool = (torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()), [], pool or torch.cuda.graph_pool_handle()
    for graph, function in zip(graphs, (forward, backward), strict=True):
        # (thread_local: NCCL's watchdog thread queries events meanwhile)
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            results.append(function())
    return graphs[0].replay, graphs[1].replay, *results


def _aliases(parameters):
    """The same memory as other leaves of autograd.

    A parameter's own gradient accumulator, which DeepSpeed's hooks keep alive, belongs to the stream it was made on;
    the backward pass would wait for that stream, which no capture survives.
    """
    return [p.detach().requires_grad_() for p in parameters]


@contextmanager
def _replaced(module, parameters, others):
    """A module's parameters are other tensors inside the block."""
    instead = dict(zip(map(id, parameters), others, strict=True))
    places = [(m._parameters, name) for m in module.modules() for name, p in m._parameters.items() if id(p) in instead]
    held = [table[name] for table, name in places]
    for (table, name), p in zip(places, held, strict=True):
        table[name] = instead[id(p)]
    try:
        yield
    finally:
        for (table, name), p in zip(places, held, strict=True):
            table[name] = p


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graphed, *parameters):
        ctx.graphed = graphed
        loss, *others = graphed.replay_forward()
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx, d_loss, *_):
        return None, *ctx.graphed.replay_backward(d_loss)


def _warm_up(step, device, times):
    """Run a step on a side stream, as capture will (libraries initialise per stream)."""
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
