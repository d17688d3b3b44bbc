"""`sidfast`: training in one process, and the commands around it. On several GPUs: `deepspeed sidfast/train.py`."""

import argparse
import os
import sys
from pathlib import Path

import sidfast
from sidfast import train
from sidfast.common.environment import check_environment, choose_accelerator, prepare_environment, use_utf8
from sidfast.common.errors import Parser, UserError, check_paths, run_program, say, speaks
from sidfast.common.plugins import add_import_option, import_modules
from sidfast.common.shipped import find_config, shipped

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
    args = _parser().parse_args(argv)
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


def _parser():
    parser = Parser(prog="sidfast", description="One-step text-to-image generators by distillation.")
    parser.add_argument("--version", action="version", version=f"sidfast {sidfast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    distil = commands.add_parser("train", help="distil a generator, in this process (several: deepspeed, torchrun)")
    train.add_options(distil)
    distil.set_defaults(run=train.run)

    teacher = commands.add_parser("teacher", help="train the embedded teacher of the shapes world, its CLIP and judge")
    teacher.add_argument("--out", required=True, metavar="DIR", help="gets the folders teacher, clip and checker")
    teacher.add_argument("--steps", type=int, metavar="N", help="UNet steps (9000); all else scales alike")
    teacher.add_argument("--seed", type=int, default=0)
    teacher.set_defaults(run=_teacher)

    random = commands.add_parser("random-teacher", help="write a real architecture with random weights, to try a setup")
    random.add_argument("--architecture", required=True, metavar="NAME", help="sd15, sd21 or sd21-768")
    random.add_argument("--out", required=True, metavar="DIR", help="gets a diffusers pipeline of about 2 GB")
    random.set_defaults(run=_random_teacher)

    _add_prompts(commands)
    _add_sample(commands)
    judge = commands.add_parser("evaluate", help="measure a generator (docs/evaluation.md)")
    judge.add_argument("--model", metavar="M",
                       help="run directory, export, diffusers folder or hub id, or a folder of images")
    judge.add_argument("--prompts", metavar="FILE", help="one prompt a line, or a table, or shapes:held_out")
    judge.add_argument("--prompts-column", metavar="NAME", help="of a table of prompts (caption, prompt or text)")
    judge.add_argument("--reference", metavar="DIR|STATS",
                       help="real images, or an .npz with mu and sigma; the shapes world is drawn")
    judge.add_argument("--coco", metavar="DIR", help="COCO-2014 val: prompts and reference of the COCO-30k protocol")
    judge.add_argument("--images", type=int, metavar="N", help="all prompts; 10000 of shapes:held_out")
    judge.add_argument("--seeds-per-prompt", type=_at_most(10**9), default=1, metavar="K",
                       help="images of each prompt (1)")
    judge.add_argument("--seeds", type=_at_most(10**6), default=1, metavar="K",
                       help="sets of images, each with seeds of its own, for 95 %% intervals of every metric (1)")
    judge.add_argument("--seed-offset", type=int, default=0, metavar="S", help="image i has seed S + i (0)")
    judge.add_argument("--metrics", metavar="LIST",
                       help="of fid,kid,clip,precision,recall,diversity,accuracy (fid,clip; of shapes accuracy too)")
    judge.add_argument("--features", metavar="NETWORK", help="inception:FILE, clip:FOLDER, or clip:HUB_ID")
    judge.add_argument("--clip", metavar="FOLDER",
                       help="of a transformers CLIP, or its hub id, for clip and diversity")
    judge.add_argument("--steps", type=int, metavar="N", help="of a model that takes several (50)")
    judge.add_argument("--guidance", type=float, metavar="G", help="of a model that takes several steps (1.5)")
    judge.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="of the model (fp32)")
    judge.add_argument("--tf32", action="store_true", help="fp32 products in TensorFloat-32, those of features too")
    judge.add_argument("--fused", action="store_true", help="run the model on the fused kernels; needs a GPU")
    judge.add_argument("--batch-size", type=int, default=16, metavar="N", help="images at once (16)")
    judge.add_argument("--resize", type=_at_most(16384), metavar="SIDE",
                       help="bring the images to SIDE x SIDE pixels first")
    judge.add_argument("--filter", default="bicubic", choices=("bicubic", "bilinear", "lanczos"),
                       help="of --resize (bicubic)")
    judge.add_argument("--assets", default="assets", metavar="DIR",
                       help="folder with the clip and checker of the shapes world (assets)")
    judge.add_argument("--cache", type=Path, metavar="DIR", help="of reference features (~/.cache/sidfast)")
    judge.add_argument("--out", type=Path, metavar="RESULT.json")
    judge.set_defaults(run=_evaluate)

    several = commands.add_parser("compare", help="a table and an FID-CLIP plot of results of `evaluate`")
    several.add_argument("results", nargs="+", metavar="[CURVE=]RESULT",
                         help="a file, or a folder of such; results of one CURVE are joined by a line in the plot")
    several.add_argument("--paper", action="store_true", help="add the published points of SiD-LSG, hollow")
    several.add_argument("--out", required=True, metavar="DIR", help="gets table.md, table.csv, and plots")
    several.set_defaults(run=_compare)

    study = commands.add_parser("ablate", help="run a study: variants of a configuration (docs/ablations.md)")
    study.add_argument("study", metavar="STUDY.json", help="see configs/ablations/")
    study.add_argument("--out", metavar="DIR", help="runs and results (runs/ablations/NAME of the study)")
    study.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once on each GPU, or on the CPU (1)")
    add_import_option(study)
    study.set_defaults(run=_ablate)

    plan = commands.add_parser("plan", help="memory, work and time of a run, before it is started (docs/scaling.md)")
    plan.add_argument("--config", required=True, metavar="FILE",
                      help="of a training run, or of a study (docs/ablations.md): each of its runs, and all together")
    plan.add_argument("--set", action="append", default=[], metavar="section.key=value", help="override a key")
    plan.add_argument("--gpus", type=int, default=1, metavar="N", help="how many (1)")
    plan.add_argument("--memory", metavar="24G", help="of each GPU; a setting that fits is recommended")
    plan.add_argument("--architecture", metavar="NAME", help="sd15, sd21 or sd21-768, in place of the teacher's files")
    speed = plan.add_mutually_exclusive_group()
    speed.add_argument("--throughput", metavar="RATE", help="of one GPU, such as '12 images/s' or '250 TFLOP/s'")
    speed.add_argument("--measured", metavar="RUN", help="take images/s from a run directory")
    plan.add_argument("--bandwidth", type=float, metavar="GB/s", help="that one GPU sends to the others")
    add_import_option(plan)
    plan.set_defaults(run=_plan)

    report = commands.add_parser("report", help="write RUN/report.html, one page about a training run")
    report.add_argument("--run", required=True, dest="folder", metavar="RUN", help="run directory")
    report.set_defaults(run=_report)

    export = commands.add_parser("export", help="write a checkpoint's averaged generator as a diffusers pipeline")
    export.add_argument("--run", required=True, dest="folder", metavar="RUN", help="run directory")
    export.add_argument("--checkpoint", metavar="PATH", help="a folder of RUN/checkpoints (the newest)")
    export.add_argument("--dtype", default="fp16", choices=("fp16", "bf16", "fp32"), help="of the weights (fp16)")
    export.add_argument("--teacher", metavar="DIR", help="where the run's teacher is now, if it was moved")
    kind = export.add_mutually_exclusive_group()
    kind.add_argument("--plain", action="store_true",
                      help="write a stock pipeline, which needs no remote code; README.md has the recipe")
    kind.add_argument("--single-file", action="store_true",
                      help="write one .safetensors for ComfyUI and A1111; --out is its name")
    export.add_argument("--out", required=True, metavar="DIR", help="gets the pipeline; an export there is replaced")
    add_import_option(export)
    export.set_defaults(run=_export)

    demo = commands.add_parser("demo", help="a page on this machine: prompt, seed, student beside teacher")
    demo.add_argument("--model", required=True, metavar="DIR", help="run directory, export, or diffusers folder")
    demo.add_argument("--teacher", metavar="DIR", help="the one the model was distilled from, if it is still there")
    demo.add_argument("--port", type=int, default=7860, metavar="N", help="of the page (7860)")
    demo.set_defaults(run=_demo)
    return parser


def _add_prompts(commands):
    prompts = commands.add_parser("prompts", help="write a file of prompts from captions (docs/prompts.md)")
    prompts.add_argument("source", nargs="+", metavar="SOURCE",
                         help="a text file, a table, or owner/name of a dataset on the hub")
    prompts.add_argument("--column", metavar="NAME", help="of tables: the captions (caption, prompt or text)")
    prompts.add_argument("--files", metavar="PATTERN", help="of a dataset on the hub ('*.parquet')")
    prompts.add_argument("--revision", metavar="NAME", help="of a dataset on the hub: branch, tag or commit")
    for unit in ("words", "characters"):
        prompts.add_argument(f"--min-{unit}", type=int, metavar="N", help=f"drop captions with fewer {unit}")
        prompts.add_argument(f"--max-{unit}", type=int, metavar="N", help=f"drop captions with more {unit}")
    prompts.add_argument("--teacher", metavar="DIR",
                         help="drop captions with more tokens than its text encoder takes (a folder or hub id)")
    prompts.add_argument("--sample", type=int, metavar="N", help="draw N of the prompts at random")
    prompts.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    prompts.add_argument("--out", required=True, metavar="FILE.txt", help="gets one prompt a line")
    prompts.set_defaults(run=_prompts)


def _add_sample(commands):
    sample = commands.add_parser("sample", help="make images")
    sample.add_argument("--model", required=True, metavar="DIR", help="run directory, export, or diffusers folder")
    prompts = sample.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT")
    prompts.add_argument("--prompts", metavar="FILE", help="one prompt a line, or a table")
    sample.add_argument("--prompts-column", metavar="NAME", help="of a table of prompts (caption, prompt or text)")
    sample.add_argument("--seed", type=int, default=0, help="of the first image; the next ones count up")
    sample.add_argument("-n", type=int, default=1, metavar="N", help="images per prompt")
    sample.add_argument("--steps", type=int, metavar="N", help="of a model that takes several (50)")
    sample.add_argument("--guidance", type=float, metavar="G", help="of a model that takes several steps (1.5)")
    for side in ("height", "width"):
        sample.add_argument(f"--{side}", type=int, metavar="PIXELS", help="of each image (the model's own)")
    sample.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the model (fp16 on a GPU, or else fp32)")
    sample.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (a GPU if there is one)")
    sample.add_argument("--format", default="png", choices=("png", "jpg"), help="of the images of a folder (png)")
    sample.add_argument("--out", required=True, metavar="FILE|DIR",
                        help="a .png or .jpg gets all images, a row per seed and a column per prompt; a folder gets a "
                        "file for each, and images.jsonl with prompts and seeds")
    sample.set_defaults(run=_sample)


def _at_most(most):
    """A type of an option: a whole number that PyTorch and memory can be asked for."""

    def integer(text):
        value = int(text)
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, not {text}")
        return value

    return integer


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

    run_demo(args.model, args.teacher, args.port, _device())


if __name__ == "__main__":
    sys.exit(main())
