"""A loss whose gradients are summed over micro-batches outside the engine, as CUDA graphs where those can be had."""

from typing import Any

import torch

from sidfast.accel.graphs import GraphedStep, warm_up
from sidfast.common.errors import NothingFinite
from sidfast.kernels.accumulate import accumulate


class GradientBuffers:
    """Sums of gradients over micro-batches, in fp32. One update at a time has them: networks alike share them."""

    def __init__(self):
        self._kept = {}

    def like(self, flat: Any) -> list[torch.Tensor]:
        """Tensors laid out like the buckets of a FlatParameters, fp32; the same ones at every call with one laid out
        alike."""
        key = tuple((c.shape, c.dtype, c.device) for c in flat.buckets)
        if key not in self._kept:
            self._kept[key] = flat.like(torch.promote_types(key[0][1], torch.float32))
        return self._kept[key]


class _BucketedAdd:
    """Adds gradients to sums, small ones several in a launch.

    `_TOGETHER` tensors at most, of `_SMALL` elements at most in all, are held back. A larger one is added at once. All
    come from one backward pass on one stream, and each parameter's once.
    """

    _TOGETHER, _SMALL = 32, 2**20

    def __init__(self):
        self.drop()

    def drop(self):
        """Forget what has not been added."""
        self._sums, self._gradients, self._elements = [], [], 0

    def add(self, sums, gradient, wanted):
        n = gradient.numel()
        if n > self._SMALL:
            accumulate([sums], [gradient], wanted)
            return
        if len(self._sums) == self._TOGETHER or self._elements + n > self._SMALL:
            self.finish(wanted)
        self._sums.append(sums)
        self._gradients.append(gradient)
        self._elements += n

    def finish(self, wanted):
        """Add what has been held back."""
        if self._sums:
            accumulate(self._sums, self._gradients, wanted)
        self.drop()


class GradientAccumulator:
    """`compute(network, *tensors) -> (loss, finite, *others)`, its backward pass, and the sum of its gradients over
    micro-batches.

    loss: a scalar, differentiable in the network's parameters alone; finite: [N] (bool), which samples are;
    others: tensors without gradient. Call it for every micro-batch, then `flush` for a loss with all gradients: an
    engine's hooks see one backward pass, so it reduces gradients once. Each parameter's gradient is added to the sums
    as soon as it is there, or soon after, and given back.

    `trained`: an EngineModule that is flat; losses that share `sums` take turns, from the first micro-batch to `flush`.
    `capture(function) -> (replay, its results)`, Graphs.capture for example, makes both passes graphs: the first call
    captures, later ones must bring tensors of the same shapes, and parameters stay where they are in memory.

    A micro-batch with a sample that is not finite adds nothing; its passes run again on `leave_out(tensors, finite)`.
    The backward pass starts before the host knows, so that the GPU does not wait for it; but where processes must
    do the same, `agree(all finite)` decides in between.
    """

    def __init__(self, trained, compute, leave_out, sums=None, capture=None, agree=None):
        self._network, self._flat, self._compute, self._leave_out = trained.network, trained.flat, compute, leave_out
        self._shared, self._capture, self._agree = sums or GradientBuffers(), capture, agree
        self._sums = self._loss = self._finite = None
        self._warm, self._adder = False, _BucketedAdd()
        self._forward = None if capture else self._run_forward
        self._backward = None if capture else self._run_backward

    def __call__(self, weight, first, *tensors):
        """(finite, *others) of a micro-batch, as tensors of their own; its loss counts `weight` times (a float), and
        `first` begins new sums. Raises NothingFinite if leaving samples out does not help, and ValueError for other
        shapes than those that were captured."""
        self._prepare()
        if self._forward is None:
            self._capture_both(tensors)
        if first:
            torch._foreach_zero_(self._sums)
        self._weight.fill_(weight)
        good, outcome = self._passes(tensors)
        if not good and not self._passes(self._leave_out(tensors, outcome[0]))[0]:
            raise NothingFinite
        return outcome

    def flush(self, _: Any = None) -> torch.Tensor:
        """A scalar whose gradients in the buckets are the sums, in the buckets' type; made bucket by bucket, so that an
        engine that moves gradients away (ZeRO stage 2) never has all of them."""
        return sum(_Flush.apply(*pair) for pair in zip(self._sums, self._flat.buckets, strict=True))

    def warm_up(self, *tensors: torch.Tensor) -> None:
        """Run both passes for real, as is needed before capture. Losses that share memory are best all warmed up before
        the first is captured: what this takes is then given back before the graphs' own memory grows."""
        self._prepare()
        warm_up(lambda: (self._run_forward(*tensors), self._run_backward()), self._weight.device, 2)
        self._warm = True

    def _prepare(self):
        if self._sums is not None:
            return
        device = self._flat.buckets[0].device
        gpu = device.type == "cuda"
        self._sums = self._shared.like(self._flat)
        self._weight = torch.ones((), device=device)
        self._flag_on_host = torch.ones((), dtype=torch.bool, pin_memory=gpu)
        self._known = torch.cuda.Event() if gpu else None
        parameters = dict(self._network.named_parameters())
        for name, view in self._flat.named(self._sums):
            parameters[name].register_post_accumulate_grad_hook(self._adding_to(view))

    def _adding_to(self, view):
        def add(parameter):
            self._adder.add(view, parameter.grad, self._finite)
            parameter.grad = None

        return add

    def _capture_both(self, tensors):
        if not self._warm:
            self.warm_up(*tensors)
        device = self._weight.device
        self._forward = GraphedStep(self._run_forward, device, tensors, 0, self._capture)
        self._backward = GraphedStep(self._run_backward, device, (), 0, self._capture)

    def _run_forward(self, *inputs):
        self._loss, finite, *others = self._compute(self._network, *inputs)
        self._finite = finite.all()
        return self._finite, finite, *others

    def _run_backward(self):
        loss, self._loss = self._loss, None
        self._adder.drop()                               # (of a backward pass that an error ended)
        loss.backward(self._weight.to(loss.dtype))
        self._adder.finish(self._finite)

    def _passes(self, tensors):
        """(whether all samples are finite, copies of what the forward pass returned); if so, gradients are added."""
        flag, *outcome = self._run(tensors)
        if self._agree:
            good = self._agree(flag)
            if good:
                self._backward()
            return good, outcome
        self._flag_on_host.copy_(flag, non_blocking=True)
        if self._known:
            self._known.record()
        self._backward()
        return self._all_finite(), outcome

    def _all_finite(self):
        """Whether every sample of the last forward pass was finite; waits for that pass alone."""
        if self._known:
            self._known.synchronize()
        return bool(self._flag_on_host)

    def _run(self, tensors):
        """(flag, *outcome) of the forward pass, as tensors of their own."""
        outputs = self._forward(*tensors)
        return [v.clone() for v in outputs] if self._capture else outputs


class _Flush(torch.autograd.Function):
    @staticmethod
    def forward(ctx, total, bucket):
        ctx.total, ctx.dtype = total, bucket.dtype
        return torch.zeros((), device=bucket.device)

    @staticmethod
    def backward(ctx, _):
        return None, ctx.total.detach().to(ctx.dtype)
