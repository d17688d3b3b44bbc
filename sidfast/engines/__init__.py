"""DeepSpeed engines for generator and fake score, their parameters, gradients, optimizers and averages."""
