"""Train: `deepspeed sidfast/train.py --config configs/ddpm.json [--out RUN] [--set section.key=value ...]`.

Runs on a machine without a GPU, on one GPU, and on many; the same command again goes on where the run stopped.
"""

import argparse
import os
import re
import sys
from datetime import timedelta
from pathlib import Path

sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent.resolve()]
# (this folder's modules must not shadow libraries of the same name)


def main(argv=None):
    """Parse, build, loop. Returns the exit code: 0 done or stopped in order, 1 the run failed, 2 the user's input is at
    fault (one line on stderr)."""
    from sidfast.common.environment import check_environment, prepare_environment, use_utf8

    if argv is None:
        use_utf8()
    prepare_environment()
    from sidfast.common.errors import INTERRUPTED, RunError, UserError, one_line, tell, unfailing_streams

    with unfailing_streams():
        try:
            check_environment(training=True)
            run(_parser().parse_args(argv))
        except (UserError, RunError) as error:
            tell(one_line(error))
            return 2 if isinstance(error, UserError) else 1
        except KeyboardInterrupt:
            tell("interrupted; the same command goes on from the last checkpoint")
            return INTERRUPTED
    return 0


def run(args):
    """Check what can be checked without the run directory, then claim that and train in it."""
    from sidfast.common.errors import UserError, check_paths, one_line, say, tell
    from sidfast.config.schema import load_config

    check_paths({"--config": args.config, "--out": args.out, "--resume": args.resume})
    if re.search("[\ud800-\udfff]", args.out or ""):     # how Python reads bytes that it cannot decode
        raise UserError(f"--out {args.out}: has characters that this locale lacks, which TensorBoard refuses; choose "
                        "another name, or set LC_ALL=C.UTF-8")
    config = load_config(args.config, args.set)
    if args.profile < 0:
        raise UserError(f"--profile {args.profile}: must be a number of steps")
    check_paths({"model.teacher": config.model.teacher, "data.prompts": config.data.prompts,
                 "evaluation.assets": config.evaluation.assets})
    if args.dry_run:
        say(config.model_dump_json(indent=2))
        return
    from sidfast.data.diversity import training_prompts

    first, processes = int(os.environ.get("RANK", 0)) == 0, int(os.environ.get("WORLD_SIZE", 1))
    out = Path(args.out or Path("runs") / Path(args.config).stem)
    prompts = training_prompts(config.data.prompts, config.train.seed, config.synthetic, config.data.prompts_column,
                               lambda note: tell(one_line(note)))

    import torch

    if not torch.cuda.is_available():                    # said once, in the run's config.json, not by each library
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from sidfast.engines.engine import compute_dtype, engine_config
    from sidfast.runs.lock import claimed

    engine_config(config, "generator", processes)
    compute_dtype(config.deepspeed)
    with claimed(out, first):
        teacher, inputs = _check(config, out, args, first, prompts)
        del prompts                                      # (those of a table are in memory)
        device = join()
        result = _train(config, out, args, teacher, inputs, device)
        if first:
            _report(out, result)


def _check(config, out, args, first, prompts):
    """(The teacher, fingerprints of the inputs), once everything is checked that needs no other process; nothing is
    written yet."""
    import torch

    from sidfast.accel.plan import check_speed
    from sidfast.engines.engine import zero_stages
    from sidfast.method.synthetic import capture_blocker
    from sidfast.runs.directory import open_run
    from sidfast.runs.evaluate import check_measures
    from sidfast.runs.identity import check_inputs, describe_inputs
    from sidfast.teachers.fit import check_teacher_fits
    from sidfast.teachers.load import load_teacher

    open_run(out, config, args.resume)
    teacher = load_teacher(config.model.teacher, **config.model.loading)
    inputs = describe_inputs(config, teacher)
    check_inputs(out, inputs)
    check_teacher_fits(config, teacher, args.config)
    check_speed(config.speed, teacher, zero_stages(config),
                torch.device("cuda" if torch.cuda.is_available() else "cpu"), capture_blocker(config.synthetic))
    if first:
        check_measures(config, teacher)
        _tell_cut(prompts, teacher)
    return teacher, inputs


def _train(config, out, args, teacher, inputs, device):
    """Start the run or go on with it, with all processes. Returns the final measures on the first one, or None."""
    from deepspeed import comm

    from sidfast.checkpoints.format import read_state
    from sidfast.checkpoints.store import check_fits, choose_checkpoint
    from sidfast.common.errors import tell
    from sidfast.engines.engine import ENGINES, engine_section, offloads
    from sidfast.engines.validate import check_sections, validate_deepspeed
    from sidfast.monitoring.shutdown import Stop
    from sidfast.planning.fit import find_micro_batch
    from sidfast.runs.identity import check_origin
    from sidfast.training.trainer import train

    processes = comm.get_world_size()
    check_sections(config, processes)
    if any(offloads(engine_section(config, name)) for name in ENGINES):
        tell("loading DeepSpeed's Adam for the CPU; the first time it is compiled. (If this does not end: remove the "
             "file `lock` that a compilation that was killed has left in ~/.cache/torch_extensions/*/cpu_adam)")
    validate_deepspeed(config, processes, device)
    config = find_micro_batch(config, teacher, processes, device)
    checkpoint = choose_checkpoint(out, args.resume, tell)
    if checkpoint:
        check_fits(checkpoint, teacher.network, config.optimizer)
        if checkpoint.parent == out / "checkpoints":      # (--resume may name one of any other run)
            check_origin(checkpoint, config, inputs, f"--out {out}: ")
    tell(f"{'resuming from ' + str(checkpoint) if checkpoint else 'starting'}, run directory {out}")
    step, steps = read_state(checkpoint)["extra"]["step"] if checkpoint else 0, config.train.total_steps
    if step >= steps:
        tell(f"the run is already at step {step} of {steps}: nothing is left to train")
    stop = Stop()
    result = train(config, out, checkpoint, teacher, device, stop, profile=args.profile)
    stop.ignore()
    comm.destroy_process_group()
    return result


def _tell_cut(prompts, teacher):
    """A line if the text encoder does not take all of the prompts, of which it looks at some."""
    from sidfast.common.errors import tell
    from sidfast.data.diversity import some_prompts
    from sidfast.data.lengths import LOOKED_AT, cut_note

    limit, (some, total) = teacher.prompt_limit(), some_prompts(prompts, LOOKED_AT)
    note = limit and cut_note(limit[0], some, limit[1], total)
    if note:
        tell(f"data.prompts: {note}")


def join():
    """Join the other processes (or be the only one); returns this process's device. Raises UserError if another program
    has the port."""
    import deepspeed
    import torch

    from sidfast.common.errors import UserError

    alone = os.environ.setdefault("WORLD_SIZE", "1") == "1"
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": "0" if alone else "29500"}.items():       # 0: any that is free
        os.environ.setdefault(name, value)
    gpu = torch.cuda.is_available()
    if not gpu:                                          # DeepSpeed's own collectives need a compiler; gloo needs none
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(_cpu_threads())
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    try:
        _meet("nccl" if gpu else "gloo", device)
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(f"port {os.environ['MASTER_PORT']} is taken on this machine, perhaps by another run: choose "
                        "another, as `deepspeed --master_port PORT` or MASTER_PORT=PORT") from None
    return device


def _meet(backend, device):
    """Wait for the others, then let collective calls take as long as they need: processes wait in one while the first
    measures, and one that hangs is Watchdog's to find, which can name it."""
    import deepspeed
    import torch
    from torch.distributed import distributed_c10d

    others, needed = timedelta(minutes=30), timedelta(days=30)
    # (DeepSpeed makes groups of its own, which take the defaults)
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = needed
    if not torch.distributed.is_initialized():           # (a process may have trained before)
        store, rank, processes = next(torch.distributed.rendezvous("env://", timeout=others))
        bound = {"device_id": device} if device.type == "cuda" and processes > 1 else {}     # (as DeepSpeed has it)
        torch.distributed.init_process_group(backend, timeout=needed, store=store, rank=rank, world_size=processes,
                                             **bound)
    deepspeed.init_distributed(backend, verbose=False, timeout=needed)


def _cpu_threads():
    """Threads of this process: OMP_NUM_THREADS, or its share of the cores (DeepSpeed's launcher sets LOCAL_SIZE,
    torchrun LOCAL_WORLD_SIZE). More of them than cores wait for each other for ever."""
    from sidfast.common.environment import omp_threads

    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return omp_threads() or max(1, os.cpu_count() // local)


def _report(out, end):
    """Where things are, after the measures before and after (if there are any), on standard output."""
    from sidfast.common.errors import say
    from sidfast.evaluation.metrics import title

    if end:
        start = _measured_at_start(out)
        say(f"\n{end['images']} images, one step{'':<14}start      end")
        for key, value in end.items():
            if isinstance(value, float) and not key.startswith("accuracy_"):
                before = start.get(key)
                say(f"{title(key):<34}{'' if before is None else f'{before:.4f}':>9}{value:>9.4f}")
    folders = [f"{name}: {out / name}" for name in ("export", "samples") if (out / name).is_dir()]
    say("\n" + "   ".join([*folders, f"report: {out / 'report.html'}"]))


def _measured_at_start(out):
    from sidfast.common.errors import UserError, one_line, tell
    from sidfast.common.records import read_evaluations

    try:
        return read_evaluations(out).get("start", {})    # (a full disk may have left it out)
    except UserError as error:
        tell(one_line(error))
        return {}


def _parser():
    from sidfast.common.errors import Parser

    parser = Parser(prog="sidfast/train.py", description="Distil a one-step generator (SiD-LSG).")
    parser.add_argument("--config", required=True, metavar="FILE", help="JSON, see configs/")
    parser.add_argument("--out", metavar="RUN", help="run directory (runs/NAME of the configuration)")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="override a key")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH",
                        help="auto: go on where the run stopped; PATH: start from a checkpoint of any run")
    parser.add_argument("--profile", type=int, default=0, metavar="K",
                        help="write a Chrome trace of K steps, after three others, to RUN/profile")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)              # the launcher passes it
    return parser


if __name__ == "__main__":
    from sidfast.common.errors import INTERRUPTED

    code = main()
    if code == INTERRUPTED:                              # at once: threads may still be writing
        os._exit(code)
    sys.exit(code)
