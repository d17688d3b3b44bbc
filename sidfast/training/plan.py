"""`sidfast plan`: what a run needs of each GPU, and what it takes, before it is started.

Speeds are never guessed: they follow from a throughput that was measured, or that the user states.
"""

import copy
import json
import math
import re
import sys
from pathlib import Path

from sidfast.errors import UserError
from sidfast.training.plan_text import describe
from sidfast.training.planner import GIB, Planner
from sidfast.training.probe import check_sections


def parse_memory(text):
    """Bytes of a GPU's memory, such as 24G or 80GiB. Raises UserError."""
    match = re.fullmatch(r"\s*(\d{1,6}(?:\.\d{1,3})?)\s*(?:g|gb|gib)?\s*", str(text), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise UserError(f"--memory {text}: must be a GPU's memory in GiB, such as 24G")
    return float(match[1]) * GIB


def parse_throughput(text, flops):
    """(images/s per GPU, how it is known) of "12 images/s" or "250 TFLOP/s", at `flops` an image. Raises UserError."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(images/s|tflop/s|tflops)\s*", str(text), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise UserError(f"--throughput {text}: must be what one GPU does, such as '12 images/s' or '250 TFLOP/s'")
    value = float(match[1])
    rate = value if match[2].lower() == "images/s" else value * 1e12 / flops
    return rate, f"from --throughput {text}"


def measured_throughput(run):
    """(images/s per GPU, how it is known) of a run directory: the median of its metrics.jsonl. Raises UserError."""
    run = Path(run)
    try:
        processes = json.loads((run / "config.json").read_text())["processes"]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rates = sorted(line["images_per_s"] for line in lines if "images_per_s" in line)
        rate = rates[len(rates) // 2] / processes
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, IndexError, ZeroDivisionError, RecursionError):
        raise UserError(f"--measured {run}: no run directory with images_per_s in its metrics.jsonl") from None
    return rate, f"measured in {run}, median of {len(rates)} lines, {processes} processes"


def plan(configs, shapes, gpus, limit, throughput=None, measured=None, bandwidth=None, out=print):
    """Print the plan of each (name, Config) in `configs`, and of all together. Raises UserError.

    `shapes(config)` gives its Shapes; `limit`: bytes of a GPU, or None; `throughput`, `measured`: as the command takes
    them; `bandwidth`: GB/s that a GPU sends, or None.
    """
    if bandwidth is not None and not 0 < bandwidth < 1e6:
        raise UserError(f"--bandwidth {bandwidth:g}: must be the GB/s that one GPU sends")
    if gpus < 1 or gpus > 100_000:
        raise UserError(f"--gpus {gpus}: must be 1 to 100000")
    hours, known = 0.0, measured_throughput(measured) if measured else None
    if throughput:
        parse_throughput(throughput, 1.0)
    planners = {}
    for _, config in configs:
        check_sections(config, 1)
    for name, config in configs:
        key = config.model_copy(update={"train": None, "optimizer": None, "ema": None, "data": None}).model_dump_json()
        if key not in planners:
            planners[key] = Planner(config, shapes(config), lambda text: print(f"sidfast: {text}", file=sys.stderr))
        planner = copy.copy(planners[key])
        planner.config = config
        rate = parse_throughput(throughput, planner.flops) if throughput else known
        text, one = describe(name, planner, gpus, limit, rate, bandwidth and bandwidth * 1e9)
        out(text)
        hours += one or 0
    if len(configs) > 1 and hours:
        out(f"all {len(configs)} runs one after the other: {hours:.1f} h")
