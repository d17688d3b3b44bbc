"""The diversity axis of the synthetic data (method.md, section 7): how many prompts there are, how often each comes,
and how many z it has. Everything follows from the seed and a running number, as for the prompts themselves."""

import functools
import hashlib

import numpy as np
import torch

from sidfast.common.errors import UserError
from sidfast.data.prompts import PromptFile, open_prompts


def training_prompts(source, seed, section, column=None, tell=None):
    """The prompts of a run, to be indexed with any n >= 0.

    `source`, `column`, `tell`: as for `open_prompts`; `section`: the configuration's `synthetic`. Raises UserError for
    a source that has fewer prompts than are asked for.
    """
    prompts, unique = open_prompts(source, seed, column, tell), section.unique_prompts
    if section.prompt_share is not None:
        unique = max(1, round(section.prompt_share * len(prompts)))
    if unique is not None:
        prompts = FewPrompts(_first(prompts, unique, source), seed)
    return Repeated(prompts, section.prompt_repeats) if section.prompt_repeats > 1 else prompts


def some_prompts(prompts, most):
    """(At most `most` different prompts of `training_prompts`, drawn at random; how many it has). None of those that
    the shapes world makes without end."""
    if isinstance(prompts, Repeated):
        prompts = prompts.prompts
    total = len(prompts) if hasattr(prompts, "__len__") else 0
    return [prompts[n] for n in range(min(most, total))], total


class FewPrompts:
    """A list of prompts over and over; each epoch is a fresh permutation."""

    def __init__(self, prompts, seed=0):
        self.prompts, self.seed = prompts, seed

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, n):
        epoch, position = divmod(n, len(self.prompts))
        return self.prompts[self._order(epoch)[position]]

    @functools.lru_cache(maxsize=2)                      # noqa: B019 (one source lives as long as the run)
    def _order(self, epoch):
        return np.random.default_rng([self.seed, epoch, len(self.prompts)]).permutation(len(self.prompts))


class Repeated:
    """Another source's prompts, each several times in a row."""

    def __init__(self, prompts, repeats):
        self.prompts, self.repeats = prompts, repeats

    def __getitem__(self, n):
        return self.prompts[n // self.repeats]


def _first(prompts, count, source):
    """The first `count` prompts of a source; of a file, lines drawn at random. Those of the shapes world repeat as they
    do in it: if each came once, short captions, of which there are few, would all but vanish."""
    if isinstance(prompts, PromptFile) and count > len(prompts):
        raise UserError(f"synthetic.unique_prompts ({count}): {source} has {len(prompts)} prompts")
    return [prompts[n] for n in range(count)]


def fixed_z(prompts, which, seed, shape):
    """z [N, *shape] of N prompts, on the CPU: number which[n] of the prompt's own, the same at every occurrence."""
    rows = []
    for prompt, k in zip(prompts, which, strict=True):
        name = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:16], "big")
        state = np.random.SeedSequence([seed, k, name]).generate_state(1, np.uint64)[0]
        rows.append(torch.randn(shape, generator=torch.Generator().manual_seed(int(state >> np.uint64(1)))))
    return torch.stack(rows)
