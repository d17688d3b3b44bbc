"""Batches: prompts to text embeddings, with their noise.

Everything random about update k of a network follows from (seed, k, network) and is drawn for the whole global batch;
a process takes its rows. So training is the same on any number of processes and with any micro-batch, and resumes
exactly from a step count.
"""

import numpy as np
import torch

from sidfast.evaluation.features import tokenize
from sidfast.method.distill import Batch

UPDATES = ("fake_score", "generator")                    # in the order they take turns


class TextEncoder:
    """Prompts to embeddings, with the teacher's frozen text encoder."""

    def __init__(self, tokenizer, text_encoder, dtype):
        self.tokenizer, self.text_encoder, self.dtype = tokenizer, text_encoder, dtype
        self.null = self([""])

    @torch.no_grad()
    def __call__(self, prompts):
        """N prompts -> [N, L, D]."""
        ids = tokenize(self.tokenizer, prompts).to(self.text_encoder.device)
        return self.text_encoder(ids).last_hidden_state.to(self.dtype)


class Batches:
    """The micro-batches of this process, for any step and either update."""

    def __init__(self, prompts, encoder, levels, latent_shape, train, dropout, device, rank=0, processes=1):
        """`latent_shape`: (C, H, W); `train`: the configuration's section; `dropout`: share of empty prompts."""
        self.prompts, self.encoder, self.levels, self.latent_shape = prompts, encoder, levels, latent_shape
        self.size, self.micro, self.seed, self.dropout, self.device = (
            train.batch_size, train.micro_batch, train.seed, dropout, device)
        share = self.size // processes
        self.rows = range(rank * share, (rank + 1) * share)

    def __call__(self, step, update):
        """The list of this process's Batches for one update of step 0, 1, 2, ...."""
        k = UPDATES.index(update)
        first = (len(UPDATES) * step + k) * self.size
        text = self.encoder([self.prompts[first + row] for row in self.rows])
        generator = self._generator(step, k)
        z, eps = (self._normal(generator) for _ in range(2))
        t = self.levels.sample(self.size, generator)
        dropped = torch.rand(self.size, generator=generator, device=self.device) < self.dropout
        mine = slice(self.rows.start, self.rows.stop)
        whole = text, *(v[mine] for v in (z, eps, t, dropped))
        pieces = zip(*(v.split(self.micro) for v in whole), strict=True)
        return [Batch(text, self.encoder.null, *rest) for text, *rest in pieces]

    def _generator(self, step, k):
        seed = np.random.SeedSequence([self.seed, step, k]).generate_state(1, np.uint64)[0]
        return torch.Generator(self.device).manual_seed(int(seed >> np.uint64(1)))

    def _normal(self, generator):
        return torch.randn(self.size, *self.latent_shape, generator=generator, device=self.device)
