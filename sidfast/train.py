"""Train: `sidfast train --config configs/ddpm.json [--out RUN] [--set section.key=value ...]` in one process, or on all
GPUs `deepspeed sidfast/train.py ...`, also as `deepspeed --module sidfast.train ...`.

The same command again goes on where the run stopped.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent.resolve()]
# (this folder's modules must not shadow libraries of the same name)


def main(argv=None):
    """Parse and train. Returns the exit code (`run_program`)."""
    from sidfast.common.environment import prepare_environment, use_utf8

    if argv is None:
        use_utf8()
    prepare_environment()
    from sidfast.common.errors import Parser, run_program

    parser = Parser(prog="sidfast/train.py", description="Distil a one-step generator (SiD-LSG).")
    add_options(parser)
    return run_program(lambda: run(parser.parse_args(argv)), argv is None)


def add_options(parser):
    """The options of training."""
    from sidfast.common.plugins import add_import_option

    parser.add_argument("--config", required=True, metavar="FILE", help="JSON, see configs/")
    parser.add_argument("--out", metavar="RUN", help="run directory (runs/NAME of the configuration)")
    add_import_option(parser)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="override a key")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH",
                        help="auto: go on where the run stopped; PATH: start from a checkpoint of any run")
    parser.add_argument("--profile", type=int, default=0, metavar="K",
                        help="write a Chrome trace of K steps, after three others, to RUN/profile")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)              # the launcher passes it


def run(args):
    """Train as the options say, in this process and those that its launcher started with it. Raises UserError,
    RunError, KeyboardInterrupt."""
    from sidfast.common.environment import check_environment, choose_accelerator
    from sidfast.common.errors import UserError, check_paths, say
    from sidfast.common.plugins import import_modules
    from sidfast.config.schema import load_config

    check_environment(training=True)
    check_paths({"--config": args.config, "--out": args.out, "--resume": args.resume})
    if re.search("[\ud800-\udfff]", args.out or ""):     # how Python reads bytes that it cannot decode
        raise UserError(f"--out {args.out}: has characters that this locale lacks, which TensorBoard refuses; choose "
                        "another name, or set LC_ALL=C.UTF-8")
    imports = import_modules(args.imports)
    config = load_config(args.config, args.set)
    if args.profile < 0:
        raise UserError(f"--profile {args.profile}: must be a number of steps")
    if args.dry_run:
        say(config.model_dump_json(indent=2))
        return
    choose_accelerator()
    from sidfast.training.launch import start

    try:
        start(config, args.out or Path("runs") / Path(args.config).stem, args.config, args.resume, args.profile,
              imports)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on from the last checkpoint") from None


if __name__ == "__main__":
    sys.exit(main())
