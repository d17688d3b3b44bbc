"""A generator as a stock pipeline of diffusers, which needs no code of an export's folder.

With timesteps [t_init] and no guidance a DDPMScheduler's only step is eq. 2: it ends at x_hat(x_t, t_init), where x_t
are the latents that the pipeline is given. They are s z (eq. 4), so the caller scales the noise.
"""

from inspect import signature
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import nn

from sidfast.common.errors import UserError
from sidfast.teachers.base import Teacher

# What would change that step: noise is added by the root of `variance_type`'s variance, and fixed_small's is 1e-20.
_EXACT = {"clip_sample": False, "thresholding": False, "variance_type": "fixed_small", "steps_offset": 1}
_RECIPE = """```python
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("THIS FOLDER")
noise = {noise_scale!r} * torch.randn{shape}
image = pipe("a prompt", timesteps=[{t_init}], guidance_scale=0, latents=noise).images[0]
```

The folder is a stock `{pipeline}`: no remote code is needed. Both numbers belong to the generator: it
starts at timestep {t_init}, from normal noise times {noise_scale!r}, and takes one step without guidance.
Other timesteps, more steps, or noise that is not scaled make broken images. On a GPU, move the pipeline
and the noise there, in one type. With

```python
from diffusers import EulerDiscreteScheduler

pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
```

the pipeline draws and scales the noise itself (leave out `latents`; images differ by rounding)."""


def plain_pipeline(teacher: Teacher, network: nn.Module) -> DiffusionPipeline:
    """diffusers' own pipeline of a generator's network with the teacher's other parts, in the scheduler of which one
    step is exact. Raises UserError for a family of teachers that has none."""
    scheduler = teacher.parts["scheduler"]
    if isinstance(scheduler, DDPMScheduler):
        pipe = teacher.family.pipeline_of(teacher.parts | {
            teacher.family.network: network, "scheduler": DDPMScheduler.from_config(scheduler.config, **_EXACT)})
        if type(pipe).__module__.startswith("diffusers."):
            if "add_watermarker" in signature(type(pipe)).parameters:            # (it would mark images if it could)
                pipe.register_to_config(add_watermarker=False)
            return pipe
    raise UserError(f"--plain: no pipeline of diffusers makes the images of {teacher.family.name} in one exact step; "
                    "export with its own (without --plain)")


def describe_plain(teacher: Teacher, pipe: DiffusionPipeline, t_init: int, resolution=None) -> dict[str, Any]:
    """What a caller of `plain_pipeline` needs: the class of the pipeline, t_init, s of eq. 4, and [C, H, W] of its
    latents (JSON values); `resolution`: of the images, as `model.resolution`."""
    scale = teacher.schedule.coefficients(torch.tensor([t_init]))[1].item()
    return {"pipeline": type(pipe).__name__, "t_init": t_init, "noise_scale": scale,
            "shape": list(teacher.latent_shape(resolution))}


def plain_recipe(plain: dict[str, Any]) -> str:
    """Markdown that says how to call a pipeline of which `describe_plain` speaks."""
    return _RECIPE.format(**plain | {"shape": (1, *plain["shape"])})
