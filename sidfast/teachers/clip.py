"""CLIP's texts: prompts to token ids, and to the states of a CLIP text encoder."""

from collections.abc import Sequence
from typing import Any

import torch


def tokenize(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Token ids [N, L], padded and cut to the tokenizer's length."""
    ids = tokenizer(list(texts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length,
                    return_attention_mask=False, return_tensors="np").input_ids    # half the time of "pt"
    return torch.from_numpy(ids)


def tokenize_for(text_encoder: Any, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Token ids [N, L], or ids and mask [N, 2, L] for a text encoder that takes a mask (`takes_mask`)."""
    if not takes_mask(text_encoder):
        return tokenize(tokenizer, texts)
    both = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt",
                     max_length=tokenizer.model_max_length)
    return torch.stack((both.input_ids, both.attention_mask), 1)


def states(text_encoder: Any, ids: torch.Tensor) -> torch.Tensor:
    """The last layer's states [N, L, D] of what `tokenize_for` gives."""
    ids, mask = ids.unbind(1) if takes_mask(text_encoder) else (ids, None)
    return text_encoder(ids, attention_mask=mask)[0]


def takes_mask(text_encoder: Any) -> bool:
    """Whether diffusers gives a text encoder the mask of its tokens (`use_attention_mask` in its config.json)."""
    return bool(getattr(text_encoder.config, "use_attention_mask", False))


def most_tokens(tokenizer: Any, config: Any) -> int | None:
    """The tokens that a prompt may have, start and end included, by a tokenizer and its text encoder's configuration;
    None for a text encoder without a fixed length."""
    positions = getattr(config, "max_position_embeddings", None)
    return min(tokenizer.model_max_length, positions) if positions else None


def prompt_limit(pipe: Any) -> tuple[Any, int] | None:
    """(tokenizer, `most_tokens`) of a pipeline with one text encoder of fixed length, or None."""
    parts = [getattr(pipe, name, None) for name in ("tokenizer", "text_encoder")]
    if None in parts or getattr(pipe, "text_encoder_2", None) is not None:
        return None
    most = most_tokens(parts[0], parts[1].config)
    return None if most is None else (parts[0], most)
