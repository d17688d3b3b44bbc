"""The paper, without engines or files: noise levels, guidance, denoising, losses, and the two updates."""
