"""`sidfast`: training in one process, and the commands around it. On several GPUs: `deepspeed sidfast/train.py`."""

import os
import sys
from pathlib import Path

from sidfast import train
from sidfast.common.environment import check_environment, choose_accelerator, prepare_environment, use_utf8
from sidfast.common.errors import UserError, check_paths, run_program, say, speaks
from sidfast.common.plugins import import_modules
from sidfast.common.shipped import find_config, shipped
from sidfast.options import build_parser

_PATHS = ("config", "study", "model", "prompts", "reference", "clip", "features", "coco", "cache", "assets", "measured",
          "folder", "checkpoint", "teacher", "out")
_CALLED = {"study": "STUDY.json", "folder": "--run"}


def main(argv=None):
    """Run one command. Returns the exit code: 0 done, 1 it failed, 2 the user's input is at fault (one line on
    stderr), 130 Ctrl-C."""
    if argv is None:
        use_utf8()
    prepare_environment()
    return run_program(lambda: _run(argv), argv is None)


def _run(argv):
    check_environment()
    args = build_parser(_FUNCTIONS).parse_args(argv)
    if args.run is train.run:                            # (which checks its options itself)
        return train.run(args)
    import_modules(getattr(args, "imports", ()))
    for name in ("model", "teacher", "clip", "assets", "config", "study"):
        if isinstance(given := getattr(args, name, None), str):
            setattr(args, name, find_config(given) if name in ("config", "study") else shipped(given))
    check_paths({_CALLED.get(name, f"--{name}"): getattr(args, name)
                 for name in _PATHS if getattr(args, name, None) is not None})
    if getattr(args, "out", None) is not None and not Path(args.out).name:
        raise UserError(f"--out {args.out}: must name a file or folder")
    return args.run(args) or 0


def _device(name=None):
    from sidfast.accel.device import choose_device

    return choose_device(name)


def _random_teacher(args):
    from sidfast.teachers.random_init import write_random_teacher

    _check_architecture(args.architecture)
    write_random_teacher(args.architecture, args.out, _device())


def _check_architecture(name):
    from sidfast.teachers.families import ARCHITECTURES

    if name not in ARCHITECTURES:
        raise UserError(f"--architecture {name}: must be one of {', '.join(ARCHITECTURES)}")


def _prompts(args):
    from sidfast.data.selection import Bounds, TokenLimit, select_prompts
    from sidfast.data.sources import captions_of

    for name in args.source:
        check_paths({"SOURCE": name})
    captions, tokens = captions_of(args.source, args.column, args.files, args.revision), None
    if args.teacher is not None:
        from sidfast.teachers.load import load_prompt_limit

        tokens = TokenLimit(*load_prompt_limit(args.teacher, f"--teacher {args.teacher}"))
    bounds = Bounds(args.min_words, args.max_words, args.min_characters, args.max_characters)
    say(select_prompts(captions, args.out, bounds, tokens, args.sample, args.seed).text(args.out))


def _sample(args):
    from sidfast.publishing.sample import Request, make_samples

    options = {name: value for name, value in vars(args).items() if name not in ("run", "device")}
    say(make_samples(Request(**options), _device(args.device)))


def _teacher(args):
    from dataclasses import replace

    from sidfast.toy.build import build_teacher
    from sidfast.toy.train import Recipe

    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed must be at least 0 and below 2^63, not {args.seed}")
    recipe = replace(Recipe(), seed=args.seed)
    if args.steps is not None:
        if not 1 <= args.steps <= 10**9:
            raise UserError(f"--steps must be 1 to 10^9, not {args.steps}")
        recipe = recipe.scaled(args.steps)
    build_teacher(args.out, recipe, _device())


def _evaluate(args):
    from sidfast.evaluation.command import Request, coco_options, evaluate_model

    options = {name: value for name, value in vars(args).items() if name != "run" and value is not None}
    if args.coco:
        options |= coco_options(options.pop("coco"), options)
    if args.coco and args.model is None:                 # only prepared
        if speaks():
            say(f"{options['prompts']}, {options['reference']}: captions and reference of {options['images']:,} images")
        return
    for name in ("model", "out"):
        if name not in options:
            raise UserError(f"--{name} is needed")
    evaluate_model(Request(**options), _device())


def _compare(args):
    from sidfast.evaluation.compare import compare

    for path in args.results:
        check_paths({"RESULT.json": path})
    say(f"{args.out}: {', '.join(compare(args.results, args.out, args.paper))}")


def _ablate(args):
    choose_accelerator()
    from sidfast.studies.ablate import ablate

    return 0 if ablate(args.study, args.out, args.jobs, args.imports) else 1


def _plan(args):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")       # nothing runs on a GPU
    from sidfast.config.schema import load_config
    from sidfast.planning.plan import parse_memory, plan
    from sidfast.studies.study import is_study, load_study
    from sidfast.teachers.load import load_meta_teacher

    if args.architecture is not None:
        _check_architecture(args.architecture)
    if is_study(args.config):
        if args.set:
            raise UserError(f"--set: {args.config} is a study; its own `settings` hold for all its runs")
        configs = load_study(args.config)
    else:
        configs = [(Path(args.config).stem, load_config(args.config, args.set))]
    model = configs[0][1].model                          # (of all runs of a study)
    plan(configs, lambda: load_meta_teacher(args.architecture or model.teacher, **model.loading), args.gpus,
         None if args.memory is None else parse_memory(args.memory), args.throughput, args.measured, args.bandwidth,
         out=say)


def _report(args):
    from sidfast.evaluation.report import write_report
    from sidfast.runs.lock import is_claimed

    try:
        say(write_report(args.folder, is_claimed(args.folder)))
    except OSError as error:
        raise UserError(f"--run {args.folder}: report.html cannot be written ({error.strerror})") from None


def _export(args):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")       # nothing runs on a GPU
    from sidfast.runs.export import export_checkpoint

    step, sigma = export_checkpoint(args.folder, args.out, args.checkpoint, args.dtype, args.teacher, args.single_file,
                                    args.plain)
    hint = f"; sample it in one step from sigma {sigma:.4f}, with cfg 1" if args.single_file else ""
    say(f"{args.out}: the generator after {step} updates" + ("; README.md says how to call it" if args.plain else hint))


def _demo(args):
    from sidfast.publishing.demo import run_demo

    run_demo(args.model, args.teacher, args.host, args.port, _device())


_FUNCTIONS = {
    "train": train.run, "teacher": _teacher, "random-teacher": _random_teacher, "prompts": _prompts, "sample": _sample,
    "evaluate": _evaluate, "compare": _compare, "ablate": _ablate, "plan": _plan, "report": _report, "export": _export,
    "demo": _demo}

if __name__ == "__main__":
    sys.exit(main())
