"""The configuration of a run: a small JSON file that names what differs from the defaults.

Every key is typed and explained here; unknown keys are errors. The `deepspeed` section is DeepSpeed's own and is passed
through as it stands, once for each engine.
"""

import difflib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sidfast.errors import UserError
from sidfast.method.noise import DENSITIES


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(Section):
    """The teacher, which also gives generator and fake score their architecture and first weights."""

    teacher: str = Field(description="folder of a diffusers pipeline, or a hub id")
    resolution: int | None = Field(None, ge=8, description="pixels; the teacher's own unless given")


class Guidance(Section):
    """Guidance scales (method.md, section 2): kappa1 trains the fake score, kappa2 and kappa3 evaluate it, kappa4
    evaluates the teacher."""

    kappa1: float = 1.5
    kappa2: float = 1.5
    kappa3: float = 1.5
    kappa4: float = 1.5
    prompt_dropout: float = Field(0.1, ge=0, lt=1, description="share of empty prompts while the fake score trains, "
                                                               "if kappa1, kappa2 or kappa3 is not 1")


class Loss(Section):
    """The generator's loss (eq. 8)."""

    alpha: float = 1.0


class Noise(Section):
    """Noise levels at which the scores are compared (section 6), and the generator's starting level (eq. 4)."""

    density: Literal[tuple(DENSITIES)] = "ddpm"
    t_min: int = Field(20, ge=0, description="smallest timestep drawn")
    t_max: int = Field(979, ge=1, description="largest timestep drawn")
    t_init: int = Field(625, ge=1, description="timestep at which the generator starts")
    mean: float | None = Field(None, description="edm: of ln sigma; laplace: of logSNR")
    std: float | None = Field(None, gt=0, description="edm: of ln sigma")
    scale: float | None = Field(None, gt=0, description="laplace: of logSNR")
    shift: float | None = Field(None, gt=0, description="logit_normal: factor on sigma")
    rho: float | None = Field(None, gt=0, description="karras: exponent")

    @property
    def options(self):
        """The density's own options that were given."""
        names = ("mean", "std", "scale", "shift", "rho")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @model_validator(mode="after")
    def _consistent(self):
        if self.t_min >= self.t_max:
            raise ValueError(f"noise.t_min ({self.t_min}) must be below noise.t_max ({self.t_max})")
        for name in self.options:
            if name not in DENSITIES[self.density]:
                raise ValueError(f"noise.{name} has no meaning for density {self.density!r}")
        return self


class Data(Section):
    """Prompts. There are no images."""

    prompts: str = Field(description="UTF-8 text file, one prompt a line; or shapes:train, the shapes world")


class Train(Section):
    """The loop. An image is one image per update of each network; a step is one update of each."""

    steps: int | None = Field(None, ge=1, description="iterations; give this or images")
    images: int | None = Field(None, ge=1, description="training images in all, rounded up to whole steps")
    batch_size: int = Field(512, ge=1, description="images per update, over all GPUs and accumulation steps")
    micro_batch: int = Field(4, ge=1, description="images per GPU and pass")
    seed: int = Field(0, ge=0)
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    save_every: int = Field(500, ge=0, description="steps between checkpoints, and exports with them; 0 for none")
    keep: int = Field(2, ge=1, description="checkpoints kept")
    sample_every: int = Field(500, ge=1, description="steps between sample grids")
    samples: int = Field(8, ge=0, description="images in a sample grid; 0 for none")

    @model_validator(mode="after")
    def _consistent(self):
        if (self.steps is None) == (self.images is None):
            raise ValueError("give one of train.steps and train.images")
        if self.batch_size % self.micro_batch:
            raise ValueError(f"train.batch_size ({self.batch_size}) must be a multiple of train.micro_batch "
                             f"({self.micro_batch})")
        return self

    @property
    def total_steps(self):
        return self.steps if self.steps is not None else -(-self.images // self.batch_size)


class Adam(Section):
    """Adam for one network (section 8)."""

    lr: float = Field(1e-6, gt=0)
    beta1: float = Field(0.0, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
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
    compile: bool = Field(False, description="torch.compile by regions, in place of the fused kernels")
    attention: Literal["auto", "cudnn", "flash", "xformers", "efficient", "math"] = Field(
        "auto", description="of the fused kernels; auto: time them at start, check them, take the fastest")
    gradient_checkpointing: bool = Field(False, description="compute activations again in backward: less memory")


class Evaluation(Section):
    """Measures on the shapes world, at the start and at the end of a run."""

    images: int = Field(0, ge=0, description="held-out captions; 0 for no evaluation")
    every: int = Field(0, ge=0, description="steps between further evaluations, for curves; 0 for none")
    teacher: bool = Field(False, description="measure the teacher too, in 50 steps at guidance.kappa4")
    batch_size: int = Field(250, ge=1)
    assets: str = Field("assets", description="folder with the clip and checker of `sidfast teacher`")


class Config(Section):
    """All of it."""

    model: Model
    data: Data
    train: Train
    guidance: Guidance = Guidance()
    loss: Loss = Loss()
    noise: Noise = Noise()
    optimizer: Optimizer = Optimizer()
    ema: Ema = Ema()
    speed: Speed = Speed()
    evaluation: Evaluation = Evaluation()
    deepspeed: dict[str, Any] = Field({}, description="DeepSpeed's own section, for both engines; `generator` and "
                                                      "`fake_score` inside it hold what differs")

    @model_validator(mode="after")
    def _consistent(self):
        if self.evaluation.images and not self.data.prompts.startswith("shapes:"):
            raise ValueError("evaluation.images needs the shapes world (data.prompts = shapes:train)")
        ours = {"train_batch_size": "train.batch_size", "train_micro_batch_size_per_gpu": "train.micro_batch",
                "gradient_accumulation_steps": "train.batch_size", "optimizer": "optimizer",
                "scheduler": "optimizer.generator.warmup"}
        for engine in ("", "generator", "fake_score"):
            section = self.deepspeed.get(engine, {}) if engine else self.deepspeed
            name = f"deepspeed.{engine}" if engine else "deepspeed"
            if not isinstance(section, dict):
                raise ValueError(f"{name}: must be a section, not {section!r}")
            for key in ("bf16", "fp16", "zero_optimization"):
                if not isinstance(section.get(key, {}), dict):
                    raise ValueError(f"{name}.{key}: must be a section, not {section[key]!r}")
            for key, instead in ours.items():
                if key in section:
                    raise ValueError(f"{name}.{key} follows from the rest; set {instead} instead")
        return self


def load_config(path, overrides=()):
    """Read a configuration file and apply `section.key=value` overrides (values as JSON, or else as plain text).

    Raises UserError, naming file and key, for whatever is wrong with either.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a JSON object of sections")
    for override in overrides:
        _override(values, override)
    return build_config(values, path)


def build_config(values, source):
    """A Config from nested dictionaries; `source` names them in messages. Raises UserError."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error.errors()[0])}") from None


def _override(values, text):
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"--set {text}: must be section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {text}: {section} is not a section")
    try:
        values[last] = json.loads(value)
    except json.JSONDecodeError:
        values[last] = value


def _explain(error):
    """One line out of one of pydantic's errors."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = _nearest(error["loc"])
        return f"unknown key {key}" + (f"; did you mean {near}?" if near else "")
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{key}: {message}, not {error['input']!r}"


def _nearest(location):
    """The valid key most like an unknown one: in its own section, or in any."""
    keys = list(_keys(Config))
    siblings = [k for k in keys if k.split(".")[:-1] == [str(p) for p in location[:-1]]]
    name = str(location[-1])
    for candidates in (siblings, keys):
        by_name = {}
        for key in candidates:
            by_name.setdefault(key.split(".")[-1], key)
        match = difflib.get_close_matches(name, by_name, n=1, cutoff=0.6)
        if match:
            return by_name[match[0]]
    return None


def _keys(section, prefix=""):
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _keys(field.annotation, f"{prefix}{name}.")
