"""Every ZeRO stage in fp32 and bf16, with and without momentum, hit by a gradient that is not finite on one process:
`deepspeed tests/faulty_gradients.py JOB.json`, where {"teacher": folder, "out": file} says what for and where to.

Writes {"STAGE DTYPE BETA1": [one [updates left out, weights changed, weights finite] after each update, of each
process]}.
"""

import copy
import itertools
import json
import sys
from pathlib import Path

from sidfast.common.environment import prepare_environment

prepare_environment()

import torch  # noqa: E402
from deepspeed import comm  # noqa: E402
from helpers_engine import optimize  # noqa: E402

from sidfast.config.schema import Adam, build_config  # noqa: E402
from sidfast.engines.engine import build_engine, compute_dtype, engine_config, gather, master_weights  # noqa: E402
from sidfast.teachers.load import load_teacher  # noqa: E402
from sidfast.training.launch import join  # noqa: E402


def weights(engine):
    return torch.cat([v.flatten() for v in gather(engine, master_weights(engine)).values()])


def updates(unet, stage, dtype, beta1, device):
    """Two micro-batches an update; in the second update the last process's second loss is infinite."""
    values = {"model": {"teacher": "x"}, "data": {"prompts": "shapes:train"},
              "train": {"steps": 1, "batch_size": 2 * comm.get_world_size(), "micro_batch": 1},
              "deepspeed": {"zero_optimization": {"stage": stage}} | ({dtype: {"enabled": True}} if dtype else {})}
    config = build_config(values, "test")
    section = engine_config(config, "generator", comm.get_world_size())
    engine = build_engine(copy.deepcopy(unet), Adam(lr=1e-3, beta1=beta1), section, device)
    x, text = (torch.randn(shape, dtype=compute_dtype(config.deepspeed)) for shape in ((1, 4, 8, 8), (1, 77, 16)))
    rows = []
    for update in range(4):
        before = weights(engine)
        faulty = update == 1 and comm.get_rank() == comm.get_world_size() - 1
        optimize(engine, lambda unet, x, text: unet(x, 5, text).sample.float().square().mean(), [(x, text)] * 2,
             [1.0, torch.inf if faulty else 1.0])
        after = weights(engine)
        rows.append([engine.skipped_steps, not torch.equal(before, after), bool(after.isfinite().all())])
    return rows


device, job, result = join(), json.loads(Path(sys.argv[-1]).read_text()), {}
unet = load_teacher(job["teacher"]).network
for dtype in ("", "bf16"):
    for stage, beta1 in itertools.product(range(4), (0.0, 0.5)):
        torch.manual_seed(comm.get_rank())
        everyone = [None] * comm.get_world_size()
        torch.distributed.all_gather_object(everyone, updates(unet, stage, dtype, beta1, device))
        result[f"{stage} {dtype or 'fp32'} {beta1}"] = everyone
if comm.get_rank() == 0:
    Path(job["out"]).write_text(json.dumps(result))
comm.barrier()
