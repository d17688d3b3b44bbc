"""Checkpoints (sidfast/checkpoints/store.py) without a run."""

from safetensors.torch import save_file

from sidfast.checkpoints.format import FORMAT, file_name
from sidfast.checkpoints.store import checksum, complete, step_folder

NETWORKS = ("generator", "fake_score")
EXTRA = {"images": 0, "logged": 0, "sums": [[0.0, 0.0, 0.0]], "skipped": 0, "in_a_row": dict.fromkeys(NETWORKS, 0)}
STATE = {"format": FORMAT, "engines": {name: {"optimizer_step": 1, "loss_scale": {}} for name in NETWORKS}}
KINDS = (("generator", "weights"), ("generator", "exp_avg_sq"), ("generator", "ema"), ("fake_score", "weights"),
         ("fake_score", "exp_avg_sq"))


def write_checkpoint(folder, step, tensors, ranks=1, run=None):
    """A whole one, as `ranks` processes leave it, with the same tensors for all that it holds; `run`: of
    `describe_run`, or None as in older versions."""
    partial, names = step_folder(folder, step, partial=True), sorted(tensors)
    partial.mkdir(parents=True)
    for network, kind in KINDS:
        for rank in range(ranks):
            save_file({name: tensors[name] for name in names[rank::ranks]},
                      partial / file_name(network, kind, rank, ranks))
    files = {f.name: {"bytes": f.stat().st_size, "sha256": checksum(f)} for f in partial.iterdir()}
    complete(folder, step, STATE | {"step": step, "extra": EXTRA | {"step": step}, "files": files, "run": run}, keep=9)
    return step_folder(folder, step)
