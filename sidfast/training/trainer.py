"""A training run, from configuration to export."""

import copy
import sys

import torch
from deepspeed import comm

from sidfast.accel.graphs import Graphs, concurrent
from sidfast.accel.plan import largest_pass, resolve_acceleration
from sidfast.accel.precision import allow_tf32
from sidfast.averages.ema import Ema
from sidfast.averages.lagged import COPIES
from sidfast.checkpoints.format import read_state
from sidfast.checkpoints.saver import Saver, last_good
from sidfast.checkpoints.store import read_tensors, restore
from sidfast.common.channel import Channel
from sidfast.common.errors import RunError
from sidfast.engines.accumulate import GradientBuffers
from sidfast.engines.engine import (
    ENGINES,
    build_engine,
    compute_dtype,
    engine_config,
    loss_scale,
    shard,
    zero_stages,
)
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
from sidfast.training.loop import Loop, Services, State
from sidfast.training.progress import Progress


def train(plan, device, stop, profile=0):
    """Run or go on with a run; a collective call of all processes.

    `plan`: a Plan on which they have agreed (preflight.py), whose teacher is taken over; `stop`: a Stop of this run;
    `profile`: steps to trace. Returns the final evaluation on the first process, or None. Raises UserError for settings
    that are impossible here, RunError if the run cannot go on (Diverged), or its end could not be saved.
    """
    config, teacher = plan.config, plan.teacher
    channel = Channel()
    watch = Watchdog(channel, config.train.hang_timeout, lambda: last_good(_checkpoints(plan)))
    progress = Progress.resume(read_state(plan.checkpoint)["extra"], comm.get_rank(),
                               comm.get_world_size()) if plan.checkpoint else Progress()
    speed = _accelerate(plan, device)
    run, preview = _open_outputs(plan, speed, progress.step, watch)
    flops = count_flops(config, teacher, teacher.latent_shape(config.model.resolution)) if run else None
    state = _build(plan, speed, progress, device)
    services = Services(
        stop, watch, Saver(_checkpoints(plan), config.train.keep, channel, config.train.hang_timeout, _warn,
                           plan.checkpoint, describe_run(config, plan.inputs) if run else None),
        Spikes(config.train.spike, state.batches),
        Monitor(state.engines, teacher.text_encoders, device, compute_dtype(config.deepspeed), config.train.batch_size,
                comm.get_world_size(), flops, config.speed.tf32),
        Profiler(profile, f"{plan.out}/profile", device, run), run, preview)
    stopped = Loop(plan, state, services)()
    return _end(plan, state, services, stopped)


def _checkpoints(plan):
    return f"{plan.out}/checkpoints"


def _accelerate(plan, device):
    """The Speed of a run, whose teacher is moved to the device."""
    config, teacher = plan.config, plan.teacher
    if device.type == "cuda":
        allow_tf32(config.speed.tf32)
    for module in teacher.networks.values():
        module.to(device)
    speed = resolve_acceleration(
        config.speed, teacher, teacher.latent_shape(config.model.resolution),
        largest_pass(config, config.train.micro_batch), zero_stages(config), compute_dtype(config.deepspeed), device,
        capture_blocker(config.synthetic))
    torch.backends.cudnn.benchmark = not speed.fused     # (its search takes half a minute for SD 1.5, of every start)
    if comm.get_rank() == 0 and speed.notes:
        print(f"sidfast: plain PyTorch takes over: {'; '.join(speed.notes)}", file=sys.stderr)
    return speed


def _open_outputs(plan, speed, step, watch):
    """(RunDirectory, Preview) of the first process, with everything that shows the teacher made: it is in fp32 and
    memory is free. (None, None) of the others, which wait."""
    run = preview = None
    if comm.get_rank() == 0:
        run = RunDirectory(plan.out, plan.config, step, speed=speed.describe(), inputs=plan.inputs,
                           imports=plan.imports)
        preview = Preview(plan.config, plan.teacher, run, plan.memo)
    with watch.paused("the teacher's samples and measures"):
        if run:
            recover_export(f"{plan.out}/export")
            preview.begin(step)
        comm.barrier()
    return run, preview


def _build(plan, speed, progress, device):
    """The State of a run: its networks, its data, and the updates."""
    config, teacher = plan.config, plan.teacher
    engines, ema, copies = _build_networks(plan, speed, progress.step, device)
    networks, sharded = Networks(**engines, teacher=teacher.network), 3 in zero_stages(config)
    g, schedule = config.guidance, teacher.schedule.to(device)
    objective = Objective(schedule, teacher.family.predict, g.kappa1, g.kappa2, g.kappa3, g.kappa4, config.loss.alpha,
                          config.noise.t_init)
    source = build_source(config.synthetic, engines["generator"].module.denoiser, teacher.network, objective,
                          {kind: one.network for kind, one in copies.items()}, teacher.sampler,
                          speed.share_generator_forward)
    dropout = g.prompt_dropout if drops_prompts(g.kappa1, g.kappa2, g.kappa3) else 0.0
    capture = Graphs().capture if speed.cuda_graphs else None                    # one memory for all graphs
    size, shape = teacher.image_size(config.model.resolution), teacher.latent_shape(config.model.resolution)
    batches = Batches(plan.prompts, TextEncoder(teacher, compute_dtype(config.deepspeed), capture, size),
                      noise_levels(schedule, config.noise), shape, config.train, dropout, config.synthetic,
                      source.num_extra_noise, device, comm.get_rank(), comm.get_world_size(),
                      speed.share_generator_forward)
    updates = _updates(networks, objective, source, capture, sharded, speed)
    if speed.cuda_graphs:
        for name, update in updates.items():             # (all of them before the first capture takes memory for good)
            update.warm_up(batches(progress.step, name)[0])
    return State(engines, ema, list(copies.values()), speed, batches, updates, progress)


def _build_networks(plan, speed, step, device):
    """(Engines, average, {kind: copy of the generator}) of a run at `step`; the teacher is made ready, too."""
    config, teacher, checkpoint, stages = plan.config, plan.teacher, plan.checkpoint, zero_stages(plan.config)
    engines, sections = {}, {name: engine_config(config, name, comm.get_world_size()) for name in ENGINES}
    for name in ENGINES:
        network = copy.deepcopy(teacher.network)
        if checkpoint:
            network.load_state_dict(read_tensors(checkpoint, name, "weights"))
        engines[name] = build_engine(speed.prepare(network), getattr(config.optimizer, name), sections[name], device)
    teacher.network.to(compute_dtype(config.deepspeed))
    ema = Ema(engines["generator"], config.ema.half_life, config.ema.ramp_up)
    copies, kind = {}, SOURCES[config.synthetic.source].copy
    if kind:
        network = speed.prepare(copy.deepcopy(teacher.network))
        copies[kind] = COPIES[kind](network, engines["generator"], ema, config.synthetic)
    speed.prepare(teacher.network)
    if 3 in stages:
        shard(teacher.network, sections[ENGINES[stages.index(3)]])
    if checkpoint:
        restore(checkpoint, engines, ema)
        for one in copies.values():
            one.restore(step, lambda kind: read_tensors(checkpoint, "generator", kind))
    trained = [e.module.network for e in engines.values()]
    for network in (*trained, teacher.network, *(one.network for one in copies.values())):
        speed.refresh(network)
    return engines, ema, copies


def _end(plan, state, services, stopped):
    """What belongs to the end of a run: what is being written, export, measures, report. Returns the final evaluation
    on the first process, or None. Raises RunError as `_conclude` does."""
    step, run, preview, result = state.progress.step, services.run, services.preview, None
    services.profiler.close()
    services.stop.ending = True
    with services.watch.paused("the end: writing the last checkpoint, measures"):
        fault = services.saver.wait()
        if not stopped:
            weights = state.ema.gather(lambda name: run is not None)
            if run:
                if plan.config.train.saves:
                    preview.end(weights, f"{plan.out}/export", step)
                result = preview.evaluate("end", preview.student(weights), step, again=True)
        if run:
            preview.wait()
            run.close()
            preview.finish()
        comm.barrier()
    services.watch.close()
    services.stop.finish()
    comm.barrier()                                       # the store lives in the first process: it leaves last
    cause = stopped == FAULT and (
        state.batches.fault() or f"data.prompts: {plan.config.data.prompts} has changed for a process")
    return _conclude(plan.out, step, stopped, fault, run, result, cause)


def _conclude(out, step, stopped, fault, run, result, cause):
    """Say how the run ended. Raises RunError if not all of it is on disk."""
    good = last_good(f"{out}/checkpoints")
    again = "the same command goes on from there"
    if good == "none":
        again = "begin anew with another --out" if lacks_checkpoints(out) else "the same command begins anew"
    if fault:
        raise RunError(f"step {step} is not saved: {fault}. The last good checkpoint is {good}; {again}")
    if cause:
        raise RunError(f"{cause}; the run stopped after step {step}. Put the file back; the last checkpoint "
                       f"is {good}, {again}")
    if stopped:
        _warn(f"stopped by {stopped} after step {step}; the last checkpoint is {good}, {again}")
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
