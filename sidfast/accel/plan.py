"""How the networks run: what the `speed` section asks for, and what this machine and this teacher allow."""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from sidfast.accel.attention import choose_attention
from sidfast.accel.prepacked import pass_layout, refresh
from sidfast.accel.unet import attention_shapes, fuse, fuse_blocker
from sidfast.common.errors import UserError
from sidfast.kernels.backend import INTERPRETED
from sidfast.method.equations import passes

_ROLES = 8                                               # forward alone, trained, frozen, each for a pass or two
_NAMES = {"fused": "fused kernels", "cuda_graphs": "CUDA graphs"}


@dataclass(frozen=True)
class Speed:
    """What was decided; `notes` say why where it is less than it could be."""

    fused: bool
    cuda_graphs: bool
    overlap: bool
    compile: bool
    attention: str
    gradient_checkpointing: bool
    share_generator_forward: bool
    packed: bool                                         # weights in the form that passes read are kept
    attention_ms: dict = field(default_factory=dict)     # of the candidates, where they were timed
    notes: tuple = ()

    def describe(self) -> dict[str, Any]:
        """For config.json."""
        return asdict(self)

    def prepare(self, unet: Any) -> nn.Module:
        """Make a UNet (of diffusers) run as decided, in place, and return it.

        Raises ValueError for one that the fused kernels do not cover (`fuse`), and what `compile_regions` raises.
        """
        if self.fused:
            return fuse(pass_layout(unet) if self.packed else unet, self.attention, self.gradient_checkpointing)
        if self.gradient_checkpointing:
            unet.train().enable_gradient_checkpointing()
        if self.compile:
            compile_regions(unet)
        return unet

    def refresh(self, unet: nn.Module) -> None:
        """To be called for a network that `prepare` has seen once its weights are there, and whenever they change."""
        if self.packed:
            refresh(unet)


def resolve_acceleration(section: Any, teacher: Any, latent_shape: tuple[int, int, int], rows: int,
                         stages: Sequence[int], dtype: torch.dtype, device: torch.device, capturing: str | None = None
                         ) -> Speed:
    """The Speed of a run. `section`: the configuration's `speed`; latent_shape: (C, H, W); `rows`: of the largest pass;
    `stages`: ZeRO's, per engine; `capturing`: what speaks against CUDA graphs besides, or None.

    Times attention on the real shapes, and checks it: all there are if it is left to it, or the one asked for. Raises
    UserError for what is asked for and impossible here, RuntimeError if no implementation of attention works.
    """
    fused, graphs, overlap, notes = check_speed(section, teacher, stages, device, capturing)
    attention, timed = section.attention, {}
    if fused:
        x, t = torch.zeros(1, *latent_shape, device=device), torch.zeros(1, device=device)
        cond = teacher.conditions(1, device, teacher.network.dtype)
        shapes = attention_shapes(teacher.network, rows, lambda network: teacher.family.predict(network, x, t, cond))
        timed = _timed_attention(tuple(shapes), dtype, device, None if attention == "auto" else (attention,))
        attention = next(iter(timed))
        if isinstance(timed[attention], str):
            if section.attention != "auto":
                raise UserError(f"speed.attention: {attention} does not work here ({timed[attention]}); "
                                f"leave it at auto")
            raise RuntimeError(f"no implementation of attention works here: {timed}")
    packed = fused and 3 not in stages                   # (of stage 3's weights, only parts are here)
    return Speed(fused, graphs, overlap, section.compile, attention, section.gradient_checkpointing,
                 section.share_generator_forward, packed, timed, notes)


def largest_pass(config: Any, micro_batch: int) -> int:
    """Rows of a run's largest pass: images times texts."""
    g, factor = config.guidance, config.train.fake_score_factor
    return micro_batch * max(factor * passes([g.kappa1]), passes([g.kappa2, g.kappa3]), passes([g.kappa4]))


def check_speed(section: Any, teacher: Any, stages: Sequence[int], device: torch.device, capturing: str | None = None
                ) -> tuple[bool, bool, bool, tuple[str, ...]]:
    """What of a Speed follows without running anything: (fused, cuda_graphs, overlap, notes). Raises the same
    UserErrors."""
    notes: list[str] = []
    gpu, sharded = device.type == "cuda", 3 in stages
    kernels_run = gpu or (INTERPRETED and section.fused is True)                 # (interpreted if asked for: for tests)
    reason = fuse_blocker(teacher.network) if kernels_run else "there is no GPU here"
    if section.compile and section.fused is True:
        raise UserError("speed.compile is for networks without the fused kernels; set speed.fused to false, or auto")
    fused = _wanted("fused", section.fused, reason, notes) and not section.compile
    reason = ("there is no GPU here" if not gpu else
              "ZeRO stage 3 moves parameters about in memory" if sharded else
              "gradient checkpointing of networks that are not fused draws random states" if
              section.gradient_checkpointing and not fused else capturing)
    graphs = _wanted("cuda_graphs", section.cuda_graphs, reason, notes)
    overlap = graphs and not section.gradient_checkpointing if section.overlap == "auto" else section.overlap
    if overlap and not graphs:                           # (the host would be too slow for two streams)
        raise UserError("speed.overlap: impossible without CUDA graphs; leave it at auto")
    if not fused and section.attention != "auto":
        raise UserError(f"speed.attention ({section.attention}) chooses for the fused kernels, which do not run here"
                        f"{': ' + notes[0] if notes else ''}; leave it at auto")
    return fused, graphs, overlap, tuple(notes)


@functools.cache
def _timed_attention(shapes, dtype, device, names):
    """Timed once, and by the first process for all: runs in one process, and processes of one run, take the same."""
    timed = [choose_attention(shapes, dtype, device, names)]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(timed)
    return timed[0]


def _wanted(key, value, reason, notes):
    """Whether a setting (True, False or "auto") holds where `reason` speaks against it."""
    if value is True and reason:
        raise UserError(f"speed.{key}: impossible, {reason}; leave it at auto")
    if value == "auto" and reason:
        notes.append(f"no {_NAMES[key]}: {reason}")
    return value is True or (value == "auto" and not reason)


def compile_regions(unet: nn.Module) -> None:
    """torch.compile for the blocks of a UNet one by one, in place: the whole takes minutes and is no faster.

    Raises torch's RuntimeError where Python is none that it supports; errors of the compilation come in the first pass.
    """
    blocks = [m for m in unet.modules() if type(m).__name__ in ("ResnetBlock2D", "BasicTransformerBlock")]
    # Blocks of a kind share one piece of code, which is compiled for each size and role; beyond a limit of eight it
    # would run as written, and say so in a warning at most.
    config, needed = torch.compiler.config, _ROLES * len(blocks)
    config.recompile_limit = max(config.recompile_limit, needed)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, needed)
    config.fail_on_recompile_limit_hit = True
    for block in blocks:
        block.compile(dynamic=False)
