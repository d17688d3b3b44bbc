"""`sidfast plan`: what a run needs of each GPU, and what it takes, before it is started.

Speeds are never guessed: they follow from a throughput that was measured, or that the user states.
"""

import math
import re
import sys
from pathlib import Path

from sidfast.common.errors import UserError
from sidfast.common.records import read_metrics, read_run
from sidfast.config.schema import build_config
from sidfast.engines.validate import check_sections
from sidfast.planning.plan_text import describe
from sidfast.planning.planner import GIB, Planner
from sidfast.teachers.fit import check_teacher_fits


def parse_memory(text):
    """Bytes of a GPU's memory, such as 24G, 80 GiB, 24576MiB or 0.08T; a number alone is GiB, and all units are powers
    of 1024, as GPUs have them. Raises UserError."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([mgt]?)(?:i?b)?\s*", str(text), re.IGNORECASE | re.ASCII)
    if not match or float(match[1]) <= 0:
        raise UserError(f"--memory {text}: must be a GPU's memory, such as 24G or 24576MiB")
    return float(match[1]) * GIB * {"m": 1 / 1024, "t": 1024}.get(match[2].lower(), 1)


def parse_throughput(text, flops):
    """(images/s per GPU, how it is known) of "12 images/s" or "250 TFLOP/s", at `flops` an image. Raises UserError."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(images/s|tflop/s|tflops)\s*", str(text), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise UserError(f"--throughput {text}: must be what one GPU does, such as '12 images/s' or '250 TFLOP/s'")
    value = float(match[1])
    rate = value if match[2].lower() == "images/s" else value * 1e12 / flops
    return rate, f"from --throughput {text}"


def measured_throughput(run, teacher):
    """(images/s per GPU, how it is known) of a run directory: the median of the lines of its metrics.jsonl, each on as
    many GPUs as it was written on. Raises UserError, also for a teacher of another architecture than `teacher`."""
    run = Path(run)
    about = read_run(run, f"--measured {run}: no run directory", "name another")
    lines = [line for line in read_metrics(run) if line.get("images_per_s")]
    known = [line for line in lines if line.get("tflops_per_gpu")]
    last = about.get("processes")
    if not lines or not (known or last):
        raise UserError(f"--measured {run}: no run directory with images_per_s in its metrics.jsonl")
    config = build_config(about["config"], run / "config.json")
    processes = [_processes(run, line, Planner(config, teacher).flops) for line in known] or [last] * len(lines)
    rates = sorted(line["images_per_s"] / n for line, n in zip(known or lines, processes, strict=True))
    rate = rates[len(rates) // 2]
    text = f"measured in {run}, median of {len(rates)} lines, {' and '.join(map(str, sorted({*processes})))} processes"
    return rate, text if known else f"{text} as in its last start, for the lines do not say"


def _processes(run, line, flops):
    """On how many processes a line was written: what they did together over what each did, at `flops` an image."""
    n = line["images_per_s"] * flops / (line["tflops_per_gpu"] * 1e12)
    if round(n) < 1 or not math.isclose(n, round(n), rel_tol=1e-6):
        raise UserError(f"--measured {run}: its teacher has another architecture (an image takes {flops / 1e12:.4g} "
                        "TFLOP by this one, which its tflops_per_gpu does not fit)")
    return round(n)


def plan(configs, load, gpus, limit, throughput=None, measured=None, bandwidth=None, out=print):
    """Print the plan of each (name, Config) in `configs`, and of all together. Raises UserError.

    `load()` gives their Teacher, which they share, weights or not; `limit`: bytes of a GPU, or None; `throughput`,
    `measured`: as the command takes them; `bandwidth`: GB/s that a GPU sends, or None.
    """
    if bandwidth is not None and not 0 < bandwidth < 1e6:
        raise UserError(f"--bandwidth {bandwidth:g}: must be the GB/s that one GPU sends")
    if gpus < 1 or gpus > 100_000:
        raise UserError(f"--gpus {gpus}: must be 1 to 100000")
    if throughput is not None:
        parse_throughput(throughput, 1.0)
    for name, config in configs:
        check_sections(config)
        _check_divides(config.train, gpus, f"{name}: " if len(configs) > 1 else "")
    teacher, counted, hours = load(), {}, 0.0
    for name, config in configs:
        check_teacher_fits(config, teacher, name)
    known = None if measured is None else measured_throughput(measured, teacher)
    for name, config in configs:
        planner = Planner(config, teacher, lambda text: print(f"sidfast: {text}", file=sys.stderr), counted=counted)
        rate = parse_throughput(throughput, planner.flops) if throughput is not None else known
        text, one = describe(name, planner, gpus, limit, rate, bandwidth and bandwidth * 1e9)
        out(text)
        hours += one or 0
    if len(configs) > 1 and hours:
        out(f"all {len(configs)} runs one after the other: {hours:.1f} h")


def _check_divides(train, gpus, prefix):
    """Raise UserError, which begins with `prefix`, for a global batch that no micro-batch splits among the GPUs."""
    if train.batch_size % (gpus * train.fake_score_factor):
        factor = f" x train.fake_score_factor ({train.fake_score_factor})" if train.fake_score_factor > 1 else ""
        raise UserError(f"{prefix}train.batch_size ({train.batch_size}) does not divide among {gpus} GPUs{factor}")
