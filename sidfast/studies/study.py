"""A study's file: a base configuration, variants of it, seeds, a budget, an evaluation (docs/ablations.md)."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from sidfast.common.errors import UserError
from sidfast.common.explain import explain
from sidfast.common.shipped import find_config, shipped
from sidfast.config.schema import Config, build_config, read_values, set_key, with_own_assets
from sidfast.config.sections import Section
from sidfast.evaluation.metrics import OF_FEATURES, parse_metrics

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
# What a study decides for all its variants, and instead by which key.
_OURS = {"train.images": "images", "train.steps": "images", "train.seed": "seeds",
         "train.samples": "evaluation.samples", "evaluation": "evaluation"}


class Measures(Section):
    """The evaluation of every run at its end, on the average of the generator. In the shapes world captions and
    reference are drawn; for any other prompts this names them, as the options of `sidfast evaluate` do."""

    images: int = Field(10_000, ge=2)
    points: int = Field(0, ge=0, description="shapes world: further evaluations along a run, for curves")
    samples: int = Field(8, ge=1, description="images of each variant in the report")
    batch_size: int = Field(250, ge=1)
    assets: str = Field("assets", description="shapes world: folder with the clip and checker")
    coco: str | None = Field(None, description="folder of COCO-2014 val: the COCO-30k protocol")
    prompts: str | None = Field(None, description="one prompt a line, or a table")
    prompts_column: str | None = Field(None, description="of a table: its column of prompts")
    reference: str | None = Field(None, description="real images, or an .npz with mu and sigma")
    features: str | None = Field(None, description="inception:FILE, or clip: and a folder or hub id")
    clip: str | None = Field(None, description="folder or hub id of a transformers CLIP")
    metrics: str | None = Field(None, description="with commas; fid,clip unless given")
    dtype: Literal["fp32", "bf16", "fp16"] | None = Field(None, description="of the model; fp32 unless given")
    resize: int | None = Field(None, ge=1, description="bring the images to so many pixels first")

    @property
    def options(self):
        """Those of `sidfast evaluate` that were given, less coco."""
        names = ("images", "batch_size", "prompts", "prompts_column", "reference", "features", "clip", "metrics",
                 "dtype", "resize")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class StudyFile(Section):
    """All of it."""

    question: str = Field(description="what the study is to find out; heads the report")
    base: str = Field(description="path of a configuration, from this file's folder")
    settings: dict[str, Any] = Field({}, description="section.key: value, for all variants")
    images: int = Field(ge=1, description="training images of each run")
    seeds: list[int] = Field(min_length=1)
    reference: str | None = Field(None, description="the variant that the others are compared with; the first one "
                                                    "unless given")
    variants: dict[str, dict[str, Any]] = Field(min_length=1, description="name: {section.key: value, ...}")
    teacher: list[float] = Field([], description="shapes world: guidance scales at which the teacher is measured as "
                                                 "well, in 50 steps, with as many sets of noise as there are seeds")
    evaluation: Measures = Measures()

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds):
        for seed in seeds:
            if seed < 0 or seeds.count(seed) > 1:
                raise ValueError(f"seeds: {seed} is {'negative' if seed < 0 else 'there twice'}")
        return seeds

    @model_validator(mode="after")
    def _consistent(self):
        for name in self.variants:
            if not _NAME.fullmatch(name):
                raise ValueError(f"variants: {name!r} is no name of a folder (letters, digits, . _ + -)")
        if self.reference is not None and self.reference not in self.variants:
            raise ValueError(f"reference: there is no variant {self.reference!r}")
        for where, changes in (("settings", self.settings),
                               *((f"variants.{name}", changes) for name, changes in self.variants.items())):
            for key in changes:
                for taken, instead in _OURS.items():
                    if key == taken or key.startswith(taken + "."):
                        raise ValueError(f"{where}: {key} is the same for all runs of a study; set {instead}")
                if not all(key.split(".")):
                    raise ValueError(f"{where}: {key!r} must be section.key")
        return self


@dataclass(frozen=True)
class Run:
    """One variant with one seed. `folder`: below that of the study's results."""

    variant: str
    seed: int
    config: Config

    @property
    def folder(self):
        """runs/VARIANT/seed-SEED."""
        return Path("runs") / self.variant / f"seed-{self.seed}"

    @property
    def title(self):
        """What it is called in messages."""
        return f"{self.variant}, seed {self.seed}"


@dataclass(frozen=True)
class TeacherPoint:
    """The teacher at one scale of guidance: measured, not trained. `folder`: as a Run's."""

    guidance: float

    @property
    def folder(self):
        """teacher/guidance-SCALE."""
        return Path("teacher") / f"guidance-{self.guidance:g}"

    @property
    def title(self):
        """What it is called in messages."""
        return f"teacher at guidance {self.guidance:g}"


@dataclass(frozen=True)
class Study:
    """A study as read: its file's contents, its name, and its runs, seed by seed."""

    name: str
    file: StudyFile
    runs: tuple

    @property
    def reference(self):
        """The name of the variant that others are compared with."""
        return self.file.reference or next(iter(self.file.variants))

    @property
    def teacher(self):
        """What is to be measured of the teacher: a list of TeacherPoint."""
        return [TeacherPoint(guidance) for guidance in self.file.teacher]

    @property
    def items(self):
        """All that is to be done: the teacher's points, the runs."""
        return [*self.teacher, *self.runs]

    @property
    def of_shapes(self):
        """Whether the evaluation draws captions and reference itself."""
        return self.runs[0].config.data.prompts.startswith("shapes:")


def read_study(path):
    """A Study from its file. Raises UserError, naming file and key, for whatever is wrong with it or with a variant."""
    path = Path(find_config(str(path)))
    values = read_values(path)
    if "variants" not in values and not values.keys().isdisjoint(Config.model_fields.keys() - {"evaluation"}):
        raise UserError(f"{path}: is no study (docs/ablations.md) but a configuration, which sidfast/train.py trains")
    try:
        file = StudyFile.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, StudyFile)}") from None
    file = file.model_copy(update={"evaluation": file.evaluation.model_copy(
        update={"assets": shipped(file.evaluation.assets)})})
    base = path.parent / file.base
    values = read_values(base)
    runs = tuple(Run(variant, seed, _config(values, file, variant, seed, f"{path}: variants.{variant}"))
                 for seed in file.seeds for variant in file.variants)
    study = Study(path.stem, file, runs)
    shapes = {run.config.data.prompts.startswith("shapes:") for run in runs}
    teachers = {run.config.model.model_copy(update={"resolution": None}).model_dump_json() for run in runs}
    if len(shapes) > 1 or len(teachers) > 1:
        raise UserError(f"{path}: all variants need the same model.teacher and the same kind of data.prompts")
    given = [f"model.{key}" for key, value in runs[0].config.model.loading.items() if value]
    if file.teacher and given:
        raise UserError(f"{path}: teacher measures the teacher as its files are, without {', '.join(given)}; leave one "
                        "of them out")
    _check_evaluation(path, file, study.of_shapes)
    return study


def is_study(path):
    """Whether a file is a study's and not a training run's. Raises UserError for one that is neither by its syntax."""
    return "variants" in read_values(Path(path))


def load_study(path):
    """[(name, Config), ...] of all runs of a study's file. Raises UserError."""
    return [(f"{run.variant}/seed-{run.seed}", run.config) for run in read_study(path).runs]


def _config(values, file, variant, seed, source):
    values = copy.deepcopy(values)
    for key, value in (file.settings | file.variants[variant]).items():
        set_key(values, key, value, source)
    train = values.setdefault("train", {})
    if isinstance(train, dict):                          # (otherwise the configuration says what is wrong)
        train.pop("steps", None)
        train |= {"images": file.images, "seed": seed, "samples": file.evaluation.samples}
    config = with_own_assets(build_config(values | {"evaluation": {}}, source))
    if not config.train.saves:
        raise UserError(f"{source}: train.save_every is 0; a study needs checkpoints to go on after an interruption")
    if not config.data.prompts.startswith("shapes:"):
        return config
    points, m = file.evaluation.points, file.evaluation
    every = max(1, config.train.total_steps // (points + 1)) if points else 0
    return build_config(config.model_dump() | {"evaluation": {
        "images": m.images, "every": every, "batch_size": m.batch_size, "assets": m.assets}}, source)


def _check_evaluation(path, file, of_shapes):
    m = file.evaluation
    named = [name for name in ("coco", *m.options) if name not in ("images", "batch_size")
             and getattr(m, name) is not None]
    if not of_shapes and file.teacher:
        raise UserError(f"{path}: teacher needs the shapes world (data.prompts = shapes:train)")
    if of_shapes and named:
        raise UserError(f"{path}: evaluation.{named[0]} has no meaning in the shapes world")
    if not of_shapes and m.points:
        raise UserError(f"{path}: evaluation.points needs the shapes world (data.prompts = shapes:train)")
    if of_shapes:
        return
    if m.prompts_column is not None and m.prompts is None:
        raise UserError(f"{path}: evaluation.prompts_column is of a table that evaluation.prompts names")
    if m.coco is None and m.prompts is None:
        raise UserError(f"{path}: evaluation.coco or evaluation.prompts is missing")
    metrics = parse_metrics(m.metrics or "fid,clip")
    needed = {"features": metrics & OF_FEATURES, "clip": metrics & {"clip", "diversity"},
              "reference": metrics & OF_FEATURES if m.coco is None else None}
    for name, needing in needed.items():
        if needing and getattr(m, name) is None:
            raise UserError(f"{path}: evaluation.{name} is missing; {', '.join(sorted(needing))} need it")
    if m.features is not None and not m.features.startswith(("inception:", "clip:")):
        raise UserError(f"{path}: evaluation.features: must be inception:FILE, clip:FOLDER or clip:HUB_ID, not "
                        f"{m.features!r}")
