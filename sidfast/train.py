"""Train: `deepspeed sidfast/train.py --config configs/ddpm.json [--out RUN] [--set section.key=value ...]`.

Runs on a machine without a GPU, on one GPU, and on many; the same command again goes on where the run stopped.
"""

import argparse
import contextlib
import os
import sys
from datetime import timedelta
from pathlib import Path

sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent.resolve()]
# (this folder's modules must not shadow libraries of the same name)


def main(argv=None):
    """Parse, build, loop. Returns the exit code: 0 done or stopped in order, 1 the run failed, 2 the user's input is at
    fault (one line on stderr)."""
    from sidfast.environment import check_environment, prepare_environment

    prepare_environment()
    from sidfast.errors import INTERRUPTED, RunError, UserError, one_line

    with contextlib.redirect_stderr(Unfailing(sys.stderr)):
        try:
            check_environment()
            run(_parser().parse_args(argv))
        except (UserError, RunError) as error:
            _tell(one_line(error))
            return 2 if isinstance(error, UserError) else 1
        except KeyboardInterrupt:
            _tell("interrupted; the same command goes on from the last checkpoint")
            return INTERRUPTED
    return 0


class Unfailing:
    """A text stream whose log file may lie on a full disk: what finds no room is lost, and training goes on."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        """As a stream's; what it cannot write counts as written."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
            self._stream.flush()
        return len(text)

    def flush(self):
        """Nothing is held back."""

    def __getattr__(self, name):
        return getattr(self._stream, name)


def run(args):
    """Check everything that can be checked before anything is written, then train."""
    from sidfast.config import load_config
    from sidfast.errors import UserError, check_paths, say

    check_paths({"--config": args.config, "--out": args.out, "--resume": args.resume})
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
    training_prompts(config.data.prompts, config.train.seed, config.synthetic)

    import torch

    if not torch.cuda.is_available():                    # said once, in the run's config.json, not by each library
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed import comm

    from sidfast.method.synthetic import cannot_capture
    from sidfast.networks.loading import load_teacher
    from sidfast.training.checkpoint import check_fits, choose_checkpoint
    from sidfast.training.engines import ENGINES, compute_dtype, engine_config, engine_section, offloads, zero_stages
    from sidfast.training.fit import with_micro_batch
    from sidfast.training.identity import check_inputs, check_origin, describe_inputs
    from sidfast.training.lock import claim
    from sidfast.training.measure import check_measures
    from sidfast.training.probe import check_sections, probe_engines
    from sidfast.training.run import open_run
    from sidfast.training.speed import check_speed
    from sidfast.training.state import read_state
    from sidfast.training.stop import Stop
    from sidfast.training.trainer import train

    engine_config(config, "generator", processes)
    compute_dtype(config.deepspeed)
    open_run(out, config, args.resume)
    teacher = load_teacher(config.model.teacher)
    inputs = describe_inputs(config, teacher)
    check_inputs(out, inputs)
    check_teacher_fits(config, teacher, args.config)
    check_speed(config.speed, teacher, zero_stages(config),
                torch.device("cuda" if torch.cuda.is_available() else "cpu"), cannot_capture(config.synthetic))
    if first:
        check_measures(config, teacher)
    claim(out, first, warn=_tell)
    device = join()
    check_sections(config, processes)
    if any(offloads(engine_section(config, name)) for name in ENGINES):
        _tell("loading DeepSpeed's Adam for the CPU; the first time it is compiled. (If this does not end: remove the "
              "file `lock` that a compilation that was killed has left in ~/.cache/torch_extensions/*/cpu_adam)")
    probe_engines(config, processes, device)
    config = with_micro_batch(config, teacher, processes, device)
    checkpoint = choose_checkpoint(out, args.resume, _tell)
    if checkpoint:
        check_fits(checkpoint, teacher.unet, config.optimizer)
        if checkpoint.parent == out / "checkpoints":      # (--resume may name one of any other run)
            check_origin(checkpoint, config, inputs, f"--out {out}: ")
    _tell(f"{'resuming from ' + str(checkpoint) if checkpoint else 'starting'}, run directory {out}")
    step, steps = read_state(checkpoint)["extra"]["step"] if checkpoint else 0, config.train.total_steps
    if step >= steps:
        _tell(f"the run is already at step {step} of {steps}: nothing is left to train")
    stop = Stop()
    result = train(config, out, checkpoint, teacher, device, stop, profile=args.profile)
    stop.ignore()
    comm.destroy_process_group()
    if first:
        _report(out, result)


def check_teacher_fits(config, teacher, source):
    """Raise UserError, naming the source of the configuration, for noise levels or sizes that the teacher lacks."""
    from sidfast.errors import UserError
    from sidfast.training.batches import noise_levels

    try:
        noise_levels(teacher.schedule, config.noise)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    if config.noise.t_init >= len(teacher.schedule):
        raise UserError(f"{source}: noise.t_init ({config.noise.t_init}) must be below the teacher's "
                        f"{len(teacher.schedule)} timesteps")
    if (config.model.resolution or 0) % teacher.latent_factor:
        raise UserError(f"{source}: model.resolution ({config.model.resolution}) must be a multiple of "
                        f"{teacher.latent_factor}, the pixels along the side of the teacher's latent ones")


def join():
    """Join the other processes (or be the only one); returns this process's device. Raises UserError if another program
    has the port."""
    import deepspeed
    import torch

    from sidfast.errors import UserError

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
    measures, and one that hangs is Watch's to find, which can name it."""
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
    from sidfast.environment import omp_threads

    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return omp_threads() or max(1, os.cpu_count() // local)


def _tell(message):
    """A line on standard error, from the first process."""
    from sidfast.errors import speaks

    if speaks():
        print(f"sidfast: {message}", file=sys.stderr, flush=True)


def _report(out, end):
    """Where things are, after the measures before and after (if there are any), on standard output."""
    import json

    from sidfast.errors import say
    from sidfast.evaluation.metrics import title

    if end:
        start = json.loads((out / "evaluation.json").read_text())["start"]
        say(f"\n{end['images']} images, one step{'':<14}start      end")
        for key, value in end.items():
            if isinstance(value, float) and not key.startswith("accuracy_"):
                say(f"{title(key):<34}{start[key]:>9.4f}{value:>9.4f}")
    folders = [f"{name}: {out / name}" for name in ("export", "samples") if (out / name).is_dir()]
    say("\n" + "   ".join([*folders, f"report: {out / 'report.html'}"]))


def _parser():
    from sidfast.errors import Parser

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
    from sidfast.errors import INTERRUPTED

    code = main()
    if code == INTERRUPTED:                              # at once: threads may still be writing
        os._exit(code)
    sys.exit(code)
