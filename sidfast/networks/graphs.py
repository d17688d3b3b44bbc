"""CUDA graphs: a step, or a loss with its gradients, replayed without Python and launch overhead."""

from contextlib import contextmanager

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
    """`compute(unet, *tensors) -> (loss, *others)` as two CUDA graphs, one forward and one backward.

    loss: a scalar, differentiable in the UNet's parameters and in nothing else; others: tensors without gradient. The
    gradients reach the parameters through autograd, so accumulation and DeepSpeed's hooks work as ever. The first call
    captures; later calls must bring tensors of the same shapes, and parameters must stay where they are in memory
    (ZeRO stages 0 to 2; stage 3 moves them). Graphs that share a `pool` share memory: a loss's backward pass must
    follow before another of them runs.
    """

    def __init__(self, compute, pool=None, warmup=2):
        self._compute, self._pool, self._warmup, self._inputs = compute, pool, warmup, None

    def __call__(self, unet, *tensors):
        if self._inputs is None:
            self._capture(unet, tensors)
        for static, value in zip(self._inputs, tensors, strict=True):
            if static.shape != value.shape:
                raise ValueError(f"captured for a tensor of shape {tuple(static.shape)}, got {tuple(value.shape)}")
            static.copy_(value)
        return _Replay.apply(self, *self._parameters)

    def _capture(self, unet, tensors):
        self._inputs = [v.clone() for v in tensors]
        self._parameters = [p for p in unet.parameters() if p.requires_grad]
        device = self._parameters[0].device

        def forward(aliases):
            with _replaced(unet, self._parameters, aliases):
                loss, *others = self._compute(unet, *self._inputs)
            return loss, others

        def backward(loss, aliases):
            return torch.autograd.grad(loss, aliases, self._d_loss, allow_unused=True)

        def step():
            aliases = _aliases(self._parameters)
            backward(forward(aliases)[0], aliases)

        self._d_loss = torch.ones((), device=device)
        _warm_up(step, device, self._warmup)
        aliases = _aliases(self._parameters)
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        mode = {"capture_error_mode": "thread_local"}    # NCCL's watchdog thread queries events meanwhile
        with torch.cuda.graph(self.forward_graph, pool=self._pool, **mode):
            loss, self._others = forward(aliases)
        with torch.cuda.graph(self.backward_graph, pool=self._pool or self.forward_graph.pool(), **mode):
            self._gradients = backward(loss, aliases)
        self._loss = loss.detach()                       # lets go of the autograd graph, not of its result

    def replay_forward(self):
        """Loss and others of the inputs, as tensors that later replays leave alone."""
        self.forward_graph.replay()
        return tuple(v.detach().clone() for v in (self._loss, *self._others))

    def replay_backward(self, d_loss):
        """The parameters' gradients (None where the loss does not depend on one), until the next replay."""
        self._d_loss.copy_(d_loss)
        self.backward_graph.replay()
        return self._gradients


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
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(times):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
