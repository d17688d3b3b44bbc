"""Feature networks of the real architectures with random weights, in the files that the real ones come in."""

from unittest import mock

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from sidfast.teachers.tokenizer import build_tokenizer


def write_inception(path):
    """A file such as torch-fidelity's own, with weights that keep activations at a trained network's size."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    network = theirs.FeatureExtractorInceptionV3
    with (mock.patch.object(theirs, "load_state_dict_from_url", lambda *_, **__: {}),
          mock.patch.object(network, "load_state_dict", lambda *_: None)):
        torch.manual_seed(0)
        inception = network("random", ["2048"])
    for name, buffer in inception.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(0.2)
    torch.save(inception.state_dict(), path)
    return path


def write_clip(folder):
    """A CLIP ViT-L/14 with random weights and the shapes world's tokenizer, as a transformers folder."""
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768,
                          bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                          pad_token_id=tokenizer.pad_token_id)
    vision = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                              patch_size=14, projection_dim=768)
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=768))
    for part in (clip, tokenizer, CLIPImageProcessor()):
        part.save_pretrained(folder)
    return folder
