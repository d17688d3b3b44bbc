"""A training run, from configuration to export."""

import copy
import sys
import time
from dataclasses import dataclass, field

import torch
from deepspeed import comm
from tqdm import tqdm

from sidfast.data.diversity import training_prompts
from sidfast.errors import Diverged, RunError
from sidfast.method.distill import Networks, Objective, fake_score_update, generator_update
from sidfast.method.guidance import drops_prompts
from sidfast.method.synthetic import SOURCES, build_source, cannot_capture
from sidfast.networks.graphs import Graphs
from sidfast.networks.precision import allow_tf32
from sidfast.networks.summed import GradientSums
from sidfast.publishing.export import recover_export
from sidfast.training.batches import Batches, TextEncoder, noise_levels
from sidfast.training.channel import Channel
from sidfast.training.checkpoint import read_state, read_tensors, restore
from sidfast.training.copies import COPIES
from sidfast.training.ema import Ema
from sidfast.training.engines import (
    ENGINES,
    build_engine,
    compute_dtype,
    engine_config,
    loss_scale,
    set_learning_rate,
    zero_stages,
)
from sidfast.training.footprint import count_flops
from sidfast.training.observe import Observer, Profiler
from sidfast.training.preview import Preview
from sidfast.training.run import RunDirectory
from sidfast.training.saver import Saver, last_good
from sidfast.training.speed import decide_speed
from sidfast.training.spikes import Spikes
from sidfast.training.stop import Stop
from sidfast.training.watch import Watch

_LOSSES = ("fake_score_loss", "generator_loss", "non_finite")


@dataclass
class Progress:
    """Where a run stands. `sums` collects the losses since the last log line, on the device."""

    step: int = 0
    images: int = 0
    sums: list = field(default_factory=lambda: [0.0, 0.0, 0.0])
    logged: int = 0                                      # the step of the last log line
    skipped: int = 0                                     # updates left out since then, both networks'
    in_a_row: dict = field(default_factory=lambda: dict.fromkeys(ENGINES, 0))          # the same without a break


@dataclass
class Beside:
    """What accompanies a run: against faults, and to tell of it."""

    stop: Stop
    watch: Watch
    saver: Saver
    spikes: Spikes
    observer: Observer
    profiler: Profiler


def train(config, out, checkpoint, teacher, device, memo=None, profile=0):
    """Run or go on with a run; a collective call of all processes.

    `checkpoint`: the folder to go on from, or None; `teacher`: from `load_teacher`, taken over; `memo`: a dictionary
    shared by runs one after the other, which keeps what they have in common (the teacher's evaluation); `profile`:
    steps to trace. Returns the final evaluation on the first process, or None. Raises UserError for settings that are
    impossible here, RunError if the run cannot go on (Diverged), or its end could not be saved.
    """
    rank, processes = comm.get_rank(), comm.get_world_size()
    dtype, latent_shape = compute_dtype(config.deepspeed), _latent_shape(teacher, config)
    _set_up_device(config, device)
    stop, channel, folder = Stop(), Channel(), f"{out}/checkpoints"
    watch = Watch(channel, config.train.hang_timeout, lambda: last_good(folder))

    # the run so far, and what it starts from
    progress = _resume(read_state(checkpoint)["extra"], rank, processes) if checkpoint else Progress()
    for module in (teacher.unet, teacher.vae, teacher.text_encoder):
        module.to(device)
    stages = zero_stages(config)
    speed = decide_speed(config.speed, teacher, latent_shape, 2 * config.train.micro_batch, stages, dtype, device,
                         cannot_capture(config.synthetic))
    torch.backends.cudnn.benchmark = not speed.fused     # (its search takes half a minute for SD 1.5, of every start)
    if rank == 0 and speed.notes and device.type == "cuda":                      # (on a CPU they go without saying)
        print(f"sidfast: plain PyTorch takes over: {'; '.join(speed.notes)}", file=sys.stderr)
    run = RunDirectory(out, config, progress.step, speed=speed.describe()) if rank == 0 else None
    preview = Preview(config, teacher, run, {} if memo is None else memo) if rank == 0 else None
    with watch.patiently("the teacher's samples and measures"):
        if rank == 0:
            recover_export(f"{out}/export")
            preview.begin(progress.step)                 # while the teacher is in fp32 and memory is free
        comm.barrier()

    # the networks
    flops = count_flops(config, teacher, latent_shape) if rank == 0 else None
    engines, sections = {}, {name: engine_config(config, name, processes) for name in ENGINES}
    for name in ENGINES:
        unet = copy.deepcopy(teacher.unet)
        if checkpoint:
            unet.load_state_dict(read_tensors(checkpoint, name, "weights"))
        engines[name] = build_engine(speed.prepare(unet), getattr(config.optimizer, name), sections[name], device)
    teacher.unet.to(dtype)
    ema = Ema(engines["generator"], config.ema.half_life, config.ema.ramp_up)
    copies, kind = {}, SOURCES[config.synthetic.source].copy
    if kind:
        unet = speed.prepare(copy.deepcopy(teacher.unet))
        copies[kind] = COPIES[kind](unet, engines["generator"], ema, config.synthetic)
    speed.prepare(teacher.unet)
    networks = Networks(**engines, teacher=teacher.unet)
    if checkpoint:
        restore(checkpoint, engines, ema)
        for one in copies.values():
            one.restore(progress.step, lambda kind: read_tensors(checkpoint, "generator", kind))
    for unet in (*(e.module.unet for e in engines.values()), teacher.unet, *(one.unet for one in copies.values())):
        speed.repack(unet)

    # the data, and what is optimised
    g, schedule = config.guidance, teacher.schedule.to(device)
    objective = Objective(schedule, teacher.prediction_type, g.kappa1, g.kappa2, g.kappa3, g.kappa4, config.loss.alpha,
                          config.noise.t_init)
    source = build_source(config.synthetic, networks, objective, {kind: one.unet for kind, one in copies.items()},
                          teacher.sampler, speed.share_generator_forward)
    dropout = g.prompt_dropout if drops_prompts(g.kappa1, g.kappa2, g.kappa3) else 0.0
    capture = Graphs().capture if speed.cuda_graphs else None                    # one memory for all graphs
    batches = Batches(training_prompts(config.data.prompts, config.train.seed, config.synthetic),
                      TextEncoder(teacher.tokenizer, teacher.text_encoder, dtype, capture),
                      noise_levels(schedule, config.noise), latent_shape, config.train, dropout, config.synthetic,
                      source.noises, device, rank, processes, speed.share_generator_forward)

    updates = _updates(networks, objective, source, capture, 3 in stages, speed.share_generator_forward)
    if speed.cuda_graphs:
        for name, update in updates.items():             # (all of them before the first capture takes memory for good)
            update.warm_up(batches(progress.step, name)[0])
    beside = Beside(
        stop, watch, Saver(folder, config.train.keep, channel, config.train.hang_timeout, _warn, checkpoint),
        Spikes(config.train.spike, batches),
        Observer(engines, teacher.text_encoder, device, dtype, config.train.batch_size, processes, flops,
                 config.speed.tf32),
        Profiler(profile, f"{out}/profile", device, rank))
    stopped = _loop(config, engines, ema, copies.values(), batches, updates, progress, run, preview, out, speed, beside)
    beside.profiler.close()

    # the end
    result = None
    with watch.patiently("the end: writing the last checkpoint, measures"):
        fault = beside.saver.wait()
        if not stopped:
            student = _student(ema, preview)
            if rank == 0:
                result = preview.evaluate("end", student, progress.step, again=True)
        if rank == 0:
            run.close()
            with run.attempt("the report"):
                preview.finish()
        comm.barrier()
    watch.close()
    stop.close()
    comm.barrier()                                       # the store lives in the first process: it leaves last
    return _conclude(out, progress, stopped, fault, run, result)


def _conclude(out, progress, stopped, fault, run, result):
    """Say how the run ended. Raises RunError if not all of it is on disk."""
    good, again = last_good(f"{out}/checkpoints"), "the same command goes on from there"
    if fault:
        raise RunError(f"step {progress.step} is not saved: {fault}. The last good checkpoint is {good}; {again}")
    if stopped:
        _warn(f"stopped by {stopped} after step {progress.step}; the last checkpoint is {good}, {again}")
    elif run is not None and run.lost:
        _warn(f"not everything could be written: {', '.join(run.lost)}")
    return result


def _warn(message):
    """A line on standard error, from the first process."""
    if comm.get_rank() == 0:
        print(f"sidfast: {message}", file=sys.stderr, flush=True)


def _updates(networks, objective, source, capture, sharded, shared):
    """{network: its Update}, in the order they take turns (method.md, sections 4 and 5)."""
    options = {"sums": GradientSums(), "scale": loss_scale, "capture": capture}
    if sharded:
        options["agree"] = _all_agree
    updates = {"fake_score": fake_score_update(networks, objective, source, **options),
               "generator": generator_update(networks, objective, **options)}
    return dict(reversed(updates.items())) if shared else updates


def _with_images(batches, images):
    """Micro-batches of the fake score's update on images that are there already (method/synthetic.py, Shared)."""
    images = torch.cat(images).split(len(batches[0].t))  # (the generator's micro-batches may be smaller)
    return [b._replace(noise=torch.cat((x[:, None], b.noise[:, 1:]), 1)) for b, x in zip(batches, images, strict=True)]


def _all_agree(flag):
    """Whether a flag (a tensor) holds on every process."""
    flag = flag.to(torch.int32)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
    return bool(flag)


def _loop(config, engines, ema, copies, batches, updates, progress, run, preview, out, speed, beside):
    """Fake score and generator take turns; between steps come logs, sample grids, evaluations and checkpoints.

    Returns the name of the signal that ended the run early, or None.
    """
    train, total, rank = config.train, config.train.total_steps, comm.get_rank()
    bar = tqdm(total=total * train.batch_size, initial=progress.images, unit="img", unit_scale=True, desc="distil",
               disable=rank != 0, mininterval=1, smoothing=0.1)
    clock, timed, stopped = time.perf_counter(), progress.step, None
    watch, phase = beside.watch, beside.observer.clock
    while progress.step < total and not stopped:
        for name in ENGINES:
            set_learning_rate(engines[name], getattr(config.optimizer, name), progress.step, total)
        for one in copies:
            one.follow(progress.step)
            speed.repack(one.unet)
        sums = {}
        for name, update in updates.items():
            watch.at(f"step {progress.step + 1}, data of the {name} update")
            with phase("data"):
                batch = batches(progress.step, name)
                if speed.share_generator_forward and name == "fake_score":
                    batch = _with_images(batch, sums["generator"].images)
            watch.at(f"step {progress.step + 1}, {name} update")
            before = engines[name].skipped_steps
            with phase(name):
                sums[name] = update(batch)
                speed.repack(engines[name].module.unet)
            _count_skipped(progress, name, engines[name].skipped_steps - before, train.max_skipped, beside.saver)
        fake, gen = sums["fake_score"], sums["generator"]
        watch.at(f"step {progress.step + 1}, average")
        beside.spikes.add(progress.step, {name: (s.losses, s.t) for name, s in sums.items()})
        progress.step += 1
        progress.images += train.batch_size
        with phase("average"):
            ema.update(train.batch_size, progress.images)
        news = (fake.loss, gen.loss, fake.non_finite + gen.non_finite)
        progress.sums = [old + new for old, new in zip(progress.sums, news, strict=True)]
        bar.update(train.batch_size)

        if progress.step % train.log_every == 0 or progress.step == total:
            watch.at(f"step {progress.step}, log")
            values, spikes = _reduce(progress, train.batch_size), beside.spikes.take()
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            values |= beside.observer.read(progress.step - timed, seconds)
            timed = progress.step
            if rank == 0:
                run.spikes(spikes)
                run.log(progress.step, values | {"images": progress.images})
                bar.set_postfix(fake=f"{values['fake_score_loss']:.4g}", gen=f"{values['generator_loss']:.4g}",
                                refresh=False)
        last, stopped = progress.step == total, beside.stop.agreed()
        stopped = None if last else stopped
        sampling = train.samples and (progress.step % train.sample_every == 0 or last)
        saving = train.save_every and (progress.step % train.save_every == 0 or last)
        measuring = config.evaluation.every and progress.step % config.evaluation.every == 0 and not last
        if saving or (stopped and train.save_every):
            watch.at(f"step {progress.step}, checkpoint")
            with phase("checkpoint"):
                _save(engines, ema, copies, progress, beside.saver)
        if sampling or saving or measuring:
            with watch.patiently(f"step {progress.step}, samples, measures and export"):
                student = _student(ema, preview)
                if sampling and rank == 0:
                    with phase("sampling"):
                        preview.sample(progress.step, student)
                if measuring and rank == 0:
                    with phase("evaluation"):
                        preview.evaluate(f"step {progress.step}", student, progress.step, again=True)
                if saving and rank == 0:
                    with phase("checkpoint"), run.attempt("the export"):
                        preview.export(student, f"{out}/export", progress.step)
                comm.barrier()
            clock, timed = time.perf_counter(), progress.step                    # speed is that of training alone
        beside.profiler.step()
    bar.close()
    return stopped


def _count_skipped(progress, name, skipped, most, saver):
    """Count an update that its optimizer left out. Raises RunError after too many of them in a row."""
    progress.skipped += skipped
    progress.in_a_row[name] = progress.in_a_row[name] + 1 if skipped else 0
    if progress.in_a_row[name] >= most:
        saver.wait()
        raise Diverged(f"the last {most} updates of the {name} had a gradient that is not finite and were left out: "
                       f"the run has diverged at step {progress.step + 1}. The last good checkpoint is "
                       f"{last_good(saver.folder)}; go on from it with lower learning rates (--resume PATH)")


def _student(ema, preview):
    """The averaged generator as a UNet on the first process, None on the others; a collective call."""
    weights = ema.gather(lambda name: preview is not None)
    return None if preview is None else preview.student(weights)


def _save(engines, ema, copies, progress, saver):
    """Begin to save a checkpoint."""
    sums = [None] * comm.get_world_size()
    torch.distributed.all_gather_object(sums, [float(v) for v in progress.sums])
    extra = {"step": progress.step, "images": progress.images, "logged": progress.logged, "sums": sums,
             "skipped": progress.skipped, "in_a_row": progress.in_a_row}
    further = {kind: tensors for one in copies for kind, tensors in one.state().items()}
    saver.save(progress.step, engines, ema, extra, {"generator": further})


def _resume(extra, rank, processes):
    """The Progress that a checkpoint holds; sums of another number of processes are dealt out evenly."""
    sums = extra["sums"]
    if len(sums) != processes:
        mean, total = [sum(c) / len(sums) for c in zip(*sums, strict=True)], sum(row[2] for row in sums)
        sums = [[mean[0], mean[1], total / processes]] * processes
    return Progress(extra["step"], extra["images"], sums[rank], extra["logged"], extra["skipped"],
                    dict(extra["in_a_row"]))


def _reduce(progress, batch_size):
    """Means over the steps since the last log line and over processes; resets the sums.

    Raises Diverged if not a single sample in that time was finite.
    """
    device = next(v.device for v in progress.sums if torch.is_tensor(v))
    sums = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in progress.sums])
    comm.all_reduce(sums)
    steps, processes = progress.step - progress.logged, comm.get_world_size()
    fake, gen, non_finite = sums.tolist()
    skipped = progress.skipped
    progress.sums, progress.logged, progress.skipped = [0.0, 0.0, 0.0], progress.step, 0
    if non_finite >= 2 * batch_size * steps:
        raise Diverged(f"every sample of the last {steps} steps was non-finite: the run has diverged at step "
                       f"{progress.step}. Go on from a checkpoint with lower learning rates")
    losses = dict(zip(_LOSSES, (fake / steps / processes, gen / steps / processes, non_finite), strict=True))
    return losses | {"skipped_updates": skipped}


def _latent_shape(teacher, config):
    side = (config.model.resolution or teacher.resolution) // teacher.latent_factor
    return teacher.unet.config.in_channels, side, side


def _set_up_device(config, device):
    if device.type == "cuda":
        allow_tf32(config.speed.tf32)
