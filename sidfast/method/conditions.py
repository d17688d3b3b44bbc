"""What a network is told besides x_t and the time: {argument of the network: tensor}.

Every value is [N, ...], a row for each sample, or [1, ...] for what all samples share, such as the empty prompt.
"""

from collections.abc import Sequence

import torch

Conditions = dict[str, torch.Tensor]


def rows(cond: Conditions) -> int:
    """How many samples the conditions are for, N."""
    return len(next(iter(cond.values())))


def dtype_of(cond: Conditions) -> torch.dtype:
    """The type that networks compute in: that of the first floating-point value."""
    return next(value.dtype for value in cond.values() if value.is_floating_point())


def select(cond: Conditions, index: torch.Tensor | slice | list[int]) -> Conditions:
    """The samples that `index` (of a tensor's first dimension) picks."""
    return {name: value[index] for name, value in cond.items()}


def expand(cond: Conditions, n: int) -> Conditions:
    """[1, ...] as [n, ...], without a copy."""
    return {name: value.expand(n, *value.shape[1:]) for name, value in cond.items()}


def cat(conds: Sequence[Conditions]) -> Conditions:
    """All samples of the first, then of the next; the keys are the same in all."""
    return {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}


def where(mask: torch.Tensor, a: Conditions, b: Conditions) -> Conditions:
    """a where mask [N] (bool) holds, b elsewhere; both [N, ...] or [1, ...]."""
    return {name: torch.where(mask.view(-1, *(1,) * (b[name].ndim - 1)), a[name], b[name]) for name in b}


def split(cond: Conditions, size: int) -> list[Conditions]:
    """Micro-batches of `size` samples."""
    pieces = [value.split(size) for value in cond.values()]
    return [dict(zip(cond, parts, strict=True)) for parts in zip(*pieces, strict=True)]
