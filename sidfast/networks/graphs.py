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


class GradientSums:
    """Sums of gradients over micro-batches, in fp32. One update at a time has them: networks alike share them."""

    def __init__(self):
        self._kept = {}

    def like(self, parameters):
        """A tensor for each parameter."""
        key = tuple((p.shape, p.dtype, p.device) for p in parameters)
        if key not in self._kept:
            self._kept[key] = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
                               for p in parameters]
        return self._kept[key]


class GraphedLoss:
    """`compute(unet, *tensors) -> (loss, finite, *others)`, its backward pass, and the sum of its gradients over
    micro-batches, as CUDA graphs.

    loss: a scalar, differentiable in the UNet's parameters and in nothing else; finite: [N] (bool), which samples are;
    others: tensors without gradient. Call it for every micro-batch, then `hand_over` for a loss with all gradients: an
    engine's hooks see one backward pass, so it reduces gradients once. The first call captures; later ones must bring
    tensors of the same shapes, and parameters must stay where they are in memory (ZeRO stages 0 to 2; stage 3 moves
    them). Those that share a `pool` and `sums` share memory, and take turns from the first micro-batch to `hand_over`.

    The backward pass starts before the host knows whether every sample is finite, so that the GPU does not wait for the
    host. If one is not, both passes run again on `leave_out(tensors, finite)` before gradients are added to the sums.
    """

    def __init__(self, compute, leave_out, pool=None, sums=None, capture=None):
        self._compute, self._leave_out, self._sums = compute, leave_out, sums or GradientSums()
        self._capture_one, self._pool = capture or capture_graph, pool
        self._inputs = self._forward = None

    def __call__(self, unet, weight, first, *tensors):
        """(finite, *others) of a micro-batch, as tensors of their own; its loss counts `weight` times (a float), and
        `first` begins new sums. Raises NothingFinite if leaving samples out does not help."""
        if self._inputs is None:
            self.warm_up(unet, *tensors)
        if self._forward is None:
            self._capture()
        self._weight.fill_(weight)
        outcome = self._run(tensors)
        if not self._all_finite():
            self._run(self._leave_out(self._inputs, outcome[0]))
            if not self._all_finite():
                raise NothingFinite
        (self._begin if first else self._add)()
        return outcome

    def hand_over(self, unet):
        """A scalar whose gradients in the parameters are the sums (None where no loss depends on one)."""
        return _HandOver.apply(self, *self._parameters)

    def gradients(self):
        """The sums, in the parameters' type."""
        sums = iter(self._summed)
        return [None if g is None else next(sums).to(g.dtype) for g in self._gradients]

    def warm_up(self, unet, *tensors):
        """Run both passes for real, as is needed before capture. Losses that share a pool are best all warmed up before
        the first is captured: what this takes of memory is then given back before the pool grows."""
        self._inputs = [v.clone() for v in tensors]
        self._parameters = [p for p in unet.parameters() if p.requires_grad]
        device = self._parameters[0].device
        gpu = device.type == "cuda"
        self._weight = torch.ones((), device=device)
        self._flag_on_host = torch.ones((), dtype=torch.bool, pin_memory=gpu)
        self._known = torch.cuda.Event() if gpu else None
        self._pool = self._pool or (torch.cuda.graph_pool_handle() if gpu else None)
        between = []                                     # the loss and what it is differentiated in

        def forward():
            aliases = _aliases(self._parameters)
            with _replaced(unet, self._parameters, aliases):
                loss, finite, *others = self._compute(unet, *self._inputs)
            between[:] = loss, aliases
            return finite.all(), finite, *others

        def backward():
            loss, aliases = between
            between.clear()
            return torch.autograd.grad(loss, aliases, self._weight, allow_unused=True)

        def both():
            forward()
            backward()

        _warm_up(both, device, 2)
        self._passes = forward, backward

    def _capture(self):
        forward, backward = self._passes
        self._forward, (self._flag, *self._others) = self._capture_one(forward, self._pool)
        self._backward, self._gradients = self._capture_one(backward, self._pool)
        pairs = [(p, g) for p, g in zip(self._parameters, self._gradients, strict=True) if g is not None]
        self._summed, new = self._sums.like([p for p, _ in pairs]), [g for _, g in pairs]

        def begin():
            torch._foreach_copy_(self._summed, new)

        def add():
            torch._foreach_add_(self._summed, new)

        self._begin, _ = self._capture_one(begin, self._pool)
        self._add, _ = self._capture_one(add, self._pool)

    def _run(self, tensors):
        """Both passes on `tensors`; copies of what the forward pass returned."""
        for static, value in zip(self._inputs, tensors, strict=True):
            if static.shape != value.shape:
                raise ValueError(f"captured for a tensor of shape {tuple(static.shape)}, got {tuple(value.shape)}")
            static.copy_(value)
        self._forward()
        self._flag_on_host.copy_(self._flag, non_blocking=True)
        if self._known:
            self._known.record()
        outcome = tuple(v.clone() for v in self._others)
        self._backward()
        return outcome

    def _all_finite(self):
        """Whether every sample of the last forward pass was finite; waits for that pass alone."""
        if self._known:
            self._known.synchronize()
        return bool(self._flag_on_host)


def capture_graph(function, pool):
    """A function as a CUDA graph: (replay, what it returned), tensors that every replay overwrites."""
    graph = torch.cuda.CUDAGraph()
    # (thread_local: NCCL's watchdog thread queries events meanwhile)
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graphed, *parameters):
        ctx.graphed = graphed
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx, _):
        return None, *ctx.graphed.gradients()


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
