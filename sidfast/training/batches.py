"""Batches: prompts to text embeddings, with their noise.

Everything random about update k of a network follows from (seed, k, network) and is drawn for the whole global batch;
a process takes its rows. So training is the same on any number of processes and with any micro-batch, and resumes
exactly from a step count.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from sidfast.evaluation.features import tokenize
from sidfast.method.distill import Batch

UPDATES = ("fake_score", "generator")                    # in the order they take turns


class TextEncoder:
    """Prompts to embeddings, with the teacher's frozen text encoder."""

    def __init__(self, tokenizer, text_encoder, dtype):
        self.tokenizer, self.text_encoder, self.dtype = tokenizer, text_encoder, dtype
        self.null = self(self.tokenize([""]))

    def tokenize(self, prompts):
        """N prompts -> ids [N, L], on the CPU, from where a GPU can fetch them by itself."""
        ids = tokenize(self.tokenizer, prompts)
        return ids.pin_memory() if self.text_encoder.device.type == "cuda" else ids

    @torch.no_grad()
    def __call__(self, ids):
        """Ids [N, L] -> embeddings [N, L, D]."""
        ids = ids.to(self.text_encoder.device, non_blocking=True)
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
        self._worker, self._ahead = ThreadPoolExecutor(1), {}

    def __call__(self, step, update):
        """The list of this process's Batches for one update of step 0, 1, 2, ...."""
        k = UPDATES.index(update)
        text = self.encoder(self._ids(len(UPDATES) * step + k))
        generator = self._generator(step, k)
        z, eps = (self._normal(generator) for _ in range(2))
        t = self.levels.sample(self.size, generator)
        dropped = torch.rand(self.size, generator=generator, device=self.device) < self.dropout
        mine = slice(self.rows.start, self.rows.stop)
        whole = text, *(v[mine] for v in (z, eps, t, dropped))
        pieces = zip(*(v.split(self.micro) for v in whole), strict=True)
        return [Batch(text, self.encoder.null, *rest) for text, *rest in pieces]

    def _ids(self, number):
        """Token ids of update `number`; those of the next are made meanwhile, while this thread waits for the GPU."""
        waiting = self._ahead.pop(number, None)
        self._ahead = {number + 1: self._worker.submit(self._tokenize, number + 1)}
        return waiting.result() if waiting else self._tokenize(number)

    def _tokenize(self, number):
        first = number * self.size
        return self.encoder.tokenize([self.prompts[first + row] for row in self.rows])

    def _generator(self, step, k):
        seed = np.random.SeedSequence([self.seed, step, k]).generate_state(1, np.uint64)[0]
        return torch.Generator(self.device).manual_seed(int(seed >> np.uint64(1)))

    def _normal(self, generator):
        return torch.randn(self.size, *self.latent_shape, generator=generator, device=self.device)
