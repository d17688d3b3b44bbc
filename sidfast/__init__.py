"""sidfast: one-step text-to-image generators distilled from Stable Diffusion, without data (arXiv 2406.01561)."""

__version__ = "0.1.0"
