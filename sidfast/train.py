"""Train: `deepspeed sidfast/train.py --config configs/ddpm.json [--out RUN] [--set section.key=value ...]`.

Runs on a machine without a GPU, on one GPU, and on many; the same command again goes on where the run stopped.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent.resolve()]
# (this folder's modules must not shadow libraries of the same name)


def main(argv=None):
    """Parse, build, loop. Returns the exit code: 0 done, 2 the user's input is at fault (one line on stderr)."""
    from sidfast.quiet import quieten

    quieten()
    from sidfast.errors import UserError

    args = _parser().parse_args(argv)
    try:
        run(args)
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"sidfast: {error}", file=sys.stderr)
        return 2
    return 0


def run(args):
    """Check everything that can be checked before anything is written, then train."""
    from sidfast.config import load_config

    config = load_config(args.config, args.set)
    if args.dry_run:
        print(config.model_dump_json(indent=2))
        return
    from sidfast.data.prompts import open_prompts
    from sidfast.errors import UserError

    first, processes = int(os.environ.get("RANK", 0)) == 0, int(os.environ.get("WORLD_SIZE", 1))
    out = Path(args.out or Path("runs") / Path(args.config).stem)
    open_prompts(config.data.prompts)

    import torch

    if not torch.cuda.is_available():                    # said once, in the run's config.json, not by each library
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed import comm

    from sidfast.method.noise import NoiseLevels
    from sidfast.networks.loading import load_teacher
    from sidfast.training.engines import compute_dtype, engine_config
    from sidfast.training.run import open_run
    from sidfast.training.trainer import train

    engine_config(config, "generator", processes)
    compute_dtype(config.deepspeed)
    checkpoint = open_run(out, config, args.resume, lambda text: print(f"sidfast: {text}", file=sys.stderr)
                          if first else None)
    teacher = load_teacher(config.model.teacher)
    try:
        NoiseLevels(teacher.schedule, config.noise.density, config.noise.t_min, config.noise.t_max,
                    **config.noise.options)
    except ValueError as error:
        raise UserError(f"{args.config}: {error}") from None
    if config.noise.t_init >= len(teacher.schedule):
        raise UserError(f"{args.config}: noise.t_init ({config.noise.t_init}) must be below the teacher's "
                        f"{len(teacher.schedule)} timesteps")
    if first:
        print(f"sidfast: {'resuming from ' + str(checkpoint) if checkpoint else 'starting'}, run directory {out}",
              file=sys.stderr)
    result = train(config, out, checkpoint, teacher, join())
    comm.destroy_process_group()
    if first and result:
        _report(out, result)


def join():
    """Join the other processes (or be the only one); returns this process's device."""
    import deepspeed
    import torch

    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": "29500"}.items():
        os.environ.setdefault(name, value)
    gpu = torch.cuda.is_available()
    if not gpu:                                          # DeepSpeed's own collectives need a compiler; gloo needs none
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    deepspeed.init_distributed("nccl" if gpu else "gloo", verbose=False)
    return device


def _report(out, end):
    """The measures before and after, on standard output."""
    import json

    start = json.loads((out / "evaluation.json").read_text())["start"]
    print(f"\n{end['images']} held-out captions, one step      start      end")
    for key, label in (("accuracy", "every attribute right"), ("clip_score", "CLIP score (small CLIP)"),
                       ("fid_small_clip", "FID (small CLIP)")):
        print(f"{label:<34}{start[key]:>9.4f}{end[key]:>9.4f}")
    print(f"\nexport: {out / 'export'}   samples: {out / 'samples'}")


def _parser():
    parser = argparse.ArgumentParser(prog="sidfast/train.py", description="Distil a one-step generator (SiD-LSG).")
    parser.add_argument("--config", required=True, metavar="FILE", help="JSON, see configs/")
    parser.add_argument("--out", metavar="RUN", help="run directory (runs/NAME of the configuration)")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="override a key")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH",
                        help="auto: go on where the run stopped; PATH: start from a checkpoint of any run")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)              # the launcher passes it
    return parser


if __name__ == "__main__":
    sys.exit(main())
