"""Whether a teacher has the noise levels and sizes that a configuration asks for."""

from sidfast.common.errors import UserError
from sidfast.config.schema import Config
from sidfast.config.sections import Noise
from sidfast.method.densities import NoiseLevels
from sidfast.method.schedule import Schedule
from sidfast.teachers.base import Teacher
from sidfast.teachers.schedulers import check_levels, check_steps

UPDATES = ("fake_score", "generator")                    # in the order they take turns
TEACHER_STEPS = 50                                       # of the teacher's own images
_MULTIPLE = 8                                            # of the sides that StableDiffusionPipeline draws


def noise_levels(schedule: Schedule, section: Noise) -> dict[str, NoiseLevels]:
    """{update: NoiseLevels} of a configuration's `noise`. Raises ValueError for what the teacher does not have."""
    levels = {}
    for update in UPDATES:
        density, t_min, t_max, options = section.levels(update)
        levels[update] = NoiseLevels(schedule, density, t_min, t_max, **options)
    return levels


def check_teacher_fits(config: Config, teacher: Teacher, source: str) -> None:
    """Raise UserError, naming the source of the configuration, for noise levels or sizes that the teacher lacks.

    `teacher`: a Teacher, or a teacher without weights (`load_meta_teacher`).
    """
    try:
        noise_levels(teacher.schedule, config.noise)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    if config.noise.t_init >= len(teacher.schedule):
        raise UserError(f"{source}: noise.t_init ({config.noise.t_init}) must be below the teacher's "
                        f"{len(teacher.schedule)} timesteps")
    highest = {f"noise.{update}.t_max" if getattr(config.noise, update).t_max is not None else "noise.t_max":
               config.noise.levels(update)[2] for update in UPDATES}
    check_levels(teacher.schedule, {"noise.t_init": config.noise.t_init} | highest, source)
    teacher.check_resolution(config.model.resolution, source)
    size = teacher.image_size(config.model.resolution)
    for key, steps in _sampled(config).items():
        check_steps(teacher.sampler(), steps, f"{source}: {key}")
        if key != "synthetic.teacher_share" and any(side % _MULTIPLE for side in size):
            raise UserError(f"{source}: {key}: the teacher's images of {size[0]} x {size[1]} pixels cannot be drawn, "
                            f"whose sides must be multiples of {_MULTIPLE}; see model.resolution")


def _sampled(config):
    """{key of the configuration that asks for images of the teacher: DDIM steps}."""
    keys = {"train.samples": config.train.samples and TEACHER_STEPS,
            "evaluation.teacher": config.evaluation.images and config.evaluation.teacher and TEACHER_STEPS,
            "synthetic.teacher_share": config.synthetic.teacher_share and (
                config.synthetic.teacher_steps or TEACHER_STEPS)}
    return {key: steps for key, steps in keys.items() if steps}
