"""DeepSpeed engines for generator and fake score, and their full state under any ZeRO stage.

DeepSpeed keeps fp32 master weights in flat shards whose layout depends on the ZeRO stage and the number of processes.
`gather` and `scatter` translate between any tensors in that layout (master weights, Adam's moments, an average) and
whole tensors by parameter name. Checkpoints hold the latter, so they need no pickle and fit any stage and any number
of processes.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from torch import nn

from sidfast.common.errors import UserError
from sidfast.config.deepspeed import ENGINES
from sidfast.config.schema import Adam, Config
from sidfast.engines.adam import CheckedAdam, CheckedSecondMomentAdam, SecondMomentAdam
from sidfast.engines.blocks import flatten_blocks, param_slices
from sidfast.engines.module import EngineModule

MOMENTS = ("exp_avg", "exp_avg_sq")
ZERO_SUPPORTED_OPTIMIZERS.append(SecondMomentAdam)       # PyTorch's Adam is on it; DeepSpeed looks at the very type


def engine_config(config: Config, name: str, processes: int) -> dict[str, Any]:
    """DeepSpeed's configuration of one engine: the user's section, with batch sizes filled in.

    Below ZeRO stage 3 an update sums gradients over micro-batches itself (GradientAccumulator), and hands over the
    sum of a global batch. Raises UserError if the global batch does not divide among micro-batches and processes.
    """
    check_batch(config, processes)
    share, section = config.train.batch_size // processes, engine_section(config, name)
    at_once = share if is_flat(section) else config.train.images_at_once(name)
    return section | {"train_micro_batch_size_per_gpu": at_once, "gradient_accumulation_steps": share // at_once}


def check_batch(config: Config, processes: int) -> None:
    """Raise UserError if the global batch does not divide among micro-batches and processes."""
    train = config.train
    for name in ENGINES:
        images = train.images_at_once(name)
        if train.batch_size % (images * processes):
            factor = " x train.fake_score_factor" if images != train.images_at_once("generator") else ""
            raise UserError(f"train.batch_size ({train.batch_size}) must be a multiple of train.micro_batch{factor} x "
                            f"processes ({images} x {processes} = {images * processes})")


def engine_section(config: Config, name: str) -> dict[str, Any]:
    """The user's section for one engine, with the defaults that differ from DeepSpeed's."""
    section = copy.deepcopy({k: v for k, v in config.deepspeed.items() if k not in ENGINES})
    _merge(section, config.deepspeed.get(name, {}))
    section.setdefault("steps_per_print", 2**31)         # the trainer prints its own progress
    section.setdefault("timers", {"throughput": {"enabled": False}})             # it waits for the GPU, twice a step
    section.setdefault("gradient_clipping", 0.0)         # DeepSpeed clips to norm 1 unless told; the method does not
    return section


def zero_stage(section: dict[str, Any]) -> int:
    """ZeRO's stage in a `deepspeed` section."""
    zero = section.get("zero_optimization")
    return zero.get("stage", 0) if isinstance(zero, dict) else 0


def zero_stages(config: Config) -> list[int]:
    """ZeRO's stage of each engine."""
    return [zero_stage(engine_section(config, name)) for name in ENGINES]


def is_flat(section: dict[str, Any]) -> bool:
    """Whether an engine's parameters are those of a FlatParameters: stage 3 parts and gathers them one by one."""
    return zero_stage(section) != 3


def _merge(base, extra):
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def compute_dtype(section: dict[str, Any]) -> torch.dtype:
    """The type that a `deepspeed` section makes networks compute in."""
    bf16, fp16 = (section.get(k, {}).get("enabled", False) for k in ("bf16", "fp16"))
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32


def build_engine(network: nn.Module, adam: Adam, section: dict[str, Any], device: torch.device) -> Any:
    """A DeepSpeed engine with Adam around a network in fp32; a collective call.

    `adam`: the configuration's optimizer.NETWORK; `section`: from `engine_config`. DeepSpeed's errors pass through
    (probe.py asks it first).
    """
    flat = is_flat(section)
    module = EngineModule((network if flat else flatten_blocks(network)).requires_grad_(True).train(), flat)
    eps = adam.eps or (1e-6 if compute_dtype(section) == torch.float16 else 1e-8)
    optimizer = _adam(module, adam, eps, section, device)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=section)
    if hasattr(engine.optimizer, "fp32_groups"):         # ZeRO 0 in bf16 or fp16 has stepped Adam, on zeros, to make
        engine.basic_optimizer.state.clear()             # its state; the first update would then be sqrt(2) too large
    if module.flat:
        module.flat.bind()                               # DeepSpeed has moved and cast the buckets
    return engine


def shard(network: nn.Module, section: dict[str, Any]) -> None:
    """Deal the weights of a frozen network out to the processes, as ZeRO stage 3 does: each block is gathered for its
    passes. In place; a collective call. `section`: that of an engine at stage 3."""
    zero = {k: v for k, v in section["zero_optimization"].items() if k != "offload_optimizer"}
    deepspeed.initialize(model=flatten_blocks(network).requires_grad_(False),
                         config=section | {"zero_optimization": zero})


def set_learning_rate(engine: Any, adam: Adam, step: int, total: int) -> None:
    """The learning rate of step 0, 1, 2, ... of `total`: linear warm-up, constant, linear decay."""
    factor = min(1.0, (step + 1) / max(1, adam.warmup), (total - step) / max(1, adam.decay))
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = adam.lr * factor


def offloads(section: dict[str, Any]) -> bool:
    """Whether a `deepspeed` section keeps the optimizer's state in host memory, or on a disk."""
    offload = section.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def moments_kept(adam: Adam, section: dict[str, Any]) -> tuple[str, ...]:
    """The kinds of Adam's moments that an engine will keep; DeepSpeed's Adam for the CPU always keeps both."""
    return MOMENTS if adam.beta1 > 0 or offloads(section) else MOMENTS[1:]


def _adam(module, adam, eps, section, device):
    parameters, both = module.parameters(), {"lr": adam.lr, "betas": (adam.beta1, adam.beta2), "eps": eps}
    if offloads(section):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameters, adamw_mode=False, **both)
    plain = section.get("zero_optimization", {}).get("stage", 0) == 0 and compute_dtype(section) == torch.float32
    if adam.beta1 == 0:                                  # DeepSpeed's own optimizers check gradients by themselves
        return (CheckedSecondMomentAdam if plain else SecondMomentAdam)(parameters, adam.lr, adam.beta2, eps)
    return (CheckedAdam if plain else torch.optim.Adam)(parameters, fused=device.type == "cuda", **both)


def master_weights(engine: Any) -> list[torch.Tensor]:
    """The fp32 tensors of this process that the optimizer steps, as a flat list, in a fixed order."""
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat",         # ZeRO 3
                 "single_partition_of_fp32_groups",      # ZeRO 1 and 2
                 "fp32_groups_flat_partition",           # ZeRO 1, bf16 with fp32 gradients
                 "fp32_groups"):                         # ZeRO 0 in fp16 or bf16
        groups = getattr(optimizer, name, None)
        if groups:
            return [t for group in groups for t in (group if isinstance(group, (list, tuple)) else [group])]
    return [p for group in optimizer.param_groups for p in group["params"]]


@torch.no_grad()
def gather(engine: Any, tensors: Sequence[torch.Tensor], keep: Callable[[str], bool] = lambda name: True
           ) -> dict[str, torch.Tensor]:
    """Whole tensors {parameter name: fp32, on the CPU} out of `tensors`, laid out like `master_weights(engine)`.

    Every process must call it; each keeps the names for which keep(name) holds.
    """
    return {name: _host_copy(value) for name, value in _each(engine, tensors) if keep(name)}


@torch.no_grad()
def copy_weights(engine: Any, tensors: Sequence[torch.Tensor], network: nn.Module) -> None:
    """Write `tensors`, laid out like `master_weights(engine)`, into another network that is whole; a collective
    call."""
    target = dict(network.named_parameters())
    for name, value in _each(engine, tensors):
        target[name].copy_(value)


def _each(engine, tensors):
    """(name, whole tensor) of each parameter, out of `tensors`; to be gone through to the end."""
    own = master_weights(engine)
    _swap(own, tensors)
    try:
        flat = engine.module.flat
        if not flat:
            for parameter, found in param_slices(engine.module.network):
                whole = safe_get_full_fp32_param(parameter).detach()
                yield from ((place.name, place.view(whole)) for place in found)
            return
        for i, bucket in enumerate(flat.buckets):
            yield from flat.parts(i, safe_get_full_fp32_param(bucket) if hasattr(bucket, "_hp_mapping") else own[i])
    finally:
        _swap(own, tensors)
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()    # until then the copies are under way


@torch.no_grad()
def scatter(engine: Any, full: dict[str, Any], tensors: Sequence[torch.Tensor]) -> None:
    """The inverse of `gather`: writes this process's part of `full` ({name: tensor}) into `tensors`, in place.

    Raises KeyError for a parameter that `full` lacks.
    """
    own = master_weights(engine)
    _swap(own, tensors)
    try:
        flat, device = engine.module.flat, own[0].device
        if not flat:
            for parameter, found in param_slices(engine.module.network):
                whole = torch.zeros(parameter.ds_shape, device=device)
                for place in found:
                    place.view(whole).copy_(full[place.name])
                safe_set_full_fp32_param(parameter, whole)
            return
        for i, bucket in enumerate(flat.buckets):
            whole = torch.zeros_like(bucket, dtype=torch.float32, device=device, requires_grad=False)
            for name, part in flat.parts(i, whole):
                part.copy_(full[name])
            if hasattr(bucket, "_hp_mapping"):
                safe_set_full_fp32_param(bucket, whole)
            else:                                        # ZeRO 0: one master per bucket, in the same order
                own[i].copy_(whole)
    finally:
        _swap(own, tensors)


def _host_copy(value):
    """An fp32 copy in host memory, contiguous; from a GPU into pinned memory (which PyTorch keeps for the next time),
    without waiting."""
    return torch.empty(value.shape, dtype=torch.float32, pin_memory=value.is_cuda).copy_(value, non_blocking=True)


def _swap(left, right):
    """Exchange the contents of two lists of tensors; nothing happens to a list and itself."""
    for a, b in zip(left, right, strict=True):
        if a is not b:
            held = a.detach().clone()
            a.data.copy_(b)
            b.data.copy_(held)


def moments(engine: Any) -> dict[str, list[torch.Tensor]]:
    """{kind: Adam's moments for each of `master_weights(engine)`}, of the kinds kept; zeros before the first step."""
    own, state = master_weights(engine), engine.basic_optimizer.state
    return {kind: [state[m][kind] if kind in state.get(m, {}) else torch.zeros_like(m, requires_grad=False)
                   for m in own] for kind in _kinds(engine)}


def _kinds(engine):
    return MOMENTS[1:] if isinstance(engine.basic_optimizer, SecondMomentAdam) else MOMENTS


def optimizer_step(engine: Any) -> int:
    """Steps that Adam has taken (overflows in fp16 not counted)."""
    steps = {int(s["step"]) for s in engine.basic_optimizer.state.values() if "step" in s}
    return steps.pop() if steps else 0


def load_moments(engine: Any, full: dict[str, Any], step: int) -> None:
    """Set Adam's state from whole moments {kind: {name: tensor}}, {} for a kind that was not kept, after `step` steps.

    A first moment that was not kept is the gradient: an Adam with beta1 = 0 that keeps one may begin with zeros.
    """
    own, optimizer = master_weights(engine), engine.basic_optimizer
    values = {kind: [torch.zeros_like(m, requires_grad=False) for m in own] for kind in _kinds(engine)}
    for kind, tensors in values.items():
        if full[kind] or kind != "exp_avg" or optimizer.param_groups[0]["betas"][0] > 0:
            scatter(engine, full[kind], tensors)
    on_device = isinstance(optimizer, torch.optim.Adam) and optimizer.defaults.get("fused")
    for i, master in enumerate(own):
        counter = step if not isinstance(optimizer, torch.optim.Adam) else torch.tensor(
            float(step), device=master.device if on_device else "cpu")
        optimizer.state[master] = {"step": counter, **{kind: tensors[i] for kind, tensors in values.items()}}


def loss_scale(engine: Any) -> float:
    """The factor that DeepSpeed puts on the loss: in fp16, 1 otherwise."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0


def loss_scale_state(engine: Any) -> dict[str, Any]:
    """The dynamic loss scaler's counters in fp16 (an empty dictionary otherwise)."""
    if not engine.fp16_enabled():
        return {}
    return {k: v for k, v in vars(_loss_scaler(engine)).items()
            if isinstance(v, (int, float)) and not isinstance(v, bool)}


def load_loss_scale(engine: Any, state: dict[str, Any]) -> None:
    """Set the loss scaler's counters again."""
    for key, value in state.items():
        setattr(_loss_scaler(engine), key, value)


def _loss_scaler(engine):
    optimizer = engine.optimizer                         # (the second: ZeRO stage 0)
    return optimizer.loss_scaler if hasattr(optimizer, "loss_scaler") else optimizer.loss_scale_config
