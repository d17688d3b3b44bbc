"""The embedded teacher: a small latent diffusion model of the shapes world."""
