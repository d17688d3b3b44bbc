"""The noise schedule of a teacher's folder, and the scheduler that samples the teacher in several steps."""

import copy
import inspect
from pathlib import Path
from typing import Any

import torch

from sidfast.common.errors import UserError, first_reason
from sidfast.teachers.paths import PREDICTION_TYPES

_FILE = "scheduler/scheduler_config.json"
_MOST_STEPS = 100_000
_NAMES = "DDIM, DDPM, PNDM, Euler, DPM-Solver"


def load_schedulers(folder: Path, config: dict, what: str, changes: dict) -> tuple[Any, Any]:
    """(diffusers' DDPMScheduler with the noise levels of a teacher, the DDIMScheduler that samples it).

    `config`: scheduler_config.json as a dictionary; `changes`: values in the place of those there. Raises UserError,
    which `what` opens, for schedulers that are unknown, or whose levels are not those of a diffusion model.
    """
    import diffusers

    kind = config.get("_class_name", "DDPMScheduler")
    cls = getattr(diffusers, str(kind), None)
    known = isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)
    if not known or "beta_schedule" not in config:
        raise UserError(f"{what}: {folder}/{_FILE}: scheduler {str(kind)[:60]} is not supported; one of diffusers with "
                        f"a beta schedule is needed ({_NAMES})")
    check_changes(cls, changes)
    config = config | changes
    count = config.get("num_train_timesteps", 1000)
    if type(count) is not int or count > _MOST_STEPS:
        raise UserError(f"{what}: {folder}/{_FILE}: num_train_timesteps must be a whole number up to {_MOST_STEPS}, "
                        f"not {str(count)[:60]!r}")
    kept = {"prediction_type": config.get("prediction_type", "epsilon"), "clip_sample": False}
    if kept["prediction_type"] not in PREDICTION_TYPES:
        raise UserError(f"{what}: {folder}/{_FILE}: {_unsupported(kept['prediction_type'])}")
    try:                                                 # clip_sample and steps_offset as StableDiffusionPipeline does
        own = cls.from_config(config)
        scheduler = diffusers.DDPMScheduler.from_config(config | kept)
        sampler = diffusers.DDIMScheduler.from_config(
            config | kept, steps_offset=1, set_alpha_to_one=own.config.get("set_alpha_to_one", False))
        sampler.set_timesteps(1)
        _check_levels(scheduler.alphas_cumprod, own, f"{what}: {folder}/{_FILE}")
    except UserError:
        raise
    except Exception as error:                           # the library's own for values that it does not know
        raise UserError(f"{what}: {folder}/{_FILE} cannot be loaded ({first_reason(error)})") from None
    return scheduler, sampler


def check_changes(cls: Any, changes: dict) -> None:
    """Raise UserError for values of the configuration's model.scheduler that a scheduler of diffusers does not know."""
    known = sorted(set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"})
    for key, value in changes.items():
        if key not in known:
            raise UserError(f"model.scheduler.{key}: {cls.__name__} has no such setting; it has {', '.join(known)}")
        if key == "prediction_type" and value not in PREDICTION_TYPES:
            raise UserError(f"model.scheduler.{key}: {_unsupported(value)}")


def _unsupported(prediction_type):
    return (f"prediction type {str(prediction_type)[:60]!r} is not supported; {' and '.join(PREDICTION_TYPES)} are")


def _check_levels(a2, own, where):
    """UserError, which `where` opens, for a_t^2 [T] that do not fall, or are not those of the folder's own scheduler.
    (Some give the last level a little signal where others have none.)"""
    if len(a2) < 2 or not (a2[-1] >= 0 and a2[0] < 1 and (a2[1:] < a2[:-1]).all()):
        raise UserError(f"{where}: its levels of noise must rise from step to step between none and all; see "
                        "num_train_timesteps and the betas")
    if len(own.alphas_cumprod) != len(a2) or (own.alphas_cumprod - a2)[:-1].abs().max() > 1e-5:
        raise UserError(f"{where}: {type(own).__name__} has other levels of noise than DDPM and DDIM by these values "
                        "(it may not know rescale_betas_zero_snr); name one of those as _class_name")


def check_levels(schedule: Any, levels: dict[str, int], where: str) -> None:
    """Raise UserError, which `where` opens, for one of the timesteps {key of the configuration: t} that has no signal,
    if the network predicts epsilon: eq. 2 divides by the signal."""
    for key, t in levels.items():
        if schedule.prediction_type == "epsilon" and schedule.log_sigma(t).isinf():
            raise UserError(f"{where}: {key} ({t}) is a level without any signal (zero terminal SNR), where epsilon "
                            f"says nothing about the image: set {key} to at most {t - 1}; or, if the network "
                            "predicts v, as models for zero terminal SNR do, model.scheduler.prediction_type to "
                            "v_prediction")


def check_steps(scheduler: Any, steps: int, where: str) -> None:
    """Raise UserError, which `where` opens, if sampling in so many steps with a scheduler of diffusers begins at a
    timestep that the network does not have, or at one without any signal although it predicts epsilon."""
    levels = getattr(scheduler, "alphas_cumprod", None)
    if levels is None:
        return
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    if scheduler.config.get("thresholding"):
        _try_thresholding(scheduler, where)
    reached = scheduler.timesteps.max().item()
    if reached > len(levels) - 1:
        raise UserError(f"{where}: {steps} steps begin at timestep {reached:g}, and the model has {len(levels)}; take "
                        "fewer steps")
    if scheduler.config.get("prediction_type", "epsilon") == "epsilon" and levels[round(reached)] <= 0:
        raise UserError(f"{where}: sampling begins at a level without any signal (zero terminal SNR), where epsilon "
                        "says nothing about the image: in scheduler_config.json, set timestep_spacing to leading, or "
                        "prediction_type to v_prediction if that is what the network predicts (for training: "
                        "model.scheduler.prediction_type)")


def _try_thresholding(scheduler, where):
    """Take one step, for libraries check thresholding's settings only then."""
    x = torch.ones(1, 4, 8, 8)
    try:
        scheduler.step(x, scheduler.timesteps[0], x)
    except Exception as error:                           # the library raises many kinds
        raise UserError(f"{where}: the scheduler's thresholding does not work ({first_reason(error)}); see "
                        "dynamic_thresholding_ratio and sample_max_value in scheduler_config.json") from None
