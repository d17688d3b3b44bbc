"""What an update of the real networks needs: every byte alive during it, and its floating-point operations.

The updates of `sidfast.method.updates` run on torch's meta device, which has shapes and no memory. A dispatch mode sees
every tensor that they make and notes when its storage is born and when it dies; nothing is estimated by rule. Each
update runs at two micro-batches: the events are the same ones, so at event i the bytes are a_i + b_i m, and the peak is
known for every m.
"""

import gc
import json
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from sidfast.engines.module import EngineModule
from sidfast.engines.update import Networks, fake_score_update, generator_update
from sidfast.kernels.backend import without_launches
from sidfast.method.updates import Batch

UPDATES = {"fake_score": fake_score_update, "generator": generator_update}
_SIZES = (2, 3)                                          # (a single row makes some copies unnecessary)


@dataclass(frozen=True, eq=False)
class Footprint:
    """One update of one network. `rows` [events, 3, 2]: bytes alive at each event, weights aside, as (fixed, per image)
    of three kinds: the gradients of the network's parameters, what the pass beside another makes (`concurrent`), the
    rest."""

    rows: torch.Tensor
    flops: float                                         # of one image
    parameters: int

    def peak(self, micro_batch, gradients=True, beside=True):
        """Most bytes alive at once with `micro_batch` images; `gradients`, `beside`: with these kinds."""
        return self._most(micro_batch, gradients, beside, True)

    def beside(self, micro_batch):
        """The same of what the pass beside another makes."""
        return self._most(micro_batch, False, True, False)

    def _most(self, micro_batch, *kinds):
        alive = self.rows[..., 0] + self.rows[..., 1] * micro_batch
        return (alive * torch.tensor(kinds)).sum(1).max().item()


def measure_update(name, networks, objective, latent_shape, conditions, dtype):
    """The Footprint of update `name` ("fake_score" or "generator").

    `networks`: {"generator", "fake_score", "teacher"} in `dtype`, prepared as they will run, on the meta device (or
    another, for comparisons); latent_shape: (C, H, W); `conditions`: Teacher.conditions. Raises RuntimeError if the
    update does not make the same tensors at every micro-batch.
    """
    runs = [_run(name, networks, objective, latent_shape, conditions, dtype, m) for m in _SIZES]
    small, large = (timeline for timeline, _ in runs)
    if len(small) != len(large):
        raise RuntimeError(f"the {name} update does not do the same at every micro-batch: {len(small)} and "
                           f"{len(large)} tensors")
    step = _SIZES[1] - _SIZES[0]
    at_small, at_large = (torch.tensor(timeline, dtype=torch.float64) for timeline in (small, large))
    each = (at_large - at_small) / step
    rows = torch.stack((at_small - each * _SIZES[0], each), dim=2).unique(dim=0)
    parameters = sum(p.numel() for p in networks[name].parameters())
    return Footprint(rows, (runs[1][1] - runs[0][1]) / step, parameters)


def image_flops(teacher, latent_shape, kappas, shared=False):
    """FLOPs of one training image, one update of each network, from one pass of the network on the meta device.

    `teacher`: with or without weights; latent_shape: (C, H, W); `kappas`: (kappa1, ..., kappa4); `shared`: both updates
    take the same pass of the generator. The same number as that of the two updates as a whole (`Footprint.flops`), in a
    fraction of the time, for plain networks: those of the method. (A fused one computes once what both texts of an
    image share.) Memory layout and gradient checkpointing do not matter here.
    """
    from sidfast.method.equations import passes

    family = teacher.family
    cond = tuple((name, *value.shape) for name, value in teacher.conditions(1, device="meta").items())
    forward, frozen, trained = _pass_flops(family, teacher.network.to_json_string(), tuple(latent_shape), cond)
    both = passes(kappas[:1])
    denoisers = passes(kappas[1:3]) + passes(kappas[3:])
    return forward * (2 - shared + both + denoisers) + trained * (1 + both) + frozen * denoisers


@lru_cache
def _pass_flops(family, config, latent_shape, cond):
    """FLOPs of a pass for one image, of its backward pass when frozen, and of that when trained. `config`: the
    network's configuration as JSON, `cond`: (name, *shape) of each of its conditions. Counted once for all runs of a
    process (those of a study)."""
    with torch.device("meta"):
        network = family.class_of(family.network).from_config(json.loads(config)).requires_grad_(False)
        x = torch.zeros(1, *latent_shape, requires_grad=True)
        t, cond = torch.zeros(1), {name: torch.zeros(shape) for name, *shape in cond}
    forward, frozen, trained = Ledger(), Ledger(), Ledger()
    with gpu_attention():
        with forward:
            y = family.predict(network, x, t, cond)
        with frozen:
            y.sum().backward()
        network.requires_grad_(True)
        y = family.predict(network, x.detach(), t, cond)
        with trained:
            y.sum().backward()
    return forward.flops, frozen.flops, trained.flops


def count_flops(config, teacher, latent_shape):
    """`image_flops` of a run: its configuration, its Teacher, (C, H, W)."""
    g = config.guidance
    return image_flops(teacher, latent_shape, (g.kappa1, g.kappa2, g.kappa3, g.kappa4),
                       config.speed.share_generator_forward)


def _run(name, networks, objective, latent_shape, conditions, dtype, n):
    """(Ledger.timeline, FLOPs) of one micro-batch of n images."""
    engines, ledger = {k: PlainEngine(u) for k, u in networks.items()}, Ledger()
    options = {"run": ledger.concurrent} if name == "generator" else {}
    update = UPDATES[name](Networks(engines["generator"], engines["fake_score"], networks["teacher"]), objective,
                           agree=lambda finite: True, **options)
    device = next(networks[name].parameters()).device
    x = torch.zeros(n, *latent_shape, device=device)
    cond, uncond = (conditions(rows, device=device, dtype=dtype) for rows in (n, 1))
    batch = Batch(cond, uncond, x, x.clone(),
                  torch.zeros(n, device=device, dtype=torch.int64), torch.zeros(n, device=device, dtype=torch.bool),
                  x[:, None][:, :0], torch.zeros(n, device=device))
    for role, network in networks.items():
        network.requires_grad_(role != "teacher")
        network.zero_grad(set_to_none=True)
    with gpu_attention(), without_launches(), without_collection(), ledger:
        update([batch])
    grads = [p.grad for p in networks[name].parameters() if p.grad is not None]
    timeline = ledger.timeline(grads)
    networks[name].zero_grad(set_to_none=True)
    return timeline, ledger.flops


class PlainEngine:
    """What `distill` needs of an engine, without DeepSpeed."""

    def __init__(self, network):
        self.module = EngineModule(network)

    def __call__(self, compute, *tensors):
        """compute(network, *tensors)."""
        return self.module(compute, *tensors)

    def backward(self, loss):
        """Gradients of a scalar."""
        loss.backward()

    def step(self):
        """Nothing: the optimizer's step is no part of an update's footprint."""


class Ledger(TorchDispatchMode):
    """Notes the birth and the death of every storage that operations make inside the block, and counts their FLOPs
    (a multiplication and an addition are two; attention's backward pass with the scores that it computes again)."""

    def __init__(self):
        super().__init__()
        self.flops = 0
        self.events, self._known = [], {}                # (storage's number, bytes; negative at its death, beside)
        self._beside = False

    def concurrent(self, first, second, device):
        """In the place of accel/graphs.py's, in turn: notes which storages the second makes."""
        result = first()
        self._beside = True
        try:
            return result, second()
        finally:
            self._beside = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        count = flop_registry.get(function._overloadpacket)
        if count:
            self.flops += count(*args, **kwargs, out_val=out)
        if function.is_view or function._schema.name.endswith("_"):
            return out                                   # no storage of its own
        inputs = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in inputs:
                self._note(t.untyped_storage())
        return out

    def _note(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        number = len(self.events)
        self._known[key] = number
        self.events.append((number, size, self._beside))
        weakref.finalize(storage, self._gone, key, number, size, self._beside)

    def _gone(self, key, number, size, beside):
        self._known.pop(key, None)
        self.events.append((number, -size, beside))

    def timeline(self, grads):
        """[bytes alive (of `grads`, of what was made beside, of the rest), ...] after every event."""
        own = {self._known[g.untyped_storage()._cdata] for g in grads}
        alive, rows = [0, 0, 0], []
        for number, size, beside in self.events:
            alive[0 if number in own else 1 if beside else 2] += size
            rows.append(tuple(alive))
        return rows


@contextmanager
def without_collection():
    """No garbage collection, which would come at another event each time and make two runs incomparable."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def gpu_attention():
    """Attention on the meta device as GPUs run it, without the scores in memory; torch would choose the plain kind."""
    original = F.scaled_dot_product_attention

    def attend(q, k, v, *args, **kwargs):
        if not q.is_meta:
            return original(q, k, v, *args, **kwargs)
        if q.dtype == torch.float32:
            return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    F.scaled_dot_product_attention = attend              # (a function mode would not reach recomputation in backward)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
