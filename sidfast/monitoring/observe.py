"""What a run tells of itself while it trains (docs/observability.md): time per phase, rates, memory, gradients.

A phase is timed by CUDA events on a GPU, which the host reads at the log interval and never waits for in between, and
by the clock on a CPU. Phases are also `record_function` ranges, so a trace (`--profile`) shows them under the same
names.
"""

import math
import resource
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from sidfast.common.files import sweep, temporary_folder
from sidfast.engines.adam import Checked, total_norm
from sidfast.engines.engine import loss_scale

GIB = 2**30
# Dense TFLOP/s of the tensor cores as the makers state them: (bf16 and fp16, tf32).
PEAKS = {"H200": (989.4, 494.7), "H100 PCIe": (756.4, 378.2), "H100 NVL": (835.5, 417.7), "H100": (989.4, 494.7),
         "A100": (312.0, 156.0), "L40S": (362.05, 183.0), "A10G": (70.0, 35.0)}


def peak_tflops(name, dtype, tf32=True):
    """The peak dense TFLOP/s of a GPU by its name for products in `dtype`, or None where PEAKS does not tell: another
    GPU, or fp32 without `tf32`."""
    for key, (half, single) in PEAKS.items():
        if all(word in name for word in key.split()):
            return half if dtype in (torch.bfloat16, torch.float16) else single if tf32 else None
    return None


class PhaseTimer:
    """Adds up the time of phases: `with clock("data"): ...`. A phase inside another is taken out of that one's time."""

    def __init__(self, device):
        self.gpu = device.type == "cuda"
        self._pending, self._open = [], []

    @contextmanager
    def __call__(self, phase):
        """The block is a phase of that name, for `read` and in traces."""
        with torch.profiler.record_function(phase):
            outer = self._open[-1] if self._open else None
            self._open.append(phase)
            start = self._now()
            try:
                yield
            finally:
                self._open.pop()
                self._pending.append((phase, outer, start, self._now()))

    def read(self):
        """{phase: seconds} since the last call; waits for the GPU once."""
        if self.gpu and self._pending:
            self._pending[-1][3].synchronize()
        seconds = {}
        for phase, outer, start, end in self._pending:
            spent = start.elapsed_time(end) / 1000 if self.gpu else end - start
            seconds[phase] = seconds.get(phase, 0.0) + spent
            if outer:
                seconds[outer] = seconds.get(outer, 0.0) - spent
        self._pending = []
        return seconds

    def module(self, module, phase):
        """Every forward pass of a module becomes a phase."""
        running = []

        def begin(*_):
            running.append(self(phase))
            running[-1].__enter__()

        def end(*_):
            running.pop().__exit__(None, None, None)     # (what a hook returns would replace the output)

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)

    def _now(self):
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Monitor:
    """Collects what metrics.jsonl tells of one process's work; `read` makes flat values of it at the log interval.

    `flops`: of one training image, or None; `batch_size`: the global one; `dtype`, `tf32`: of the arithmetic, for its
    peak; `clock` times whatever the trainer passes through it.
    """

    def __init__(self, engines, text_encoders, device, dtype, batch_size, processes, flops=None, tf32=True):
        self.engines, self.device, self.clock = engines, device, PhaseTimer(device)
        self.batch_size, self.processes, self.flops = batch_size, processes, flops
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak, self._norms = peak_tflops(name, dtype, tf32), {}
        for text_encoder in text_encoders:
            self.clock.module(text_encoder, "text")
        for label, engine in engines.items():
            self._watch_step(label, engine)

    def read(self, steps, seconds):
        """{key: value} for one log line (keys and units: docs/observability.md): `steps` steps in `seconds` of training
        alone, since the last line. Every process may call it."""
        rate = steps * self.batch_size / seconds
        values = {"images_per_s": rate}
        if self.flops:
            tflops = rate * self.flops / 1e12 / self.processes
            values |= {"tflops_per_gpu": tflops, "share_of_peak": tflops / self.peak if self.peak else None}
        values |= {f"seconds/{phase}": spent / steps for phase, spent in self.clock.read().items()}
        for label, engine in self.engines.items():
            values[f"learning_rate/{label}"] = float(engine.basic_optimizer.param_groups[0]["lr"])
            norm = self._norm(label)
            if norm is not None:
                values[f"gradient_norm/{label}"] = norm
            if engine.fp16_enabled():
                values[f"loss_scale/{label}"] = loss_scale(engine)
        return values | memory(self.device)

    def _watch_step(self, label, engine):
        """The optimizer's step becomes a phase; what keeps no norm of the unclipped gradient gets it here."""
        step, plain = engine.step, isinstance(engine.optimizer, torch.optim.Optimizer)
        plain = plain and (engine.gradient_clipping() > 0 or not isinstance(engine.optimizer, Checked))

        def watched(*args, **kwargs):
            if not engine.is_gradient_accumulation_boundary():
                return step(*args, **kwargs)
            with self.clock(f"{label}_optimizer"):
                if plain:
                    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
                    self._norms[label] = total_norm(grads)
                return step(*args, **kwargs)

        engine.step = watched

    def _norm(self, label):
        norm = self._norms.get(label, self.engines[label].get_global_grad_norm())
        norm = None if norm is None else float(norm)
        return norm if norm is not None and math.isfinite(norm) else None


def memory(device):
    """Of this process in GiB: on the GPU allocated now, at the most since the last call, and reserved; on the host."""
    scale = 1024 if sys.platform != "darwin" else 1      # (ru_maxrss is in KiB on Linux, in bytes on macOS)
    values = {"host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / GIB}
    if device.type == "cuda":
        values |= {"allocated_gib": torch.cuda.memory_allocated(device) / GIB,
                   "peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
                   "reserved_gib": torch.cuda.memory_reserved(device) / GIB}
    return values


class Profiler:
    """A Chrome trace of `steps` steps after `warm_up`, written to `folder`; does nothing if `steps` is 0.

    `run`: the RunDirectory on the first process, whose steps are traced; None on others.
    """

    def __init__(self, steps, folder, device, run, warm_up=3):
        self._profile, self._folder, self._run, self._warm_up = None, Path(folder), run, warm_up
        if not steps or run is None:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(
            activities=activities, record_shapes=True,
            schedule=torch.profiler.schedule(wait=warm_up - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write)
        self._profile.start()

    def step(self):
        """Call after every training step."""
        if self._profile is not None:
            self._profile.step()

    def close(self):
        """At the end of the run; a run too short to warm up leaves no trace."""
        if self._profile is not None:
            self._profile.stop()

    def _write(self, profile):
        steps = profile.step_num - self._warm_up
        if not steps:                                    # (the run ended as it was warm)
            return
        with self._run.attempt("the trace"):
            self._folder.mkdir(parents=True, exist_ok=True)
            sweep(self._folder, age=0)
            with temporary_folder(self._folder) as folder:           # (Kineto opens what it writes by name)
                partial = folder / "trace.json"
                try:
                    profile.export_chrome_trace(str(partial))
                except RuntimeError as error:
                    raise OSError(str(error).partition("\n")[0]) from None
                if not partial.is_file():                # how Kineto, which raises nothing, leaves a full disk
                    raise OSError("PyTorch's profiler found no room, or another fault,")
                partial.replace(self._folder / f"trace-{steps}-steps.json")
