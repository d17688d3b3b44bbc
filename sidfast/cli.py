"""`sidfast`: the commands around a training run. Training itself: `deepspeed sidfast/train.py --config FILE`."""

import argparse
import sys

from sidfast.errors import UserError


def main(argv=None):
    """Run one command. Returns the exit code: 0 done, 2 the user's input is at fault (one line on stderr)."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except UserError as error:
        print(f"sidfast: {error}", file=sys.stderr)
        return 2
    return 0


def _parser():
    parser = argparse.ArgumentParser(prog="sidfast", description="One-step text-to-image generators by distillation.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    teacher = commands.add_parser("teacher", help="train the embedded teacher of the shapes world, its CLIP and judge")
    teacher.add_argument("--out", required=True, metavar="DIR", help="gets the folders teacher, clip and checker")
    teacher.add_argument("--steps", type=int, metavar="N", help="UNet steps; the other stages scale alike")
    teacher.add_argument("--seed", type=int, default=0)
    teacher.set_defaults(run=_teacher)
    return parser


def _teacher(args):
    from dataclasses import replace

    import torch

    from sidfast.teacher.build import build_teacher
    from sidfast.teacher.train import Recipe

    recipe = replace(Recipe(), seed=args.seed)
    if args.steps is not None:
        if args.steps < 1:
            raise UserError(f"--steps must be at least 1, not {args.steps}")
        recipe = recipe.scaled(args.steps)
    build_teacher(args.out, recipe, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    sys.exit(main())
