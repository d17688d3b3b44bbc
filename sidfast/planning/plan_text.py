"""How a plan is written down."""

from sidfast.planning.planner import GIB, STAGES, recommend
from sidfast.teachers.base import NAMES

_ASSUMED = (100, 200, 400)                               # TFLOP/s: what is shown where nothing was measured


def describe(name, planner, gpus, limit, rate, bandwidth=None):
    """(the plan of one run, whose global batch divides among the GPUs, as text; hours to its target or None).

    `rate`: (images/s per GPU, how it is known) or None; `bandwidth`: bytes/s that a GPU sends, or None.
    """
    config, sizes = planner.config, planner.teacher.parameters()
    network = planner.teacher.family.network
    sizes = {NAMES.get(name, name): f"{sizes[name] / 1e6:.1f} M" for name in (network, *sorted({*sizes} - {network}))}
    trained, *others = (f"{name} {size}" for name, size in sizes.items())
    lines = [f"{name}: {gpus} GPU{'s' if gpus > 1 else ''}, global batch {config.train.batch_size}, "
             f"latents {'x'.join(map(str, planner.latent_shape))}, {str(planner.dtype).removeprefix('torch.')}",
             f"parameters: {trained} (generator, fake score and teacher each), {', '.join(others)}",
             f"work: {planner.flops / 1e12:.4g} TFLOP per image, one update of each network", ""]
    options = planner.options(gpus)
    best = recommend(options, limit) if limit else None
    lines += [*_memory_table(options), ""]
    current = None
    if config.train.micro_batch != "auto":
        current = planner.option(*planner.configured(), config.train.micro_batch, config.speed.gradient_checkpointing,
                                 gpus)
    for title, option in (("as configured", current), ("recommended", best)):
        if option:
            lines += _parts(title, option)
    lines.append(f"counted as {'the fused kernels run' if planner.fused else 'plain PyTorch runs'} the networks"
                 f"{'; torch.compile makes that less' if config.speed.compile else ''}")
    if limit:
        fitting = best.overrides(config.deepspeed) if best else "nothing does; more GPUs, or a smaller resolution"
        lines.append(f"fits {limit / GIB:g} GiB, with what CUDA itself takes: {fitting}")
    text, hours = _time(planner, gpus, rate, best or current, bandwidth)
    return "\n".join([*lines, "", *text, ""]), hours


def _memory_table(options):
    sizes = sorted({o.micro_batch for o in options})
    rows = [["GiB per GPU at micro-batch", *map(str, sizes)]]
    for label, *_ in STAGES:
        for checkpointing in (False, True):
            known = {o.micro_batch: o.bytes for o in options if (o.label, o.checkpointing) == (label, checkpointing)}
            rows.append([f"ZeRO {label}{', checkpointing' if checkpointing else ''}",
                         *(f"{known[m] / GIB:.3g}" for m in sizes)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows]


def _parts(title, o):
    parts = ", ".join(f"{name} {size / GIB:.3g}" for name, size in o.parts.items() if size)
    host = f"; on the host {o.host / GIB:.3g} GiB per process" if o.host else ""
    return [f"{title} (ZeRO {o.stage}{', offload' if o.offload else ''}, micro-batch {o.micro_batch} x {o.accumulation}"
            f"{', checkpointing' if o.checkpointing else ''}): {o.bytes / GIB:.3g} GiB: {parts}{host}"]


def _time(planner, gpus, rate, option, bandwidth):
    """Lines about time, and the hours to the target."""
    config = planner.config
    images = config.train.total_steps * config.train.batch_size
    lines = [f"target: {images:,} images, {config.train.total_steps:,} steps, "
             f"{images * planner.flops:.3g} floating-point operations"]
    waiting = 0.0
    if option and gpus > 1:
        sent = planner.sent(option, gpus)
        text = f"sent by each GPU: {sent / 1e9:.3g} GB a step (docs/scaling.md)"
        if bandwidth:
            waiting = sent / bandwidth
            text += f", {waiting:.3g} s at {bandwidth / 1e9:g} GB/s"
        lines.append(text)
    if rate:
        each = config.train.batch_size / gpus / rate[0]                          # seconds of computing in a step
        fast, slow = (config.train.total_steps * s / 3600 for s in (max(each, waiting), each + waiting))
        lines.append(f"{rate[0]:.4g} images/s per GPU ({rate[1]}), {rate[0] * gpus:.4g} images/s on {gpus} GPUs"
                     f"{'' if waiting else ' if communication hides behind it'}: {fast:.3g} h"
                     + (f" if all communication hides behind it, {slow:.3g} h if none does" if waiting else ""))
        return lines, slow
    lines.append("no speed is known: give --measured RUN, or --throughput. Under an ASSUMED rate of each GPU:")
    for assumed in _ASSUMED:
        each = assumed * 1e12 / planner.flops
        lines.append(f"  {assumed} TFLOP/s: {each * gpus:.4g} images/s, {images / each / gpus / 3600:.3g} h")
    return lines, None
