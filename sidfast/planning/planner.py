"""What each way to run a configuration needs of a GPU.

Sizes come from the real networks on the meta device (footprint.py) and from what DeepSpeed keeps (memory.py).
"""

import copy
from dataclasses import dataclass

from sidfast.accel.prepacked import pass_layout, prepacked_bytes, refresh
from sidfast.accel.unet import fuse, fuse_blocker
from sidfast.engines.engine import ENGINES, compute_dtype, engine_section, offloads
from sidfast.kernels.backend import without_launches
from sidfast.method.equations import passes
from sidfast.method.updates import Objective
from sidfast.planning import memory
from sidfast.planning.footprint import UPDATES, image_flops, measure_update

GIB = 2**30
SLACK = 0.1                                              # of all that is counted: fragments, libraries' workspaces
CONTEXT = 0.6 * GIB                                      # of a GPU's memory that CUDA itself takes
_MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# (label, stage, offload)
STAGES = (("0", 0, False), ("1", 1, False), ("2", 2, False), ("2, offload", 2, True), ("3", 3, False),
          ("3, offload", 3, True))


@dataclass(frozen=True)
class Option:
    """One way to run: what it needs of each GPU (`bytes`, by part `parts`) and of the host per process (`host`), in
    bytes."""

    label: str
    stage: int
    offload: bool
    micro_batch: int
    checkpointing: bool
    bytes: float
    parts: dict
    host: float
    accumulation: int

    def overrides(self, deepspeed):
        """The --set options that ask for it, of a run with this `deepspeed` section: all else in it stays."""
        words = [f"train.micro_batch={self.micro_batch}",
                 f"speed.gradient_checkpointing={str(self.checkpointing).lower()}"]
        places = {"deepspeed": deepspeed} | {f"deepspeed.{name}": deepspeed.get(name, {}) for name in ENGINES}
        for place, section in places.items():            # an engine's own section, where it says so itself
            zero = section.get("zero_optimization", {})
            if place == "deepspeed" or "stage" in zero:
                words.append(f"{place}.zero_optimization.stage={self.stage}")
            if (place == "deepspeed" or "offload_optimizer" in zero) and offloads(section) != self.offload:
                device = "cpu" if self.offload else "none"
                words.append(f'\'{place}.zero_optimization.offload_optimizer={{"device":"{device}"}}\'')
        return " ".join(f"--set {word}" for word in words)


class Planner:
    """Measures a configuration's updates once, then answers for any stage, micro-batch and number of GPUs."""

    def __init__(self, config, teacher, note=lambda text: None, prepare=None, counted=None):
        """`teacher`: a Teacher, with or without weights. `prepare(checkpointing)`: a network as it will run, on the
        device on which to measure; as a GPU would run it, on the meta device, unless given. `counted`: a dictionary
        that planners without `prepare` share, to measure alike updates once."""
        self.config, self.teacher, self.note, self._prepare = config, teacher, note, prepare or self._on_a_gpu
        self.latent_shape = teacher.latent_shape(config.model.resolution)
        self.dtype = compute_dtype(config.deepspeed)
        speed = config.speed                             # whether a GPU would run the networks on the fused kernels
        self.fused = bool(speed.fused) and not speed.compile and fuse_blocker(teacher.network) is None
        self._counted, self.packed = {} if counted is None else counted, ()

    @property
    def flops(self):
        """FLOPs of one training image, one update of each network, without recomputation by checkpointing."""
        g = self.config.guidance
        return image_flops(self.teacher, self.latent_shape, (g.kappa1, g.kappa2, g.kappa3, g.kappa4),
                           self.config.speed.share_generator_forward)

    def footprints(self, checkpointing):
        """{update: Footprint}, measured when first asked for."""
        keys = {name: (name, checkpointing, *self._alike(name)) for name in UPDATES}
        missing = [name for name, key in keys.items() if key not in self._counted]
        if missing:
            self.note(f"counting the updates, {'with' if checkpointing else 'without'} gradient checkpointing ...")
            measured, packed = self._measure(checkpointing, missing)
            self._counted |= {keys[name]: (measured[name], packed) for name in missing}
        self.packed = self._counted[keys["generator"]][1]
        return {name: self._counted[key][0] for name, key in keys.items()}

    def _alike(self, update):
        """What the sizes of an update's tensors depend on, checkpointing and micro-batch aside: of the scales of
        guidance only the passes that they need. (The empty text alone, shared by all images, is copied for them.)"""
        g = self.config.guidance
        denoisers = ((g.kappa1,),) if update == "fake_score" else ((g.kappa2, g.kappa3), (g.kappa4,))
        return (self.teacher, self.latent_shape, self.dtype, self.fused,
                *((passes(kappas), not any(kappas)) for kappas in denoisers))

    def configured(self, name="generator"):
        """(label, stage, offload) of an engine as configured."""
        section = engine_section(self.config, name)
        return "as configured", section.get("zero_optimization", {}).get("stage", 0), offloads(section)

    def option(self, label, stage, offload, micro_batch, checkpointing, gpus):
        """The Option of one setting, or None if the global batch cannot be split so."""
        batch, factor = self.config.train.batch_size, self.config.train.fake_score_factor
        if batch % (micro_batch * factor * gpus):
            return None
        sizes = self.teacher.parameters()
        P, prints = sizes.pop(self.teacher.family.network), self.footprints(checkpointing)
        zeros = {name: self._zero(name, stage, offload, gpus) for name in ENGINES}
        width, teacher = zeros["generator"].width, max(zeros.values(), key=lambda zero: zero.stage)
        parts = {}
        for zero in zeros.values():
            for part, size in memory.resident(zero, P).items():
                parts[part] = parts.get(part, 0) + size
        ema = zeros["generator"]
        parts["average"] = 4 * P * ema.share(1) * (not ema.offload)
        parts["teacher"] = width * P * teacher.share(3)
        parts["text encoder and VAE"] = 4 * sum(sizes.values())
        parts["sums of gradients"] = max(memory.sums(zero, P) for zero in zeros.values())
        at_once = {"generator": micro_batch, "fake_score": micro_batch * factor}
        overlap = self._overlaps(zeros.values(), checkpointing)                  # (memory apart: it does not mix)
        running = max(prints[name].peak(at_once[name], gradients=False, beside=not overlap)
                      + sum(memory.gathered(zero, P) for zero in (*zeros.values(), teacher)) for name in ENGINES
                      ) + overlap * prints["generator"].beside(micro_batch)
        steps = max(max(memory.during_flush(zero, P) * (zero.stage < 3), memory.during_step(zero, P))
                    for zero in zeros.values())
        parts["update"] = running + steps if self._graphed(zeros.values()) else max(running, steps)
        parts["packed weights"] = sum(self.packed) * all(zero.stage < 3 for zero in zeros.values())
        parts["fragments and workspaces"] = max(SLACK * sum(parts.values()), 4 * P)  # (fitted: docs/scaling.md)
        host = sum(memory.on_host(zero, P) for zero in zeros.values()) + 4 * P * ema.share(1) * ema.offload
        return Option(label, stage, offload, micro_batch, checkpointing, sum(parts.values()), parts, host,
                      batch // (micro_batch * gpus))

    def options(self, gpus):
        """Every Option that the global batch allows, by stage, then micro-batch."""
        sizes = sorted({*_MICRO_BATCHES, self.config.train.micro_batch} - {"auto"})
        found = [self.option(*stage, m, checkpointing, gpus)
                 for stage in STAGES for checkpointing in (False, True) for m in sizes]
        return [option for option in found if option]

    def sent(self, option, gpus):
        """Bytes that a GPU sends in one step."""
        zero = self._zero("generator", option.stage, option.offload, gpus)
        return memory.sent_per_step(zero, self.teacher.parameters()[self.teacher.family.network], option.accumulation,
                                    self.config.train.fake_score_factor)

    def _graphed(self, zeros):
        """Whether passes are CUDA graphs, which keep their memory while the optimizer steps."""
        return self.config.speed.cuda_graphs is not False and all(zero.stage < 3 for zero in zeros)

    def _overlaps(self, zeros, checkpointing):
        """Whether teacher and fake score run side by side in the generator's update."""
        wanted = self.config.speed.overlap
        return self._graphed(zeros) and (not checkpointing if wanted == "auto" else wanted)

    def _zero(self, name, stage, offload, gpus):
        section = engine_section(self.config, name)
        zero = dict(section.get("zero_optimization", {})) | {"stage": stage}
        zero["offload_optimizer"] = {"device": "cpu"} if offload else {"device": "none"}
        return memory.Zero.of(section | {"zero_optimization": zero}, gpus, getattr(self.config.optimizer, name))

    def _on_a_gpu(self, checkpointing):
        network = copy.deepcopy(self.teacher.network).to(self.dtype)
        if self.fused:
            network = fuse(pass_layout(network), "flash", checkpointing)
            with without_launches():
                refresh(network)
        elif checkpointing:
            network.train().enable_gradient_checkpointing()
        return network

    def _measure(self, checkpointing, names):
        """({update: Footprint}, what each network packs) of the updates `names`."""
        networks = {role: self._prepare(checkpointing) for role in ("generator", "fake_score", "teacher")}
        packed = [prepacked_bytes(network) for network in networks.values()]
        g, schedule = self.config.guidance, self.teacher.schedule.to(networks["teacher"].device)
        objective = Objective(schedule, self.teacher.family.predict, g.kappa1, g.kappa2, g.kappa3, g.kappa4,
                              self.config.loss.alpha, self.config.noise.t_init)
        return {name: measure_update(name, networks, objective, self.latent_shape, self.teacher.conditions, self.dtype)
                for name in names}, packed


def recommend(options, limit):
    """The Option to take among those that fit into a GPU of `limit` bytes beside what CUDA takes, or None.

    Least sharding and no recomputation first, for both cost time; then the largest micro-batch up to 32, for beyond
    that a GPU gains little.
    """
    fitting = [o for o in options if o.bytes <= limit - CONTEXT and o.micro_batch <= 32]
    order = [s[0] for s in STAGES if s[0] != "0"] + ["0"]                        # stage 1 costs nothing over stage 0
    best = sorted(fitting, key=lambda o: (o.offload, o.checkpointing and o.micro_batch < 4, order.index(o.label),
                                          o.checkpointing, -o.micro_batch))
    large = [o for o in best if o.micro_batch >= 4]      # tiny passes leave a GPU idle
    return (large or best or [None])[0]
