"""A one-step text-to-image pipeline for diffusers. This file travels inside every export and needs diffusers alone.

    pipe = DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)
    image = pipe("a prompt", generator=torch.Generator().manual_seed(0)).images[0]

One pass of the network turns noise into an image: the UNet, started from pure noise at a fixed timestep, is read as a
denoiser (Score identity Distillation with Long and Short Guidance, arXiv 2406.01561).
"""

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class OneStepPipeline(DiffusionPipeline):
    """Prompts to images in one step.

    Args: the parts of a Stable Diffusion pipeline, and `t_init`, the timestep at which the generator starts.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"

    def __init__(self, vae, text_encoder, tokenizer, unet, scheduler, t_init: int = 625):
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_to_config(t_init=t_init)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(self, prompt, height=None, width=None, num_images_per_prompt=1, generator=None, latents=None,
                 output_type="pil", return_dict=True):
        """Make images from prompts.

        Args:
            prompt: a string or a list of N strings.
            height, width: in pixels; the resolution that the generator was trained at unless given.
            num_images_per_prompt: images per prompt, next to each other in the result.
            generator: a torch.Generator or a list of one per image.
            latents: noise of variance 1, [images, C, height / 8, width / 8], in place of the generator's.
            output_type: "pil", "np", "pt" (in [0, 1]) or "latent".
        Returns: ImagePipelineOutput with `.images`, or a tuple if `return_dict` is False.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        size = self.unet.config.sample_size
        rows, columns = (size, size) if isinstance(size, int) else size
        height, width = height or rows * self.vae_scale_factor, width or columns * self.vae_scale_factor
        if height % self.vae_scale_factor or width % self.vae_scale_factor:
            raise ValueError(f"height and width must be multiples of {self.vae_scale_factor}, not {height} x {width}")
        device, dtype = self._execution_device, self.unet.dtype
        text = self.encode_prompt(prompts)               # first: a GPU may still be busy with earlier images
        if latents is None:
            shape = (len(prompts), self.unet.config.in_channels, height // self.vae_scale_factor,
                     width // self.vae_scale_factor)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        x = self.denoise(latents.to(device, dtype), text)
        if output_type == "latent":
            images = x
        else:
            images = self.vae.decode(x.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def encode_prompt(self, prompts):
        """Text embeddings [N, L, D] of N prompts."""
        device = self._execution_device
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True,
                                max_length=self.tokenizer.model_max_length, return_tensors="pt").to(device)
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask if masked else None
        return self.text_encoder(tokens.input_ids, attention_mask=mask)[0].to(self.unet.dtype)

    def denoise(self, z, text):
        """x_g = x_hat(s z, t_init): noise z [N, C, H, W] of variance 1 to latents, in one pass of the network."""
        a2 = self.scheduler.alphas_cumprod[self.config.t_init].item()
        a, s = a2**0.5, (1 - a2) ** 0.5
        x_t = s * z
        output = self.unet(x_t, self.config.t_init, encoder_hidden_states=text, return_dict=False)[0]
        if self.scheduler.config.prediction_type == "v_prediction":
            return a * x_t - s * output
        return (x_t - s * output) / a
