"""A one-step text-to-image pipeline for diffusers. This file is copied into every export and needs diffusers alone.

    pipe = DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)
    image = pipe("a prompt", generator=torch.Generator().manual_seed(0)).images[0]

One pass of the network turns noise into an image: the UNet, started from pure noise at a fixed timestep, is read as a
denoiser (Score identity Distillation with Long and Short Guidance, arXiv 2406.01561). The oldest versions that were
tried: diffusers 0.30.3 with transformers 4.44.2.
"""

import json
import math
import shutil
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

if tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 30):
    raise ImportError(f"this model needs diffusers 0.30 or newer, not {diffusers.__version__}: older versions do not "
                      "know all settings of its networks, and would draw the weights of others at random")

_CODE = "pipeline.py"                                    # the name of this file in an export


class OneStepPipeline(DiffusionPipeline):
    """Prompts to images in one step.

    Args: the parts of a Stable Diffusion pipeline, 1.x, 2.x or XL, and `t_init`, the timestep at which the generator
    starts.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components = ("text_encoder_2", "tokenizer_2")
    _callback_tensor_inputs = ("latents", "prompt_embeds")

    def __init__(self, vae, text_encoder, tokenizer, unet, scheduler, text_encoder_2=None, tokenizer_2=None,
                 t_init: int = 625):
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
                              text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2)
        self.register_to_config(t_init=t_init)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(self, prompt=None, height=None, width=None, num_images_per_prompt=1, generator=None, latents=None,
                 output_type="pil", return_dict=True, *, num_inference_steps=1, guidance_scale=0.0,
                 negative_prompt=None, prompt_embeds=None, pooled_prompt_embeds=None, callback_on_step_end=None,
                 callback_on_step_end_tensor_inputs=("latents",)):
        """Make images from prompts.

        Args:
            prompt: a string or a list of N strings.
            height, width: in pixels; default: the resolution that the generator was trained at.
            num_images_per_prompt: images per prompt, next to each other in the result.
            generator: a torch.Generator, or a list of one per image.
            latents: noise of variance 1, [images, C, height / 8, width / 8], in place of the generator's.
            output_type: "pil", "np", "pt" (in [0, 1]) or "latent".
            num_inference_steps: 1, the only number that is possible.
            guidance_scale: 0 to 1, which mean the same: no guidance.
            negative_prompt: empty or None: without guidance it would have no effect.
            prompt_embeds: text embeddings [N, L, D] (of `encode_prompt`) in place of `prompt`.
            pooled_prompt_embeds: with them for Stable Diffusion XL, [N, P] (of `encode_prompt` too).
            callback_on_step_end: called once, as callback(pipe, 0, t_init, tensors), with the generated latents; it may
                return others.
            callback_on_step_end_tensor_inputs: which tensors it gets, of "latents" and "prompt_embeds".
        Returns: ImagePipelineOutput with `.images`, or a tuple if `return_dict` is False. Raises ValueError for an
        argument that is impossible, or would have no effect.
        """
        _check_one_step(num_inference_steps, guidance_scale, negative_prompt)
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs: {sorted(unknown)} are not among "
                             f"{list(self._callback_tensor_inputs)}")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, not {num_images_per_prompt}")
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give one of prompt and prompt_embeds")
        device, dtype = self._execution_device, self.unet.dtype
        if prompt_embeds is None:                        # (before noise is drawn: a GPU may still be busy)
            prompts = _repeat(_as_list(prompt), num_images_per_prompt)
            prompt_embeds, pooled_prompt_embeds = self.encode_prompt(prompts)
        else:
            self._check_embeds(prompt_embeds, pooled_prompt_embeds)
            prompt_embeds, pooled_prompt_embeds = (
                None if embeds is None else embeds.repeat_interleave(num_images_per_prompt, 0).to(device, dtype)
                for embeds in (prompt_embeds, pooled_prompt_embeds))
        shape = self._latent_shape(len(prompt_embeds), height, width, latents)
        if latents is None:
            if isinstance(generator, (list, tuple)) and len(generator) != shape[0]:
                raise ValueError(f"generator: {len(generator)} generators for {shape[0]} images; give one per image, "
                                 "or a single one")
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)

        latents = self.denoise(latents.to(device, dtype), prompt_embeds, pooled_prompt_embeds)
        if callback_on_step_end is not None:
            known = {"latents": latents, "prompt_embeds": prompt_embeds}
            tensors = {name: known[name] for name in callback_on_step_end_tensor_inputs}
            latents = (callback_on_step_end(self, 0, self.config.t_init, tensors) or {}).get("latents", latents)
        if output_type == "latent":
            images = latents
        else:
            images = self.image_processor.postprocess(self._decode(latents), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_config(self, save_directory, **kwargs):
        """Write model_index.json and, next to it, this file: `save_pretrained` and `push_to_hub` call this, and what
        they write loads again with trust_remote_code."""
        super().save_config(save_directory, **kwargs)
        index, code = Path(save_directory, self.config_name), Path(save_directory, _CODE)
        described = json.loads(index.read_text(encoding="utf-8")) | {"_class_name": [code.stem, type(self).__name__]}
        index.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        if not (code.exists() and code.samefile(__file__)):
            shutil.copyfile(__file__, code)

    def encode_prompt(self, prompts):
        """(text embeddings [N, L, D] of N prompts, None); for Stable Diffusion XL (both encoders' last but one layers
        side by side, the second encoder's embeddings [N, P] of the whole prompts)."""
        if self.text_encoder_2 is None:
            return self._encode(self.tokenizer, self.text_encoder, prompts)[0].to(self.unet.dtype), None
        pairs = (self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)
        first, second = (self._encode(*pair, prompts, output_hidden_states=True) for pair in pairs)
        states = torch.cat((first.hidden_states[-2], second.hidden_states[-2]), -1)
        return states.to(self.unet.dtype), second[0].to(self.unet.dtype)

    def _encode(self, tokenizer, text_encoder, prompts, **options):
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length,
                           return_tensors="pt").to(self._execution_device)
        masked = getattr(text_encoder.config, "use_attention_mask", False)
        return text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask if masked else None, **options)

    def _decode(self, latents):
        """Pixels [N, 3, H, W] in [-1, 1]. A VAE that overflows in half precision says so (`force_upcast`)."""
        upcast = self.vae.dtype == torch.float16 and self.vae.config.get("force_upcast")
        if upcast:
            self.vae.to(torch.float32)
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        images = self.vae.decode(latents, return_dict=False)[0]
        if upcast:
            self.vae.to(torch.float16)
        return images

    def denoise(self, z, text, pooled=None):
        """x_g = x_hat(s z, t_init): noise z [N, C, H, W] of variance 1 to latents, in one pass of the network."""
        a2 = self.scheduler.alphas_cumprod[self.config.t_init].item()
        a, s = a2**0.5, (1 - a2) ** 0.5
        x_t = s * z
        added = {}
        if pooled is not None:                           # (size of the original, its crop's corner, size of the image)
            height, width = (self.vae_scale_factor * side for side in z.shape[2:])
            sizes = torch.tensor([height, width, 0, 0, height, width], dtype=text.dtype, device=text.device)
            added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes.expand(len(z), 6)}}
        output = self.unet(x_t, self.config.t_init, encoder_hidden_states=text, **added, return_dict=False)[0]
        if self.scheduler.config.prediction_type == "v_prediction":
            return a * x_t - s * output
        return (x_t - s * output) / a

    def _latent_shape(self, images, height, width, latents):
        """[images, C, H, W] of the noise. Raises ValueError for sizes that do not fit the networks or each other."""
        factor, channels, side = self.vae_scale_factor, self.unet.config.in_channels, self.unet.config.sample_size
        rows, columns = (side, side) if isinstance(side, int) else side
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and (pixels < factor or pixels % factor):
                raise ValueError(f"height and width must be multiples of {factor}: {name} is {pixels}")
        shape = [images, channels, (height or rows * factor) // factor,
                 (width or columns * factor) // factor]
        if latents is None:
            return tuple(shape)
        if latents.ndim == 4:                            # (they may decide about a size that was not given)
            shape[2:] = (given or have for given, have in zip(
                (height and height // factor, width and width // factor), latents.shape[2:], strict=True))
        if list(latents.shape) != shape:
            raise ValueError(f"latents: shape {list(latents.shape)} where {shape} is needed")
        return tuple(shape)

    def _check_embeds(self, embeds, pooled):
        width = self.unet.config.cross_attention_dim
        if embeds.ndim != 3 or embeds.shape[-1] != width or not len(embeds):
            raise ValueError(f"prompt_embeds: shape {list(embeds.shape)} where [prompts, tokens, {width}] is needed")
        if (pooled is None) != (self.text_encoder_2 is None):
            raise ValueError("pooled_prompt_embeds: " + ("are needed beside prompt_embeds" if pooled is None else
                                                         "have no place in this model; leave them out"))


def _check_one_step(steps, guidance, negative_prompt):
    if steps != 1:
        raise ValueError(f"num_inference_steps: {steps} is not possible; this generator makes images in 1 step")
    if guidance is not None and not (math.isfinite(guidance) and 0 <= guidance <= 1):
        raise ValueError(f"guidance_scale: {guidance} is not possible; guidance was distilled into this generator, so "
                         "leave it out (0 to 1 mean no guidance)")
    if negative_prompt is not None and any(_as_list(negative_prompt, "negative_prompt")):
        raise ValueError("negative_prompt: has no effect without guidance, which this generator does not take; leave "
                         "it out")


def _as_list(prompt, name="prompt"):
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"{name}: must be a string or a list of one or more strings, not {str(prompt)[:80]}")
    return prompts


def _repeat(values, times):
    return [value for value in values for _ in range(times)]
