"""The configuration of a run: a small JSON file that names what differs from the defaults.

Every key is typed and explained here; unknown keys are errors. The `deepspeed` section is DeepSpeed's own (its keys:
config/deepspeed.py) and is passed through as it stands, once for each engine.
"""

import copy
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from sidfast.common.errors import UserError
from sidfast.common.explain import explain, first_fault
from sidfast.common.parse import check_finite, parse_json
from sidfast.common.records import Measure
from sidfast.common.shipped import find_config, shipped
from sidfast.config.deepspeed import check_deepspeed
from sidfast.config.sections import Noise, Section, Synthetic
from sidfast.method.synthetic import capture_blocker

Side = Annotated[int, Field(ge=8, le=16384)]


class Model(Section):
    """The teacher, which also gives generator and fake score their architecture and first weights."""

    teacher: str = Field(description="folder of a diffusers pipeline, or a hub id")
    variant: Annotated[str, Field(pattern=r"^\w+$")] | None = Field(
        None, description="of the teacher's weights, such as fp16 (*.fp16.safetensors), where a part has it; default: "
                          "the plain ones, or else the only variant there is")
    revision: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="branch, tag or commit of a teacher on the hub; default: main")
    scheduler: dict[str, bool | int | float | str | None] = Field(
        {}, description="values in the place of those of the teacher's scheduler_config.json, which is wrong in some "
                        "fine-tuned models")
    resolution: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] | None = Field(
        None, description="pixels, one number or [height, width]; default: the teacher's own")

    @property
    def loading(self):
        """The options of `load_teacher`."""
        return {"variant": self.variant, "revision": self.revision, "scheduler": self.scheduler}


class Guidance(Section):
    """Guidance scales (method.md, section 2): kappa1 trains the fake score, kappa2 and kappa3 evaluate it, kappa4
    evaluates the teacher."""

    kappa1: Measure = Field(1.5, description="of the fake score, in its own update")
    kappa2: Measure = Field(1.5, description="of the fake score, in the generator's update: the gap to the teacher")
    kappa3: Measure = Field(1.5, description="of the fake score, in the generator's update: the gap to the image")
    kappa4: Measure = Field(1.5, description="of the teacher")
    prompt_dropout: float = Field(0.1, ge=0, lt=1, description="share of empty prompts while the fake score trains, "
                                                               "if kappa1, kappa2 or kappa3 is not 1")


class Loss(Section):
    """The generator's loss (eq. 8)."""

    alpha: float = Field(1.0, description="1 - alpha is the weight of the squared gap of teacher and fake score")


class Data(Section):
    """Prompts. There are no images."""

    prompts: str = Field(description="UTF-8 text file, one prompt a line, or a table (.jsonl, .json, .csv, .tsv, "
                                     ".parquet), also as .gz; or shapes:train, the shapes world")
    prompts_column: str | None = Field(None, description="of a table: its column of prompts; the one called caption, "
                                                         "prompt, text or description unless given")


class Train(Section):
    """The loop. An image is one image per update of each network; a step is one update of each."""

    steps: int | None = Field(None, ge=1, le=10**12, description="iterations; give this or images")
    images: int | None = Field(None, ge=1, le=10**12, description="training images in all, rounded up to whole steps")
    batch_size: int = Field(512, ge=1, le=10**7, description="images per update, over all GPUs and accumulation steps")
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        4, description="images per GPU and pass; auto: the most that fit, up to 32, as measured at start")
    fake_score_factor: int = Field(1, ge=1, description="the fake score's update takes so many micro-batches' images "
                                                        "in a pass: fewer networks keep activations in it")
    seed: int = Field(0, ge=0, description="of prompts, noise and timesteps")
    log_every: int = Field(10, ge=0, description="steps between lines of metrics.jsonl; 0 for one at the end alone")
    save_every: int = Field(500, ge=0, description="steps between checkpoints, and exports with them; 0 for none")
    save_minutes: float = Field(0, ge=0, description="minutes after which a checkpoint is due in any case; 0 for never")
    keep: int = Field(2, ge=1, description="checkpoints kept")
    hang_timeout: float = Field(1800, gt=0, description="seconds without progress after which a process is taken to "
                                                        "hang and the run ends")
    max_skipped: int = Field(50, ge=1, description="updates of a network in a row left out for a gradient that is not "
                                                   "finite, after which the run ends (fp16 needs a dozen to find its "
                                                   "loss scale)")
    spike: float | None = Field(10, gt=1, description="a loss above this multiple of its running median is written to "
                                                      "spikes.jsonl; null for never")
    sample_every: int = Field(500, ge=0, description="steps between sample grids; 0 for those of start and end alone")
    samples: int = Field(8, ge=0, description="images in a sample grid; 0 for none")
    tracker: Literal["wandb"] | None = Field(
        None, description="another place for numbers, samples and configuration besides metrics.jsonl and TensorBoard: "
                          "wandb, Weights & Biases (pip install 'sidfast[wandb]')")

    @model_validator(mode="after")
    def _consistent(self):
        if (self.steps is None) == (self.images is None):
            raise ValueError("give one of train.steps and train.images")
        known = 1 if self.micro_batch == "auto" else self.micro_batch
        if self.batch_size % (known * self.fake_score_factor):
            raise ValueError(f"train.batch_size ({self.batch_size}) must be a multiple of train.micro_batch "
                             f"({self.micro_batch}){self._times}")
        return self

    @property
    def _times(self):
        return f" x train.fake_score_factor ({self.fake_score_factor})" if self.fake_score_factor > 1 else ""

    def images_at_once(self, update):
        """Images per GPU and pass of an update, "fake_score" or "generator"; 1 stands for "auto"."""
        images = 1 if self.micro_batch == "auto" else self.micro_batch
        return images * (self.fake_score_factor if update == "fake_score" else 1)

    @property
    def saves(self):
        """Whether there are any checkpoints."""
        return bool(self.save_every or self.save_minutes)

    @property
    def total_steps(self):
        """Iterations of the whole run."""
        return self.steps if self.steps is not None else -(-self.images // self.batch_size)


class Adam(Section):
    """Adam for one network (section 8)."""

    lr: float = Field(1e-6, gt=0, description="learning rate")
    beta1: float = Field(0.0, ge=0, lt=1, description="decay of the first moment; with 0 none is stored")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")
    eps: float | None = Field(None, gt=0, description="1e-8, or 1e-6 in fp16, unless given")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    decay: int = Field(0, ge=0, description="steps of linear decay to zero at the end of the run")


class Optimizer(Section):
    """One optimizer for each trained network."""

    generator: Adam = Adam()
    fake_score: Adam = Adam()


class Ema(Section):
    """The average of the generator that is sampled and exported: half-life min(half_life, ramp_up * images seen)."""

    half_life: float = Field(50_000, ge=0, description="images")
    ramp_up: float | None = Field(0.05, gt=0, description="share of the images seen; null for no ramp-up")


class Speed(Section):
    """How the networks run."""

    tf32: bool = Field(True, description="TensorFloat-32 in fp32 matrix products on a GPU")
    fused: bool | Literal["auto"] = Field("auto", description="the UNet on the fused kernels; auto: on a GPU, if they "
                                                             "cover the teacher")
    cuda_graphs: bool | Literal["auto"] = Field(
        "auto", description="replay each update's forward and backward pass as CUDA graphs; auto: on a GPU, unless "
                           "deepspeed.zero_optimization.stage is 3, which moves parameters about in memory")
    overlap: bool | Literal["auto"] = Field(
        "auto", description="run teacher and fake score at the same time in the generator's update, with memory of "
                           "their own; auto: if there are CUDA graphs and no gradient_checkpointing")
    compile: bool = Field(False, description="torch.compile by regions, in place of the fused kernels")
    attention: Literal["auto", "cudnn", "flash", "xformers", "efficient", "math"] = Field(
        "auto", description="of the fused kernels; auto: time them at start, check them, take the fastest")
    share_generator_forward: bool = Field(False, description="train the fake score on the images of the generator's "
                                                             "own update: one pass of the generator less; the "
                                                             "generator's update then comes first")
    gradient_checkpointing: bool = Field(False, description="compute activations again in backward: less memory")


class Evaluation(Section):
    """Measures at the start and at the end of a run, on its average; the keys are the options of `sidfast evaluate`
    (docs/evaluation.md). The first process measures, the others wait."""

    images: int = Field(0, ge=0, description="how many; 0 for no evaluation")
    every: int = Field(0, ge=0, description="steps between further evaluations, for curves; 0 for none. None is made "
                                      "within a tenth of that before the end, which is measured anyway")
    best: str | None = Field(None, description="the metric by which RUN/best keeps the best generator so far, as it is "
                                               "called in evaluation.json; FID unless given")
    teacher: bool = Field(False, description="measure the teacher too, in 50 steps at guidance.kappa4")
    batch_size: int | None = Field(None, ge=1, description="images at once; 250 of 64 x 64 pixels, or as many as have "
                                                           "as many pixels, unless given")
    metrics: str | None = Field(None, description="with commas; fid,clip, for the shapes world fid,clip,accuracy")
    prompts: str | None = Field(None, description="file, one prompt a line; the held-out captions of the shapes world, "
                                                  "if that is trained on, unless given")
    prompts_column: str | None = Field(None, description="as data.prompts_column, of evaluation.prompts")
    seeds_per_prompt: int = Field(1, ge=1, le=10**9, description="images of each prompt; diversity needs 2 or more")
    reference: str | None = Field(None, description="folder of real images, or an .npz with mu and sigma; the shapes "
                                                    "world is drawn")
    features: str | None = Field(None, description="inception:FILE, or clip: and a folder or hub id; the shapes world "
                                                   "has its own")
    clip: str | None = Field(None, description="folder or hub id of the CLIP of the CLIP score; the shapes world has "
                                               "its own")
    resize: int | None = Field(None, ge=1, le=16384, description="side to which images are brought first, in pixels")
    filter: Literal["bicubic", "bilinear", "lanczos"] = Field("bicubic", description="of resize, antialiased")
    assets: str = Field("assets", description="folder with the clip and checker of `sidfast teacher`")


class Config(Section):
    """All of it."""

    model: Model
    data: Data
    train: Train
    guidance: Guidance = Guidance()
    loss: Loss = Loss()
    noise: Noise = Noise()
    synthetic: Synthetic = Synthetic()
    optimizer: Optimizer = Optimizer()
    ema: Ema = Ema()
    speed: Speed = Speed()
    evaluation: Evaluation = Evaluation()
    deepspeed: dict[str, Any] = Field({}, description="DeepSpeed's own section, for both engines; `generator` and "
                                                      "`fake_score` inside it hold what differs")

    @model_validator(mode="after")
    def _consistent(self):
        check_finite(self.deepspeed, "deepspeed")
        if self.evaluation.images and self.evaluation.prompts is None and not self.data.prompts.startswith("shapes:"):
            raise ValueError("evaluation.images needs evaluation.prompts, a file, outside the shapes world")
        if self.synthetic.prompt_share is not None and self.data.prompts.startswith("shapes:"):
            raise ValueError("synthetic.prompt_share needs a file of prompts: the shapes world has no end. Give "
                             "synthetic.unique_prompts")
        uncaptured = capture_blocker(self.synthetic)
        if self.speed.cuda_graphs is True and uncaptured:
            raise ValueError(f"speed.cuda_graphs: impossible, {uncaptured}; leave it at auto")
        other = self.synthetic.source != "generator" or self.synthetic.teacher_share
        if self.speed.share_generator_forward and other:
            raise ValueError("speed.share_generator_forward: the fake score's images are the generator's then; leave "
                             "synthetic.source and synthetic.teacher_share at their defaults")
        check_deepspeed(self.deepspeed)
        return self


def load_config(path, overrides=()):
    """Read a configuration file and apply `section.key=value` overrides (values as JSON, or else as plain text).

    `path`: as `find_config` takes it. In the result, names of the package's own assets are whole paths. Raises
    UserError, naming file and key, for whatever is wrong with either.
    """
    path = Path(find_config(str(path)))
    values = read_values(path)
    for override in overrides:
        _override(values, override)
    return with_own_assets(build_config(values, path, overrides))


def with_own_assets(config):
    """A Config with the places of the package's own assets for names of them (`shipped`)."""
    return config.model_copy(update={
        "model": config.model.model_copy(update={"teacher": shipped(config.model.teacher)}),
        "evaluation": config.evaluation.model_copy(update={"assets": shipped(config.evaluation.assets)})})


def read_values(path):
    """The nested dictionaries of a configuration file. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:               # (ValueError: not UTF-8, or no possible name of a file)
        raise UserError(f"{path}: cannot be read ({error})") from None
    values = parse_json(text, path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a JSON object of sections")
    return values


def build_config(values, source, overrides=()):
    """A Config from nested dictionaries; `source` names them in messages, and where they are at fault the `overrides`
    among them. Keys of older versions count as what they are called now (renamed.json). Raises UserError."""
    try:
        return Config.model_validate(_renamed(values, source))
    except RecursionError:
        raise UserError(f"{source}: sections are nested too deep") from None
    except ValidationError as error:
        message = explain(error, Config)
        raise UserError(f"{_at_fault(first_fault(error), message, overrides) or source}: {message}") from None


def _at_fault(fault, message, overrides):
    """The option --set behind a fault: the last whose key is at fault, or is named by the message; None without any."""
    place = ".".join(str(part) for part in fault["loc"])
    for text in reversed(overrides):
        key = text.partition("=")[0]
        unknown = fault["type"] == "extra_forbidden" and f"{key}.".startswith(f"{place}.")
        if unknown or f"{place}.".startswith(f"{key}."):
            return f"--set {text}"
    for text in reversed(overrides):
        parts = text.partition("=")[0].split(".")
        named = "|".join(re.escape(".".join(parts[:n])) for n in range(2, len(parts) + 1))
        if named and re.search(rf"(?<![\w.])({named})(?![\w.])", message):
            return f"--set {text}"
    return None


def _renamed(values, source):
    """The values with the keys of older versions under their new names; null stands for none of these."""
    if not isinstance(values, dict):
        return values
    values = copy.deepcopy(values)
    for old, new in json.loads(Path(__file__).with_name("renamed.json").read_text()).items():
        section, _, key = old.rpartition(".")
        place = values.get(section)
        if isinstance(place, dict) and key in place:
            value = place.pop(key)
            if value is not None:
                set_key(values, new, value, str(source))
    return values


def _override(values, text):
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"--set {text}: must be section.key=value")
    try:
        json.loads(value)
    except (ValueError, RecursionError):
        value = json.dumps(value)                        # plain text needs no quotes
    set_key(values, key, parse_json(value, f"--set {text}"), f"--set {text}")


def set_key(values, key, value, source):
    """Set `section.key` in nested dictionaries. Raises UserError, naming the source, for a section that is none."""
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"{source}: {section} is not a section")
    values[last] = value
