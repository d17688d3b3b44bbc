"""How a run starts and ends: checked (preflight.py), its directory claimed, processes joined, trained, told of."""

import os
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
from deepspeed import comm
from torch.distributed import distributed_c10d

from sidfast.checkpoints.format import read_state
from sidfast.common.environment import omp_threads
from sidfast.common.errors import UserError, one_line, say, speaks, tell
from sidfast.common.records import read_evaluations
from sidfast.config.schema import Config
from sidfast.evaluation.metrics import title
from sidfast.monitoring.shutdown import Stop
from sidfast.runs.directory import is_complete
from sidfast.runs.lock import claimed
from sidfast.training.preflight import Plan, agree, check_config, preflight
from sidfast.training.trainer import train


def start(config: Config, out: str | Path, source: str, resume: str = "auto", profile: int = 0,
          imports: dict | None = None) -> None:
    """Start or resume the run that this process was started for; the process ends with it.

    `source`: names the configuration in messages; `resume` as for `open_run`; `profile`: steps to trace; `imports`: of
    `import_modules`. Raises UserError, with nothing written, and what `launch` does.
    """
    prompts = check_config(config, int(os.environ.get("WORLD_SIZE", 1)))
    with claimed(out, speaks()):
        plan = preflight(config, out, source, prompts, resume=resume, imports=imports)
        result = launch(plan, join(), Stop(last=True), profile)
        comm.destroy_process_group()
        if speaks():
            _report(plan.out, result)


def launch(plan: Plan, device: torch.device, stop: Stop | None = None, profile: int = 0) -> dict | None:
    """Train what `preflight` has let pass; a collective call of processes that have joined, inside `claimed`.

    `stop`: that of this run, for callers who ask it afterwards. Returns the final evaluation on the first process, or
    None. Raises what `agree` and `train` do.
    """
    plan = agree(plan, device)
    checkpoint, steps = plan.checkpoint, plan.config.train.total_steps
    tell(f"{'resuming from ' + str(checkpoint) if checkpoint else 'starting'}, run directory {plan.out}")
    step = read_state(checkpoint)["extra"]["step"] if checkpoint else 0
    if step >= steps:
        tell(f"the run is already at step {step} of {steps}: nothing is left to train")
        if _agreed(lambda: is_complete(plan.out, plan.config, step)):
            return read_evaluations(plan.out).get("end")
    stop = stop or Stop()
    stop.saves = plan.config.train.saves
    with stop:
        return train(plan, device, stop, profile)


def _agreed(question):
    """The first process's answer, on all of them."""
    answer = [comm.get_rank() == 0 and question()]
    torch.distributed.broadcast_object_list(answer)
    return answer[0]


def join() -> torch.device:
    """Join the other processes (or be the only one); returns this process's device. Raises UserError if another program
    has the port."""
    alone = os.environ.setdefault("WORLD_SIZE", "1") == "1"
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": "0" if alone else "29500"}.items():       # 0: any that is free
        os.environ.setdefault(name, value)
    gpu = torch.cuda.is_available()
    if not gpu:                                          # DeepSpeed's own collectives need a compiler; gloo needs none
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(_cpu_threads())
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    try:
        _meet("nccl" if gpu else "gloo", device)
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(f"port {os.environ['MASTER_PORT']} is taken on this machine, perhaps by another run: choose "
                        "another, as `deepspeed --master_port PORT` or MASTER_PORT=PORT") from None
    return device


def _meet(backend, device):
    """Wait for the others, then let collective calls take as long as they need: processes wait in one while the first
    measures, and one that hangs is Watchdog's to find, which can name it."""
    others, needed = timedelta(minutes=30), timedelta(days=30)
    # (DeepSpeed makes groups of its own, which take the defaults)
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = needed
    if not torch.distributed.is_initialized():           # (a process may have trained before)
        store, rank, processes = next(torch.distributed.rendezvous("env://", timeout=others))
        bound = {"device_id": device} if device.type == "cuda" and processes > 1 else {}     # (as DeepSpeed has it)
        torch.distributed.init_process_group(backend, timeout=needed, store=store, rank=rank, world_size=processes,
                                             **bound)
    deepspeed.init_distributed(backend, verbose=False, timeout=needed)


def _cpu_threads():
    """Threads of this process: OMP_NUM_THREADS, or its share of the cores (DeepSpeed's launcher sets LOCAL_SIZE,
    torchrun LOCAL_WORLD_SIZE). More of them than cores wait for each other for ever."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return omp_threads() or max(1, os.cpu_count() // local)


def _report(out, end):
    """Where things are, after the measures before and after (if there are any), on standard output."""
    if end:
        start = _measured_at_start(out)
        say(f"\n{end['images']} images, one step{'':<14}start      end")
        for key, value in end.items():
            if isinstance(value, float) and not key.startswith("accuracy_"):
                before = start.get(key)
                say(f"{title(key):<34}{'' if before is None else f'{before:.4f}':>9}{value:>9.4f}")
    folders = [f"{name}: {out / name}" for name in ("export", "samples") if (out / name).is_dir()]
    say("\n" + "   ".join([*folders, f"report: {out / 'report.html'}"]))


def _measured_at_start(out):
    try:
        return read_evaluations(out).get("start", {})    # (a full disk may have left it out)
    except UserError as error:
        tell(one_line(error))
        return {}
