"""Several training runs one after the other in one set of processes: `deepspeed tests/jobs.py JOBS.json`.

JOBS.json: a list of {"config": nested dictionaries, "out": folder, "resume": "auto" or a checkpoint}.
"""

import json
import sys
from pathlib import Path

from sidfast.common.environment import prepare_environment

prepare_environment()

import torch  # noqa: E402

from sidfast.checkpoints.store import choose_checkpoint  # noqa: E402
from sidfast.config.schema import build_config  # noqa: E402
from sidfast.monitoring.shutdown import Stop  # noqa: E402
from sidfast.runs.directory import open_run  # noqa: E402
from sidfast.runs.lock import claimed  # noqa: E402
from sidfast.teachers.load import load_teacher  # noqa: E402
from sidfast.train import join  # noqa: E402
from sidfast.training.trainer import train  # noqa: E402

device = join()
for job in json.loads(Path(sys.argv[-1]).read_text()):
    config = build_config(job["config"], "job")
    with claimed(job["out"], torch.distributed.get_rank() == 0):
        open_run(job["out"], config, job.get("resume", "auto"))
        torch.distributed.barrier()                      # (the first process writes nothing before all have looked)
        checkpoint = choose_checkpoint(job["out"], job.get("resume", "auto"), print)
        stop = Stop()
        train(config, Path(job["out"]), checkpoint, load_teacher(config.model.teacher), device, stop)
        stop.close()
