"""A teacher, and what a family of teachers says of itself (docs/adding-a-teacher.md).

Everything outside of this folder and accel/ sees a teacher through these two classes alone.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from sidfast.common.errors import UserError
from sidfast.common.sizes import pair
from sidfast.method.conditions import Conditions
from sidfast.method.schedule import Schedule

NAMES = {"unet": "UNet", "transformer": "transformer", "vae": "VAE", "text_encoder": "text encoder",
         "text_encoder_2": "second text encoder"}


@dataclass(eq=False)
class Teacher:
    """A frozen text-to-image model.

    `folder`: None for an architecture without files; `parts`: {folder of the pipeline: network, tokenizer or
    scheduler}, networks in fp32 on the CPU as loaded, or on the meta device, without weights; `schedule`: its path and
    what its network predicts; `sampling`: the scheduler of diffusers that draws its images in several steps; `changes`:
    values in the place of those of the folder's scheduler_config.json; `index`: its model_index.json.
    """

    family: "Family"
    folder: Path | None
    parts: dict[str, Any]
    schedule: Schedule
    sampling: Any
    changes: dict[str, Any] = field(default_factory=dict)
    index: dict[str, Any] = field(default_factory=dict)

    @property
    def network(self) -> nn.Module:
        """The network that denoises, which generator and fake score start from."""
        return self.parts[self.family.network]

    @property
    def networks(self) -> dict[str, nn.Module]:
        """{part: network}, in the family's order."""
        return {name: self.parts[name] for name in self.family.networks}

    @property
    def frozen(self) -> dict[str, nn.Module]:
        """The networks besides `network`, which training leaves as they are: VAE and text encoders."""
        return {name: module for name, module in self.networks.items() if name != self.family.network}

    @property
    def text_encoders(self) -> list[nn.Module]:
        """The networks that `encode` runs."""
        return [self.parts[name] for name in self.family.tokenizers.values()]

    @property
    def device(self) -> torch.device:
        """Where its text encoders are."""
        return next(self.text_encoders[0].parameters()).device

    def parameters(self) -> dict[str, int]:
        """{part: number of parameters} of its networks."""
        return {name: sum(p.numel() for p in module.parameters()) for name, module in self.networks.items()}

    def replace(self, **parts) -> "Teacher":
        """The same teacher with other networks as some of its parts."""
        return replace(self, parts=self.parts | parts)

    def sampler(self) -> Any:
        """A new scheduler for images in several steps."""
        return type(self.sampling).from_config(self.sampling.config)

    # images and latents

    def image_size(self, resolution: int | Sequence[int] | None = None) -> tuple[int, int]:
        """(height, width) in pixels of images at a configuration's `model.resolution`, or else the teacher's own."""
        if resolution is None:
            return tuple(self.family.latent_factor(self) * side for side in pair(self.network.config.sample_size))
        return pair(resolution)

    def latent_shape(self, resolution: int | Sequence[int] | None = None) -> tuple[int, int, int]:
        """(C, H, W) of the latents of such images."""
        factor = self.family.latent_factor(self)
        return self.network.config.in_channels, *(side // factor for side in self.image_size(resolution))

    def check_resolution(self, resolution: int | Sequence[int] | None, where: str) -> None:
        """Raise UserError, which `where` opens, for a `model.resolution` that has no latents."""
        factor = self.family.latent_factor(self)
        if any(side % factor for side in self.image_size(resolution)):
            raise UserError(f"{where}: model.resolution ({resolution}) must be a multiple of {factor}, the pixels "
                            "along the side of the teacher's latent ones")

    # texts

    def tokenize(self, prompts: Sequence[str]) -> torch.Tensor:
        """As Family's."""
        return self.family.tokenize(self, prompts)

    def encode(self, ids: torch.Tensor, size: tuple[int, int]) -> Conditions:
        """As Family's."""
        return self.family.encode(self, ids, size)

    def prompt_limit(self) -> tuple[Any, int] | None:
        """As Family's."""
        return self.family.prompt_limit(self)

    def conditions(self, n: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
                   ) -> Conditions:
        """As Family's."""
        return self.family.conditions(self, n, device=device, dtype=dtype)

    # pipelines

    def student(self, weights: dict[str, torch.Tensor], resolution: int | Sequence[int] | None = None) -> nn.Module:
        """A network like the teacher's, as diffusers has it, that takes over other weights ({name: fp32 tensor}).

        `resolution`: of its images, as `model.resolution`. Raises RuntimeError for weights of another network.
        """
        with torch.device("meta"):
            network = self.family.class_of(self.family.network).from_config(self.network.config)
        network.requires_grad_(False).eval().load_state_dict(weights, assign=True)
        if resolution:
            height, width = self.latent_shape(resolution)[1:]
            network.register_to_config(sample_size=height if height == width else [height, width])
        return network

    def pipeline(self) -> Any:
        """As Family's."""
        return self.family.pipeline(self)

    def one_step_pipeline(self, network: nn.Module, t_init: int) -> Any:
        """As Family's."""
        return self.family.one_step_pipeline(self, network, t_init)


class Family(ABC):
    """A kind of teacher. It keeps no state; the equations never see it.

    `name`: as in messages; `network`: the part that denoises; `networks`: {part: "library.Class"}; `tokenizers`:
    {part: the text encoder that it belongs to}; `architectures`: names that `build` takes.
    """

    name: ClassVar[str]
    network: ClassVar[str]
    networks: ClassVar[dict[str, str]]
    tokenizers: ClassVar[dict[str, str]]
    architectures: ClassVar[dict[str, Any]]

    def class_of(self, part: str) -> type[nn.Module]:
        """The class of a network of diffusers or transformers."""
        library, name = self.networks[part].split(".")
        return getattr(importlib.import_module(library), name)

    # from a folder to a teacher

    @abstractmethod
    def accepts(self, index: dict) -> bool:
        """Whether a pipeline is of this family, by its model_index.json."""

    @abstractmethod
    def check(self, folder: Path, what: str) -> dict[str, Any]:
        """{part: configuration}, JSON objects, of text encoders transformers' own.

        Raises UserError, which `what` opens, for parts that do not fit each other, and for whatever else would change
        images; no weight is read."""

    @abstractmethod
    def schedulers(self, folder: Path, configs: dict[str, Any], what: str, changes: dict[str, Any]) -> tuple[Any, Any]:
        """diffusers' schedulers for exports, and for the teacher's own images in several steps.

        `changes`: values that replace those of scheduler_config.json. Raises UserError, which `what` opens.
        """

    @abstractmethod
    def schedule(self, scheduler: Any) -> Schedule:
        """The path of a scheduler of diffusers, and what the network predicts on it."""

    def adapt(self, network: nn.Module) -> nn.Module:
        """The denoiser as this family's pipeline of diffusers changes it after loading, in place."""
        return network

    # what a network does

    @abstractmethod
    def predict(self, network: nn.Module, x: torch.Tensor, t: torch.Tensor, cond: Conditions) -> torch.Tensor:
        """The output o [N, C, H, W] for x [N, C, H, W], timesteps t [N] and Conditions of N samples, in the type of the
        conditions."""

    @abstractmethod
    def tokenize(self, teacher: Teacher, prompts: Sequence[str]) -> torch.Tensor:
        """N prompts -> what `encode` takes, [N, ...], on the CPU."""

    @abstractmethod
    def encode(self, teacher: Teacher, ids: torch.Tensor, size: tuple[int, int]) -> Conditions:
        """What `tokenize` gives, on the device of the text encoders -> Conditions of N samples, in their type, for
        images of `size`, (height, width) in pixels."""

    def encode_empty(self, teacher: Teacher, size: tuple[int, int]) -> Conditions:
        """The Conditions of no text, one sample, as the teacher's pipeline has them where guidance is used."""
        return self.encode(teacher, self.tokenize(teacher, [""]).to(teacher.device), size)

    @abstractmethod
    def conditions(self, teacher: Teacher, n: int, device: torch.device | str | None = None,
                   dtype: torch.dtype | None = None) -> Conditions:
        """Zeros in the shapes of the Conditions of n samples."""

    def capturable(self, teacher: Teacher) -> bool:
        """Whether a CUDA graph can hold `encode`."""
        return True

    def prompt_limit(self, teacher: Teacher) -> tuple[Any, int] | None:
        """(tokenizer, tokens that a prompt may have, start and end included), or None where there is no limit."""
        return None

    def latent_factor(self, teacher: Teacher) -> int:
        """Pixels along the side of a latent one."""
        return 2 ** (len(teacher.parts["vae"].config.block_out_channels) - 1)

    # diffusers' pipelines

    @abstractmethod
    def pipeline(self, teacher: Teacher) -> Any:
        """diffusers' pipeline of the teacher's networks, with the folder's own scheduler. Raises UserError where that
        is none of diffusers."""

    @abstractmethod
    def pipeline_of(self, parts: dict[str, Any], index: dict[str, Any] | None = None) -> Any:
        """diffusers' pipeline of these parts; `index`: a model_index.json, with flags of the pipeline."""

    @abstractmethod
    def one_step_pipeline(self, teacher: Teacher, network: nn.Module, t_init: int) -> Any:
        """The pipeline of exports: a generator's network with the teacher's other parts."""

    @abstractmethod
    def build(self, architecture: str, **tokens: int) -> dict[str, nn.Module]:
        """{part: network with random weights, on torch's default device} of one of `architectures`; `tokens`: special
        ids of the text encoders."""

    @abstractmethod
    def build_scheduler(self, architecture: str, changes: dict[str, Any]) -> Any:
        """diffusers' scheduler of one of `architectures`. Raises UserError for `changes` that are impossible."""
