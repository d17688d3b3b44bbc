"""Several training runs one after the other in one set of processes: `deepspeed tests/jobs.py JOBS.json`.

JOBS.json: a list of {"config": nested dictionaries, "out": folder, "resume": "auto" or a checkpoint}.
"""

import json
import sys
from pathlib import Path

from sidfast.common.environment import prepare_environment

prepare_environment()

import torch  # noqa: E402

from sidfast.config.schema import build_config  # noqa: E402
from sidfast.runs.lock import claimed  # noqa: E402
from sidfast.training.launch import join, launch  # noqa: E402
from sidfast.training.preflight import check_config, preflight  # noqa: E402

device = join()
for job in json.loads(Path(sys.argv[-1]).read_text()):
    config = build_config(job["config"], "job")
    prompts = check_config(config, torch.distributed.get_world_size())
    with claimed(job["out"], torch.distributed.get_rank() == 0):
        launch(preflight(config, job["out"], "job", prompts, resume=job.get("resume", "auto")), device)
