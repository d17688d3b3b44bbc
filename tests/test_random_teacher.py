"""A teacher with random weights is one that training takes: small networks here, real sizes in test_real_size."""

import pytest
import torch

from sidfast import cli
from sidfast.teachers.families import ARCHITECTURES
from sidfast.teachers.load import load_teacher
from sidfast.teachers.sd import StableDiffusion

UNET = {"block_out_channels": (32, 32, 32, 32), "cross_attention_dim": 32, "attention_head_dim": 2}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_random_teacher_loads(prediction_type, tmp_path, monkeypatch):
    family = StableDiffusion()
    monkeypatch.setitem(family.architectures, "small", (UNET, TEXT, 16, prediction_type))
    monkeypatch.setitem(ARCHITECTURES, "small", family)
    assert cli.main(["random-teacher", "--architecture", "small", "--out", str(tmp_path / "teacher")]) == 0
    teacher = load_teacher(str(tmp_path / "teacher"))
    assert teacher.schedule.prediction_type == prediction_type and teacher.network.config.sample_size == 16
    ids = teacher.parts["tokenizer"](["a red circle"], padding="max_length", return_tensors="pt").input_ids
    text = teacher.parts["text_encoder"](ids)[0]
    assert text.shape == (1, 77, 32) and text.isfinite().all()
    sample = teacher.network(torch.zeros(1, 4, 16, 16), torch.tensor([500]), encoder_hidden_states=text.float()).sample
    assert sample.shape == (1, 4, 16, 16) and sample.isfinite().all()
