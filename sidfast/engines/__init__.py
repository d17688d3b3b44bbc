"""DeepSpeed engines for generator and fake score, their parameters, gradients and optimizers."""
