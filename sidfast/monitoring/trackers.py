"""Where a run's numbers, samples and configuration can be looked at besides its own files: TensorBoard, and another.

A tracker is told of `scalars`, `image` and `close`. What it cannot write it raises as OSError.
"""

import hashlib
import json
import os
from contextlib import contextmanager

import numpy as np

from sidfast.common.errors import UserError
from sidfast.common.extras import need

_GROUPS = {
    "loss": ("fake_score_loss", "generator_loss"), "speed": ("images_per_s", "tflops_per_gpu", "share_of_peak"),
    "memory": ("allocated_gib", "peak_gib", "reserved_gib", "host_peak_gib"), "progress": ("images", "skipped_updates"),
    "non_finite": ("non_finite",)}
_TAGS = {key: f"{group}/{key}" for group, keys in _GROUPS.items() for key in keys} | {
    "fake_score_loss": "loss/fake_score", "generator_loss": "loss/generator", "non_finite": "non_finite/all"}


def tag(key):
    """The name of a key of metrics.jsonl in a tracker: a group, and what it is in it."""
    return _TAGS.get(key, key)


def check_tracker(name):
    """Raise UserError if the tracker of a configuration, or None, cannot be had here."""
    if name is not None:
        need(name, name, f"train.tracker: {name}")


def open_trackers(name, out, config, step, started):
    """The trackers of a run that begins, or goes on, at `step`: TensorBoard, and that called `name` unless it is None.

    `out`: the run directory; `config`: nested dictionaries; `started`: of the run's first start, or None. Raises
    UserError for a tracker that refuses.
    """
    others = [] if name is None else [Wandb(out, config, started)]
    return [TensorBoard(out / "tensorboard", config, step), *others]


class TensorBoard:
    """Events in a folder. Those of steps after the first one are dropped, as they will come again."""

    name = "TensorBoard's events"

    def __init__(self, folder, config, step):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        text = json.dumps(config, indent=2)
        self._writer.add_text("configuration", "    " + text.replace("\n", "\n    "), step)      # (Markdown's code)

    def scalars(self, step, values):
        """Numbers {key of metrics.jsonl: value} of a step."""
        for key, value in values.items():
            self._writer.add_scalar(tag(key), value, step)

    def image(self, step, picture):
        """The sample grid of a step, a PIL image."""
        self._writer.add_image("samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self):
        """Write what is still held."""
        self._writer.close()


class Wandb:
    """Weights & Biases; its own environment variables say where (WANDB_PROJECT, WANDB_MODE, ...). A run directory is
    one run there, however often it was started."""

    name = "Weights & Biases' record"

    def __init__(self, out, config, started):
        self._library = need("wandb", "wandb", "train.tracker: wandb")
        identity = hashlib.sha256(f"{out.resolve()}\0{started}".encode(errors="surrogateescape")).hexdigest()[:16]
        try:
            self._run = self._library.init(project=os.environ.get("WANDB_PROJECT", "sidfast"), name=out.resolve().name,
                                           id=identity, resume="allow", dir=str(out), config=config)
            self._run.define_metric("*", step_metric="step")                     # (steps may come again)
        except Exception as error:                       # the library raises its own, and the network's
            raise UserError(f"train.tracker: wandb does not start ({_reason(error)})") from None

    def scalars(self, step, values):
        """As TensorBoard's."""
        with _as_os_error():
            self._run.log({tag(key): value for key, value in values.items()} | {"step": step})

    def image(self, step, picture):
        """As TensorBoard's."""
        with _as_os_error():
            self._run.log({"samples": self._library.Image(picture), "step": step})

    def close(self):
        """Send what is still held."""
        with _as_os_error():
            self._run.finish()


@contextmanager
def _as_os_error():
    try:
        yield
    except Exception as error:                           # (any kind: training goes on without)
        raise OSError(_reason(error)) from None


def _reason(error):
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
