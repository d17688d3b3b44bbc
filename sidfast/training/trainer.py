"""A training run, from configuration to export."""

import copy
import sys

import torch
from deepspeed import comm

from sidfast.accel.graphs import Graphs, concurrent
from sidfast.accel.plan import largest_pass, resolve_acceleration
from sidfast.accel.precision import allow_tf32
from sidfast.checkpoints.format import read_state
from sidfast.checkpoints.saver import Saver, last_good
from sidfast.checkpoints.store import read_tensors, restore
from sidfast.common.channel import Channel
from sidfast.common.errors import RunError
from sidfast.engines.accumulate import GradientBuffers
from sidfast.engines.ema import Ema
from sidfast.engines.engine import (
    ENGINES,
    build_engine,
    compute_dtype,
    engine_config,
    loss_scale,
    shard,
    zero_stages,
)
from sidfast.engines.lagged import COPIES
from sidfast.engines.update import Networks, fake_score_update, generator_update
from sidfast.method.equations import drops_prompts
from sidfast.method.synthetic import SOURCES, build_source, capture_blocker
from sidfast.method.updates import Objective, sequential
from sidfast.monitoring.observe import Monitor, Profiler
from sidfast.monitoring.shutdown import FAULT
from sidfast.monitoring.spikes import Spikes
from sidfast.monitoring.watchdog import Watchdog
from sidfast.planning.footprint import count_flops
from sidfast.publishing.export import recover_export
from sidfast.runs.directory import RunDirectory, lacks_checkpoints
from sidfast.runs.identity import describe_run
from sidfast.runs.preview import Preview
from sidfast.teachers.fit import noise_levels
from sidfast.training.batches import Batches, TextEncoder
from sidfast.training.loop import Loop, Services
from sidfast.training.progress import Progress


def train(plan, device, stop, profile=0):
    """Run or go on with a run; a collective call of all processes.

    `plan`: a Plan on which they have agreed (preflight.py), whose teacher is taken over; `stop`: a Stop of this run;
    `profile`: steps to trace. Returns the final evaluation on the first process, or None. Raises UserError for settings
    that are impossible here, RunError if the run cannot go on (Diverged), or its end could not be saved.
    """
    rank, processes = comm.get_rank(), comm.get_world_size()
    config, out, checkpoint, teacher, inputs = plan.config, plan.out, plan.checkpoint, plan.teacher, plan.inputs
    dtype, latent_shape = compute_dtype(config.deepspeed), teacher.latent_shape(config.model.resolution)
    _set_up_device(config, device)
    channel, folder = Channel(), f"{out}/checkpoints"
    watch = Watchdog(channel, config.train.hang_timeout, lambda: last_good(folder))

    # the run so far, and what it starts from
    progress = Progress.resume(read_state(checkpoint)["extra"], rank, processes) if checkpoint else Progress()
    for module in teacher.networks.values():
        module.to(device)
    stages = zero_stages(config)
    speed = resolve_acceleration(config.speed, teacher, latent_shape, largest_pass(config, config.train.micro_batch),
                                 stages, dtype, device, capture_blocker(config.synthetic))
    torch.backends.cudnn.benchmark = not speed.fused     # (its search takes half a minute for SD 1.5, of every start)
    if rank == 0 and speed.notes:
        print(f"sidfast: plain PyTorch takes over: {'; '.join(speed.notes)}", file=sys.stderr)
    run = RunDirectory(out, config, progress.step, speed=speed.describe(), inputs=inputs,
                       imports=plan.imports) if rank == 0 else None
    preview = Preview(config, teacher, run, plan.memo) if rank == 0 else None
    with watch.paused("the teacher's samples and measures"):
        if rank == 0:
            recover_export(f"{out}/export")
            preview.begin(progress.step)                 # while the teacher is in fp32 and memory is free
        comm.barrier()

    # the networks
    flops = count_flops(config, teacher, latent_shape) if rank == 0 else None
    engines, sections = {}, {name: engine_config(config, name, processes) for name in ENGINES}
    for name in ENGINES:
        unet = copy.deepcopy(teacher.network)
        if checkpoint:
            unet.load_state_dict(read_tensors(checkpoint, name, "weights"))
        engines[name] = build_engine(speed.prepare(unet), getattr(config.optimizer, name), sections[name], device)
    teacher.network.to(dtype)
    ema = Ema(engines["generator"], config.ema.half_life, config.ema.ramp_up)
    copies, kind = {}, SOURCES[config.synthetic.source].copy
    if kind:
        unet = speed.prepare(copy.deepcopy(teacher.network))
        copies[kind] = COPIES[kind](unet, engines["generator"], ema, config.synthetic)
    speed.prepare(teacher.network)
    if 3 in stages:
        shard(teacher.network, sections[ENGINES[stages.index(3)]])
    networks = Networks(**engines, teacher=teacher.network)
    if checkpoint:
        restore(checkpoint, engines, ema)
        for one in copies.values():
            one.restore(progress.step, lambda kind: read_tensors(checkpoint, "generator", kind))
    trained = [e.module.network for e in engines.values()]
    for network in (*trained, teacher.network, *(one.network for one in copies.values())):
        speed.refresh(network)

    # the data, and what is optimised
    g, schedule = config.guidance, teacher.schedule.to(device)
    objective = Objective(schedule, teacher.family.predict, g.kappa1, g.kappa2, g.kappa3, g.kappa4, config.loss.alpha,
                          config.noise.t_init)
    source = build_source(config.synthetic, engines["generator"].module.denoiser, teacher.network, objective,
                          {kind: one.network for kind, one in copies.items()}, teacher.sampler,
                          speed.share_generator_forward)
    dropout = g.prompt_dropout if drops_prompts(g.kappa1, g.kappa2, g.kappa3) else 0.0
    capture = Graphs().capture if speed.cuda_graphs else None                    # one memory for all graphs
    batches = Batches(plan.prompts, TextEncoder(teacher, dtype, capture, teacher.image_size(config.model.resolution)),
                      noise_levels(schedule, config.noise), latent_shape, config.train, dropout, config.synthetic,
                      source.num_extra_noise, device, rank, processes, speed.share_generator_forward)

    updates = _updates(networks, objective, source, capture, 3 in stages, speed)
    if speed.cuda_graphs:
        for name, update in updates.items():             # (all of them before the first capture takes memory for good)
            update.warm_up(batches(progress.step, name)[0])
    services = Services(
        stop, watch, Saver(folder, config.train.keep, channel, config.train.hang_timeout, _warn, checkpoint,
                           describe_run(config, inputs) if rank == 0 else None),
        Spikes(config.train.spike, batches),
        Monitor(engines, teacher.text_encoders, device, dtype, config.train.batch_size, processes, flops,
                 config.speed.tf32),
        Profiler(profile, f"{out}/profile", device, run))
    stopped = Loop(config, engines, ema, copies.values(), batches, updates, progress, run, preview, out, speed,
                   services)()
    services.profiler.close()

    # the end
    result = None
    with watch.paused("the end: writing the last checkpoint, measures"):
        fault = services.saver.wait()
        if not stopped:
            weights = ema.gather(lambda name: rank == 0)
            if rank == 0:
                if config.train.save_every:
                    preview.end(weights, f"{out}/export", progress.step)
                result = preview.evaluate("end", preview.student(weights), progress.step, again=True)
        if rank == 0:
            preview.wait()
            run.close()
            preview.finish()
        comm.barrier()
    watch.close()
    stop.finish()
    comm.barrier()                                       # the store lives in the first process: it leaves last
    cause = stopped == FAULT and (batches.fault() or f"data.prompts: {config.data.prompts} has changed for a process")
    return _conclude(out, progress, stopped, fault, run, result, cause)


def _conclude(out, progress, stopped, fault, run, result, cause):
    """Say how the run ended. Raises RunError if not all of it is on disk."""
    good = last_good(f"{out}/checkpoints")
    again = "the same command goes on from there"
    if good == "none":
        again = "begin anew with another --out" if lacks_checkpoints(out) else "the same command begins anew"
    if fault:
        raise RunError(f"step {progress.step} is not saved: {fault}. The last good checkpoint is {good}; {again}")
    if cause:
        raise RunError(f"{cause}; the run stopped after step {progress.step}. Put the file back; the last checkpoint "
                       f"is {good}, {again}")
    if stopped:
        _warn(f"stopped by {stopped} after step {progress.step}; the last checkpoint is {good}, {again}")
    elif run is not None and run.lost:
        _warn(f"not everything could be written: {', '.join(run.lost)}")
    return result


def _warn(message):
    """A line on standard error, from the first process."""
    if comm.get_rank() == 0:
        print(f"sidfast: {message}", file=sys.stderr, flush=True)


def _updates(networks, objective, source, capture, sharded, speed):
    """{network: its Update}, in the order they take turns (method.md, sections 4 and 5)."""
    options = {"sums": GradientBuffers(), "scale": loss_scale, "capture": capture}
    if sharded:
        options["agree"] = _all_agree
    run = concurrent if speed.overlap else sequential
    updates = {"fake_score": fake_score_update(networks, objective, source, **options),
               "generator": generator_update(networks, objective, run, **options)}
    return dict(reversed(updates.items())) if speed.share_generator_forward else updates


def _all_agree(flag):
    """Whether a flag (a tensor) holds on every process."""
    flag = flag.to(torch.int32)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
    return bool(flag)


def _set_up_device(config, device):
    if device.type == "cuda":
        allow_tf32(config.speed.tf32)
