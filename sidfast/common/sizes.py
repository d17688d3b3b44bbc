"""Sizes of a teacher's images and latents."""

import re

from sidfast.common.errors import UserError


def pair(size):
    """(height, width) of a size that is one number or both."""
    return (size, size) if isinstance(size, int) else tuple(size)


def as_diffusers_sizes(unet):
    """Give an old UNet the sample_size that StableDiffusionPipeline gives it: configurations written before diffusers
    0.9 say less than 64 where 64 is meant."""
    written = re.match(r"0\.(\d+)", str(unet.config.get("_diffusers_version")))
    size = unet.config.sample_size
    if written and int(written[1]) < 9 and isinstance(size, int) and size < 64:
        unet.register_to_config(sample_size=64)
    return unet


class Sized:
    """What has a teacher's `unet` and `vae`, with weights or without."""

    @property
    def latent_factor(self):
        """Pixels along the side of a latent one."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def image_size(self, resolution=None):
        """(height, width) in pixels of images at a configuration's `model.resolution`, or else the teacher's own."""
        if resolution is None:
            return tuple(self.latent_factor * side for side in pair(self.unet.config.sample_size))
        return pair(resolution)

    def latent_shape(self, resolution=None):
        """(C, H, W) of the latents of such images."""
        return self.unet.config.in_channels, *(side // self.latent_factor for side in self.image_size(resolution))

    def check_resolution(self, resolution, where):
        """Raise UserError, which `where` opens, for a `model.resolution` that has no latents."""
        if any(side % self.latent_factor for side in self.image_size(resolution)):
            raise UserError(f"{where}: model.resolution ({resolution}) must be a multiple of {self.latent_factor}, the "
                            "pixels along the side of the teacher's latent ones")
