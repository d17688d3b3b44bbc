"""The operations of Score identity Distillation, each defined by a plain PyTorch `*_reference` (`sidfast.kernels`)."""
