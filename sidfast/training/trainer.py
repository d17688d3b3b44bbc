"""A training run, from configuration to export."""

import copy
import sys
import time
from dataclasses import dataclass, field

import torch
from deepspeed import comm
from tqdm import tqdm

from sidfast.data.prompts import open_prompts
from sidfast.method.distill import Networks, Objective, fake_score_update, generator_update
from sidfast.method.guidance import drops_prompts
from sidfast.method.noise import NoiseLevels
from sidfast.networks.graphs import GraphedLoss
from sidfast.training.batches import Batches, TextEncoder
from sidfast.training.checkpoint import read_state, read_tensors, restore, save_checkpoint
from sidfast.training.ema import Ema
from sidfast.training.engines import ENGINES, build_engine, compute_dtype, engine_config, set_learning_rate
from sidfast.training.preview import Preview
from sidfast.training.run import RunDirectory
from sidfast.training.speed import decide_speed

_LOSSES = ("fake_score_loss", "generator_loss", "non_finite")


@dataclass
class Progress:
    """Where a run stands. `sums` collects the losses since the last log line, on the device."""

    step: int = 0
    images: int = 0
    sums: list = field(default_factory=lambda: [0.0, 0.0, 0.0])
    logged: int = 0                                      # the step of the last log line


def train(config, out, checkpoint, teacher, device):
    """Run or go on with a run; a collective call of all processes.

    `checkpoint`: the folder to go on from, or None; `teacher`: from `load_teacher`, taken over. Returns the final
    evaluation on the first process, or None.
    """
    rank, processes = comm.get_rank(), comm.get_world_size()
    sections = {name: engine_config(config, name, processes) for name in ENGINES}
    dtype, latent_shape = compute_dtype(config.deepspeed), _latent_shape(teacher, config)
    _set_up_device(config, device)

    # the run so far, and what it starts from
    progress = _resume(read_state(checkpoint)["extra"], rank, processes) if checkpoint else Progress()
    for module in (teacher.unet, teacher.vae, teacher.text_encoder):
        module.to(device)
    stages = [section.get("zero_optimization", {}).get("stage", 0) for section in sections.values()]
    speed = decide_speed(config.speed, teacher, latent_shape, 2 * config.train.micro_batch, stages, dtype, device)
    if rank == 0 and speed.notes:
        print(f"sidfast: plain PyTorch takes over: {'; '.join(speed.notes)}", file=sys.stderr)
    run = RunDirectory(out, config, progress.step, speed=speed.describe()) if rank == 0 else None
    preview = Preview(config, teacher, run) if rank == 0 else None
    if rank == 0:
        preview.begin(progress.step)                     # while the teacher is in fp32 and memory is free
    comm.barrier()

    # the networks
    engines = {}
    for name in ENGINES:
        unet = copy.deepcopy(teacher.unet)
        if checkpoint:
            unet.load_state_dict(read_tensors(checkpoint, name, "weights"))
        engines[name] = build_engine(speed.prepare(unet), getattr(config.optimizer, name), sections[name], device)
    speed.prepare(teacher.unet.to(dtype))
    networks = Networks(**engines, teacher=teacher.unet)
    ema = Ema(engines["generator"], config.ema.half_life, config.ema.ramp_up)
    if checkpoint:
        restore(checkpoint, engines, ema)

    # the data, and what is optimised
    g, schedule = config.guidance, teacher.schedule.to(device)
    objective = Objective(schedule, teacher.prediction_type, g.kappa1, g.kappa2, g.kappa3, g.kappa4, config.loss.alpha,
                          config.noise.t_init)
    levels = NoiseLevels(schedule, config.noise.density, config.noise.t_min, config.noise.t_max, **config.noise.options)
    dropout = g.prompt_dropout if drops_prompts(g.kappa1, g.kappa2, g.kappa3) else 0.0
    batches = Batches(open_prompts(config.data.prompts, config.train.seed),
                      TextEncoder(teacher.tokenizer, teacher.text_encoder, dtype), levels,
                      latent_shape, config.train, dropout, device, rank, processes)

    updates = _updates(networks, objective, speed.cuda_graphs, 3 in stages)
    _loop(config, engines, ema, batches, updates, progress, run, preview, out)

    # the end
    student, result = _student(ema, preview), None
    if rank == 0:
        result = preview.evaluate("end", student, progress.step, again=True)
        run.close()
        preview.finish()
    comm.barrier()
    return result


def _updates(networks, objective, graphs, sharded):
    """{network: its Update}, in the order they take turns (method.md, sections 4 and 5)."""
    options = {}
    if graphs:
        pool = torch.cuda.graph_pool_handle()
        options["wrap"] = lambda compute: GraphedLoss(compute, pool)
    if sharded:
        options["agree"] = _all_agree
    return {"fake_score": fake_score_update(networks, objective, **options),
            "generator": generator_update(networks, objective, **options)}


def _all_agree(flag):
    """Whether a flag (a tensor) holds on every process."""
    flag = flag.to(torch.int32)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
    return bool(flag)


def _loop(config, engines, ema, batches, updates, progress, run, preview, out):
    """Fake score and generator take turns; between steps come logs, sample grids, evaluations and checkpoints."""
    train, total, rank = config.train, config.train.total_steps, comm.get_rank()
    bar = tqdm(total=total * train.batch_size, initial=progress.images, unit="img", unit_scale=True, desc="distil",
               disable=rank != 0, mininterval=1, smoothing=0.1)
    clock, timed = time.perf_counter(), progress.step
    while progress.step < total:
        for name in ENGINES:
            set_learning_rate(engines[name], getattr(config.optimizer, name), progress.step, total)
        fake, gen = (update(batches(progress.step, name)) for name, update in updates.items())
        progress.step += 1
        progress.images += train.batch_size
        ema.update(train.batch_size, progress.images)
        news = (fake.loss, gen.loss, fake.non_finite + gen.non_finite)
        progress.sums = [old + new for old, new in zip(progress.sums, news, strict=True)]
        bar.update(train.batch_size)

        if progress.step % train.log_every == 0 or progress.step == total:
            values = _reduce(progress, train.batch_size)
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            values["images_per_s"] = (progress.step - timed) * train.batch_size / seconds
            timed = progress.step
            if rank == 0:
                run.log(progress.step, values | {"images": progress.images, **_memory()})
                bar.set_postfix(fake=f"{values['fake_score_loss']:.4g}", gen=f"{values['generator_loss']:.4g}",
                                refresh=False)
        last = progress.step == total
        sampling = train.samples and (progress.step % train.sample_every == 0 or last)
        saving = train.save_every and (progress.step % train.save_every == 0 or last)
        measuring = config.evaluation.every and progress.step % config.evaluation.every == 0 and not last
        if sampling or saving or measuring:
            student = _student(ema, preview)
            if sampling and rank == 0:
                preview.sample(progress.step, student)
            if measuring and rank == 0:
                preview.evaluate(f"step {progress.step}", student, progress.step, again=True)
            if saving:
                _save(engines, ema, progress, train, preview, student, out)
            clock, timed = time.perf_counter(), progress.step                    # speed is that of training alone
    bar.close()


def _student(ema, preview):
    """The averaged generator as a UNet on the first process, None on the others; a collective call."""
    weights = ema.gather(lambda name: preview is not None)
    return None if preview is None else preview.student(weights)


def _save(engines, ema, progress, train, preview, student, out):
    """The generator as others can use it, then a checkpoint."""
    if preview is not None:
        preview.export(student, f"{out}/export")
    sums = [None] * comm.get_world_size()
    torch.distributed.all_gather_object(sums, [float(v) for v in progress.sums])
    extra = {"step": progress.step, "images": progress.images, "logged": progress.logged, "sums": sums}
    save_checkpoint(f"{out}/checkpoints", progress.step, engines, ema, extra, train.keep)


def _resume(extra, rank, processes):
    """The Progress that a checkpoint holds; sums of another number of processes are dealt out evenly."""
    sums = extra["sums"]
    if len(sums) != processes:
        mean, total = [sum(c) / len(sums) for c in zip(*sums, strict=True)], sum(row[2] for row in sums)
        sums = [[mean[0], mean[1], total / processes]] * processes
    return Progress(extra["step"], extra["images"], sums[rank], extra["logged"])


def _reduce(progress, batch_size):
    """Means over the steps since the last log line and over processes; resets the sums.

    Raises RuntimeError if not a single sample in that time was finite.
    """
    device = next(v.device for v in progress.sums if torch.is_tensor(v))
    sums = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in progress.sums])
    comm.all_reduce(sums)
    steps, processes = progress.step - progress.logged, comm.get_world_size()
    fake, gen, non_finite = sums.tolist()
    progress.sums, progress.logged = [0.0, 0.0, 0.0], progress.step
    if non_finite >= 2 * batch_size * steps:
        raise RuntimeError(f"every sample of the last {steps} steps was non-finite: the run has diverged at step "
                           f"{progress.step}. Go on from a checkpoint with lower learning rates")
    return dict(zip(_LOSSES, (fake / steps / processes, gen / steps / processes, non_finite), strict=True))


def _latent_shape(teacher, config):
    factor = 2 ** (len(teacher.vae.config.block_out_channels) - 1)
    side = (config.model.resolution or teacher.resolution) // factor
    return teacher.unet.config.in_channels, side, side


def _set_up_device(config, device):
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.speed.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.speed.tf32
        torch.backends.cudnn.benchmark = True


def _memory():
    return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if torch.cuda.is_available() else {}

