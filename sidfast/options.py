"""The commands of `sidfast` and their options."""

import argparse
from pathlib import Path

import sidfast
from sidfast import train
from sidfast.common.errors import Parser
from sidfast.common.plugins import add_import_option


def build_parser(functions):
    """The parser of the command line. `functions`: {command: what it runs, which gets the parsed arguments}."""
    parser = Parser(prog="sidfast", description="One-step text-to-image generators by distillation.")
    parser.add_argument("--version", action="version", version=f"sidfast {sidfast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (add_options, text) in _COMMANDS.items():
        command = commands.add_parser(name, help=text)
        add_options(command)
        command.set_defaults(run=functions[name])
    return parser


def _teacher(parser):
    parser.add_argument("--out", required=True, metavar="DIR", help="gets the folders teacher, clip and checker")
    parser.add_argument("--steps", type=int, metavar="N", help="UNet steps (9000); all else scales alike")
    parser.add_argument("--seed", type=int, default=0)


def _random_teacher(parser):
    parser.add_argument("--architecture", required=True, metavar="NAME", help="sd15, sd21 or sd21-768")
    parser.add_argument("--out", required=True, metavar="DIR", help="gets a diffusers pipeline of about 2 GB")


def _prompts(parser):
    parser.add_argument("source", nargs="+", metavar="SOURCE",
                        help="a text file, a table, or owner/name of a dataset on the hub")
    parser.add_argument("--column", metavar="NAME", help="of tables: the captions (caption, prompt or text)")
    parser.add_argument("--files", metavar="PATTERN", help="of a dataset on the hub ('*.parquet')")
    parser.add_argument("--revision", metavar="NAME", help="of a dataset on the hub: branch, tag or commit")
    for unit in ("words", "characters"):
        parser.add_argument(f"--min-{unit}", type=int, metavar="N", help=f"drop captions with fewer {unit}")
        parser.add_argument(f"--max-{unit}", type=int, metavar="N", help=f"drop captions with more {unit}")
    parser.add_argument("--teacher", metavar="DIR",
                        help="drop captions with more tokens than its text encoder takes (a folder or hub id)")
    parser.add_argument("--sample", type=int, metavar="N", help="draw N of the prompts at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    parser.add_argument("--out", required=True, metavar="FILE.txt", help="gets one prompt a line")


def _sample(parser):
    parser.add_argument("--model", required=True, metavar="DIR", help="run directory, export, or diffusers folder")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT")
    prompts.add_argument("--prompts", metavar="FILE", help="one prompt a line, or a table")
    parser.add_argument("--prompts-column", metavar="NAME", help="of a table of prompts (caption, prompt or text)")
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the next ones count up")
    parser.add_argument("-n", type=int, default=1, metavar="N", help="images per prompt")
    parser.add_argument("--steps", type=int, metavar="N", help="of a model that takes several (50)")
    parser.add_argument("--guidance", type=float, metavar="G", help="of a model that takes several steps (1.5)")
    for side in ("height", "width"):
        parser.add_argument(f"--{side}", type=int, metavar="PIXELS", help="of each image (the model's own)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the model (fp16 on a GPU, or else fp32)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (a GPU if there is one)")
    parser.add_argument("--format", default="png", choices=("png", "jpg"), help="of the images of a folder (png)")
    parser.add_argument("--out", required=True, metavar="FILE|DIR",
                        help="a .png or .jpg gets all images, a row per seed and a column per prompt; a folder gets a "
                        "file for each, and images.jsonl with prompts and seeds")


def _evaluate(parser):
    parser.add_argument("--model", metavar="M",
                        help="run directory, export, diffusers folder or hub id, or a folder of images")
    parser.add_argument("--prompts", metavar="FILE", help="one prompt a line, or a table, or shapes:held_out")
    parser.add_argument("--prompts-column", metavar="NAME", help="of a table of prompts (caption, prompt or text)")
    parser.add_argument("--reference", metavar="DIR|STATS",
                        help="real images, or an .npz with mu and sigma; the shapes world is drawn")
    parser.add_argument("--coco", metavar="DIR", help="COCO-2014 val: prompts and reference of the COCO-30k protocol")
    parser.add_argument("--images", type=int, metavar="N", help="all prompts; 10000 of shapes:held_out")
    parser.add_argument("--seeds-per-prompt", type=_at_most(10**9), default=1, metavar="K",
                        help="images of each prompt (1)")
    parser.add_argument("--seeds", type=_at_most(10**6), default=1, metavar="K",
                        help="sets of images, each with seeds of its own, for 95 %% intervals of every metric (1)")
    parser.add_argument("--seed-offset", type=int, default=0, metavar="S", help="image i has seed S + i (0)")
    parser.add_argument("--metrics", metavar="LIST",
                        help="of fid,kid,clip,precision,recall,diversity,accuracy (fid,clip; of shapes accuracy too)")
    parser.add_argument("--features", metavar="NETWORK", help="inception:FILE, clip:FOLDER, or clip:HUB_ID")
    parser.add_argument("--clip", metavar="FOLDER",
                        help="of a transformers CLIP, or its hub id, for clip and diversity")
    parser.add_argument("--steps", type=int, metavar="N", help="of a model that takes several (50)")
    parser.add_argument("--guidance", type=float, metavar="G", help="of a model that takes several steps (1.5)")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="of the model (fp32)")
    parser.add_argument("--tf32", action="store_true", help="fp32 products in TensorFloat-32, those of features too")
    parser.add_argument("--fused", action="store_true", help="run the model on the fused kernels; needs a GPU")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images at once (16)")
    parser.add_argument("--resize", type=_at_most(16384), metavar="SIDE",
                        help="bring the images to SIDE x SIDE pixels first")
    parser.add_argument("--filter", default="bicubic", choices=("bicubic", "bilinear", "lanczos"),
                        help="of --resize (bicubic)")
    parser.add_argument("--assets", default="assets", metavar="DIR",
                        help="folder with the clip and checker of the shapes world (assets)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="of reference features (~/.cache/sidfast)")
    parser.add_argument("--out", type=Path, metavar="RESULT.json")


def _compare(parser):
    parser.add_argument("results", nargs="+", metavar="[CURVE=]RESULT",
                        help="a file, or a folder of such; results of one CURVE are joined by a line in the plot")
    parser.add_argument("--paper", action="store_true", help="add the published points of SiD-LSG, hollow")
    parser.add_argument("--out", required=True, metavar="DIR", help="gets table.md, table.csv, and plots")


def _ablate(parser):
    parser.add_argument("study", metavar="STUDY.json", help="see configs/ablations/")
    parser.add_argument("--out", metavar="DIR", help="runs and results (runs/ablations/NAME of the study)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once on each GPU, or on the CPU (1)")
    add_import_option(parser)


def _plan(parser):
    parser.add_argument("--config", required=True, metavar="FILE",
                        help="of a training run, or of a study (docs/ablations.md): each of its runs, and all together")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="override a key")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="how many (1)")
    parser.add_argument("--memory", metavar="24G", help="of each GPU; a setting that fits is recommended")
    parser.add_argument("--architecture", metavar="NAME",
                        help="sd15, sd21 or sd21-768, in place of the teacher's files")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--throughput", metavar="RATE", help="of one GPU, such as '12 images/s' or '250 TFLOP/s'")
    speed.add_argument("--measured", metavar="RUN", help="take images/s from a run directory")
    parser.add_argument("--bandwidth", type=float, metavar="GB/s", help="that one GPU sends to the others")
    add_import_option(parser)


def _report(parser):
    parser.add_argument("--run", required=True, dest="folder", metavar="RUN", help="run directory")


def _export(parser):
    parser.add_argument("--run", required=True, dest="folder", metavar="RUN", help="run directory")
    parser.add_argument("--checkpoint", metavar="STEP",
                        help="step-00000500 of RUN/checkpoints, or the path of any (the newest)")
    parser.add_argument("--dtype", default="fp16", choices=("fp16", "bf16", "fp32"), help="of the weights (fp16)")
    parser.add_argument("--teacher", metavar="DIR", help="where the run's teacher is now, if it was moved")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--plain", action="store_true",
                      help="write a stock pipeline, which needs no remote code; README.md has the recipe")
    kind.add_argument("--single-file", action="store_true",
                      help="write one .safetensors for ComfyUI and A1111; --out is its name")
    parser.add_argument("--out", required=True, metavar="DIR", help="gets the pipeline; an export there is replaced")
    add_import_option(parser)


def _demo(parser):
    parser.add_argument("--model", required=True, metavar="DIR", help="run directory, export, or diffusers folder")
    parser.add_argument("--teacher", metavar="DIR", help="the one the model was distilled from, if it is still there")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS",
                        help="of the page (127.0.0.1: this machine alone; 0.0.0.0: whoever reaches it)")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="of the page (7860)")


def _at_most(most):
    """A type of an option: a whole number that PyTorch and memory can be asked for."""

    def integer(text):
        value = int(text)
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, not {text}")
        return value

    return integer


_COMMANDS = {
    "train": (train.add_options, "distil a generator, in this process (several: deepspeed, torchrun)"),
    "teacher": (_teacher, "train the embedded teacher of the shapes world, its CLIP and judge"),
    "random-teacher": (_random_teacher, "write a real architecture with random weights, to try a setup"),
    "prompts": (_prompts, "write a file of prompts from captions (docs/prompts.md)"),
    "sample": (_sample, "make images"),
    "evaluate": (_evaluate, "measure a generator (docs/evaluation.md)"),
    "compare": (_compare, "a table and an FID-CLIP plot of results of `evaluate`"),
    "ablate": (_ablate, "run a study: variants of a configuration (docs/ablations.md)"),
    "plan": (_plan, "memory, work and time of a run, before it is started (docs/scaling.md)"),
    "report": (_report, "write RUN/report.html, one page about a training run"),
    "export": (_export, "write a checkpoint's averaged generator as a diffusers pipeline"),
    "demo": (_demo, "a page on this machine: prompt, seed, student beside teacher"),
}
