"""An optimizer step of a DeepSpeed engine, for tests that look at the engine and not at an update of the method."""

import torch

from sidfast.engines.accumulate import GradientAccumulator


def optimize(engine, loss_of, micro_batches, factors=None):
    """One step by the mean of loss_of(unet, *tensors) over micro-batches, each loss multiplied by its factor."""
    factors = factors or [1.0] * len(micro_batches)
    if not engine.module.flat:
        for tensors, factor in zip(micro_batches, factors, strict=True):
            engine.backward(engine(loss_of, *tensors) * factor)
            engine.step()
        return
    if not hasattr(engine, "summed"):
        engine.summed = GradientAccumulator(engine.module, lambda unet, *tensors: (
            engine.loss_of(unet, *tensors), torch.ones(1, dtype=torch.bool)), None)
    engine.loss_of = loss_of
    for k, (tensors, factor) in enumerate(zip(micro_batches, factors, strict=True)):
        engine.summed(factor / len(micro_batches), k == 0, *tensors)
    engine.backward(engine(engine.summed.flush))
    engine.step()
