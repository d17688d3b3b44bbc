"""The configuration's sections about noise levels and synthetic data, which ablations replace (docs/ablations.md)."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from sidfast.method.densities import DENSITIES
from sidfast.method.synthetic import DEGRADATIONS, SOURCES


class Section(BaseModel):
    """A section of a configuration: unknown keys, other types and non-finite numbers are errors (pydantic's
    ValidationError); what was read stays as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _one_of(registry):
    """A type: one of the names in a registry, as it stands when a configuration is read. The JSON schema takes any name
    and shows those that there are: plug-ins add theirs later."""

    def check(name):
        if name not in registry:
            raise PydanticCustomError("unknown_name", "input should be one of {names}",
                                      {"names": ", ".join(map(repr, registry))})
        return name

    return Annotated[str, AfterValidator(check), WithJsonSchema({"type": "string", "examples": list(registry)})]


class DensityOptions(Section):
    """Options of the densities that have them (section 6); the density's own default unless given."""

    mean: float | None = Field(None, description="edm: of ln sigma; laplace: of logSNR")
    std: float | None = Field(None, gt=0, description="edm: of ln sigma")
    scale: float | None = Field(None, gt=0, description="laplace: of logSNR")
    shift: float | None = Field(None, gt=0, description="logit_normal: factor on sigma")
    rho: float | None = Field(None, ge=0.1, le=100, description="karras: exponent")

    @property
    def options(self):
        """The density's own options that were given."""
        return {name: value for name in DensityOptions.model_fields if (value := getattr(self, name)) is not None}


class NoiseOfUpdate(DensityOptions):
    """What is different about one update's noise levels."""

    density: _one_of(DENSITIES) | None = Field(None, description="noise.density unless given")
    t_min: int | None = Field(None, ge=0, description="noise.t_min unless given")
    t_max: int | None = Field(None, ge=1, description="noise.t_max unless given")


class Noise(DensityOptions):
    """Noise levels at which the scores are compared (section 6), and the generator's starting level (eq. 4)."""

    density: _one_of(DENSITIES) = Field("ddpm", description="distribution of the noise levels")
    t_min: int = Field(20, ge=0, description="smallest timestep drawn")
    t_max: int = Field(979, ge=1, description="largest timestep drawn")
    t_init: int = Field(625, ge=1, description="timestep at which the generator starts")
    fake_score: NoiseOfUpdate = NoiseOfUpdate()
    generator: NoiseOfUpdate = NoiseOfUpdate()

    def levels(self, update):
        """(density, t_min, t_max, options) of the update "fake_score" or "generator"."""
        own = getattr(self, update)
        density = own.density or self.density
        options = (self.options if density == self.density else {}) | own.options
        return (density, self.t_min if own.t_min is None else own.t_min,
                self.t_max if own.t_max is None else own.t_max, options)

    @model_validator(mode="after")
    def _consistent(self):
        for name in self.options:
            if name not in DENSITIES[self.density].options:
                raise ValueError(f"noise.{name} has no meaning for density {self.density!r}")
        if self.t_min >= self.t_max:
            raise ValueError(f"noise.t_min ({self.t_min}) must be below noise.t_max ({self.t_max})")
        for update in ("fake_score", "generator"):
            density, t_min, t_max, options = self.levels(update)
            if t_min >= t_max:
                raise ValueError(f"noise.{update}: t_min ({t_min}) must be below t_max ({t_max})")
            for name in options:
                if name not in DENSITIES[density].options:
                    raise ValueError(f"noise.{update}.{name} has no meaning for density {density!r}")
        return self


class Synthetic(Section):
    """The data, which are the generator's own images (section 7). Source, teacher and degradation are of the images
    that train the fake score; temperature, prompts and repetition of the data of both updates. Evaluations always
    draw z ~ N(0, I)."""

    source: _one_of(SOURCES) = Field("generator", description="which network draws the images: generator, ema (its "
                                     "average), stale (an old copy), multistep (the generator run several times)")
    stale_by: int | None = Field(None, ge=1, description="stale: updates that the copy is old")
    stale_every: int = Field(1, ge=1, description="stale: updates between copies, a divisor of stale_by; with more "
                                                  "than 1 ages run from stale_by to stale_by + stale_every - 1. In "
                                                  "memory are stale_by / stale_every + 1 copies")
    steps: int | None = Field(None, ge=2, description="multistep: passes")
    teacher_share: float = Field(0.0, ge=0, le=1, description="share of images drawn by the teacher instead, by DDIM")
    teacher_steps: int | None = Field(None, ge=1, description="DDIM steps; 50 unless given")
    teacher_guidance: float | None = Field(None, description="the teacher's guidance; guidance.kappa4 unless given")
    degradation: _one_of(DEGRADATIONS) | None = Field(None, description="blur or noise, in latent space")
    strength: float | None = Field(None, gt=0, description="of the degradation: blur's deviation in latent pixels, "
                                                           "noise's deviation")
    temperature: float = Field(1.0, gt=0, description="factor on z")
    unique_prompts: int | None = Field(None, ge=1, description="only the first so many prompts of the source (of a "
                                                        "file: drawn at random); all there are unless given")
    prompt_share: float | None = Field(None, gt=0, le=1, description="the same as a share of the lines of a file")
    prompt_repeats: int = Field(1, ge=1, description="how often a prompt comes in a row, each time with another z")
    z_per_prompt: int | None = Field(None, ge=1, description="different z of a prompt; without end unless given")

    @model_validator(mode="after")
    def _consistent(self):
        wanted = SOURCES[self.source].options
        for name in sorted({name for cls in SOURCES.values() for name in cls.options}):
            given = getattr(self, name) != type(self).model_fields[name].default
            if given and name not in wanted:
                raise ValueError(f"synthetic.{name} has no meaning for source {self.source!r}")
            if name in wanted and getattr(self, name) is None:
                raise ValueError(f"synthetic.{name} is needed by source {self.source!r}")
        if self.stale_by is not None and self.stale_by % self.stale_every:
            raise ValueError(f"synthetic.stale_every ({self.stale_every}) must divide synthetic.stale_by "
                             f"({self.stale_by})")
        for name in ("teacher_steps", "teacher_guidance"):
            if getattr(self, name) is not None and not self.teacher_share:
                raise ValueError(f"synthetic.{name} has no meaning without synthetic.teacher_share")
        if (self.degradation is None) != (self.strength is None):
            raise ValueError("synthetic.degradation and synthetic.strength need each other")
        if self.unique_prompts is not None and self.prompt_share is not None:
            raise ValueError("give one of synthetic.unique_prompts and synthetic.prompt_share")
        return self
