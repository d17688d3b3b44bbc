"""Parts of other libraries that are private to them, or promised nowhere, and that ours stand on.

An upgrade that moves one fails here first, by its name; pyproject.toml has ceilings for DeepSpeed and torch because of
those. `test_no_other_private_part_is_used` keeps the list complete.
"""

import ast
import inspect
import re
import weakref

import deepspeed
import diffusers
import pytest
import torch
import transformers
import triton
from conftest import ROOT
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime import bf16_optimizer, config, config_utils, engine
from deepspeed.runtime.fp16 import fused_optimizer, loss_scaler, unfused_optimizer
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.runtime.zero import utils as zero_utils
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.pipelines import auto_pipeline
from torch.distributed import distributed_c10d
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from torchmetrics.image.fid import FrechetInceptionDistance
from triton.runtime.jit import JITFunction, KernelInterface

# Every underscored name of another library in sidfast/ and kernels/, and the test below that looks at it.
UNDERSCORED = {
    "_cdata": "test_storages_and_operators", "_overloadpacket": "test_storages_and_operators",
    "_schema": "test_storages_and_operators", "_pytree": "test_storages_and_operators",
    "_python_dispatch": "test_storages_and_operators",
    "_scaled_dot_product_efficient_attention": "test_attention_on_the_meta_device",
    "_scaled_dot_product_flash_attention": "test_attention_on_the_meta_device",
    "_foreach_zero_": "test_many_tensors_at_once", "_foreach_lerp_": "test_many_tensors_at_once",
    "_parameters": "test_parameters_of_a_module",
    "_hp_mapping": "test_deepspeed_keeps_master_weights",
    "_global_grad_norm": "test_deepspeed_asks_the_optimizer",
    "_get_signature_keys": "test_pipelines", "_optional_components": "test_pipelines",
    "_execution_device": "test_pipelines", "_callback_tensor_inputs": "test_pipelines",
    "_supports_sdpa": "test_text_encoders",
}
PUBLIC = {"_exit", "_replace", "_fields", "_asdict"}     # of os, and of named tuples


def private_names():
    """The underscored names of attributes and modules that our code reads and does not define."""
    read, ours = {}, set()
    for path in (*sorted((ROOT / "sidfast").rglob("*.py")), *sorted((ROOT / "kernels").glob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
            elif isinstance(node, ast.Attribute):
                if isinstance(node.ctx, ast.Store) and getattr(node.value, "id", None) in ("self", "cls", "ctx"):
                    ours.add(node.attr)
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("sidfast"):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "hasattr", "setattr"):
                names = [node.args[1].value] if isinstance(node.args[1], ast.Constant) else []
            read |= {name: path for name in names if re.match("_[a-zA-Z]", name)}
    return {name: path for name, path in read.items() if name not in ours | PUBLIC}


def test_no_other_private_part_is_used():
    assert private_names().keys() <= UNDERSCORED.keys(), "name it above, with a test of what it is"
    assert all(callable(globals()[test]) for test in UNDERSCORED.values())


# ---- torch

def test_storages_and_operators():
    """planning/footprint.py knows memory by the storage's address, and operators by name; accel/prepacked.py too."""
    x = torch.zeros(4, device="meta")
    assert isinstance(x.untyped_storage()._cdata, int)
    assert x.untyped_storage()._cdata == x.view(2, 2).untyped_storage()._cdata != (x + 1).untyped_storage()._cdata
    weakref.finalize(x.untyped_storage(), print)         # (a storage can be watched)
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Mode():
        torch.mm(torch.zeros(2, 3), torch.zeros(3, 4)).relu_().view(8)
    mm, relu, view = seen[-3:]
    assert mm._overloadpacket is torch.ops.aten.mm
    assert flop_registry[mm._overloadpacket](torch.zeros(2, 3), torch.zeros(3, 4), out_val=torch.zeros(2, 4)) == 48
    assert relu._schema.name == "aten::relu_" and view.is_view and not mm.is_view
    assert list(tree_iter(((1, [2]), {"a": 3}))) == [1, 2, 3]


@pytest.mark.parametrize("name, more, dtype", [("efficient", (None, True), torch.float32),
                                               ("flash", (), torch.bfloat16)])
def test_attention_on_the_meta_device(name, more, dtype):
    """planning/footprint.py counts what a GPU's attention keeps; diffusers must call it by its name in F."""
    q, k, v = (torch.zeros(1, 2, 64, 8, device="meta", dtype=dtype, requires_grad=True) for _ in range(3))
    y, *_ = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention")(q, k, v, *more)
    assert y.shape == q.shape and len(torch.autograd.grad(y.float().sum(), (q, k, v))) == 3
    assert F.scaled_dot_product_attention is torch.nn.functional.scaled_dot_product_attention
    assert "F.scaled_dot_product_attention(" in inspect.getsource(diffusers.models.attention_processor)


def test_many_tensors_at_once():
    """engines/accumulate.py and averages/ema.py."""
    a, b = [torch.ones(2), torch.ones(3)], [torch.full((2,), 3.0), torch.full((3,), 5.0)]
    torch._foreach_lerp_(a, b, 0.5)
    assert a[0].tolist() == [2, 2] and a[1].tolist() == [3, 3, 3]
    torch._foreach_zero_(a)
    assert not a[0].any() and not a[1].any()


def test_parameters_of_a_module():
    """engines/blocks.py takes a parameter away, and a tensor in the instance's dictionary stands for it."""
    layer = torch.nn.Linear(2, 2)
    del layer._parameters["weight"]
    layer.__dict__["weight"] = torch.eye(2)
    assert layer.weight.tolist() == [[1, 0], [0, 1]] and [name for name, _ in layer.named_parameters()] == ["bias"]


def test_timeouts_of_groups_that_others_make():
    """train.py sets both defaults; a group made without a timeout of its own reads them as it is made."""
    source = inspect.getsource(distributed_c10d._get_default_timeout)
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        assert hasattr(distributed_c10d, name) and name in source


def test_limits_of_recompilation():
    """accel/plan.py raises them, so that no block runs as written in silence."""
    limits = torch.compiler.config
    for name in ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit"):
        assert hasattr(limits, name)


def test_fused_adam_writes_its_first_moment_where_it_read_it():
    """engines/adam.py puts the gradient there: with beta1 = 0 the moment after a step is the gradient itself."""
    p = torch.ones(3, requires_grad=True)
    adam = torch.optim.Adam([p], lr=0.1, betas=(0.0, 0.9), fused=True)
    p.grad = torch.tensor([1.0, -2.0, 3.0])
    adam.step()
    assert torch.equal(adam.state[p]["exp_avg"], p.grad)
    assert adam.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"} and isinstance(adam.state[p]["step"], torch.Tensor)


# ---- triton

def test_launches():
    """kernels/backend.py takes the place of the one method by which kernels are launched, for plans of memory."""
    assert "__getitem__" in vars(KernelInterface) and issubclass(JITFunction, KernelInterface)
    assert "__getitem__" not in vars(JITFunction)
    assert triton.knobs.runtime.interpret in (True, False)


# ---- DeepSpeed

@pytest.mark.parametrize("optimizer, name", [
    (stage3.DeepSpeedZeroOptimizer_Stage3, "fp32_partitioned_groups_flat"),
    (stage_1_and_2.DeepSpeedZeroOptimizer, "single_partition_of_fp32_groups"),
    (bf16_optimizer.BF16_Optimizer, "fp32_groups_flat_partition"),
    (unfused_optimizer.FP16_UnfusedOptimizer, "fp32_groups")], ids=lambda v: getattr(v, "__name__", v))
def test_deepspeed_keeps_master_weights(optimizer, name):
    """engines/engine.py finds them by these names; `gather` and `scatter` go through DeepSpeed's own functions."""
    assert re.search(rf"self\.{name}\b.* = ", inspect.getsource(optimizer))
    for function in (deepspeed.utils.safe_get_full_fp32_param, deepspeed.utils.safe_set_full_fp32_param):
        source = inspect.getsource(function)
        assert "_hp_mapping" in source and "ds_id" in source
    assert "ds_shape" in inspect.getsource(engine)


def test_deepspeed_asks_the_optimizer():
    """engines/adam.py answers: whether a step was left out, and the gradient's norm."""
    source = inspect.getsource(engine.DeepSpeedEngine)
    for name in ("overflow", "_global_grad_norm"):
        assert f"hasattr(self.optimizer, '{name}')" in source.replace('"', "'")
    for name in ("get_global_grad_norm", "fp16_enabled", "is_gradient_accumulation_boundary", "gradient_clipping",
                 "destroy"):
        assert callable(getattr(engine.DeepSpeedEngine, name))
    assert "self.basic_optimizer = " in source


def test_deepspeed_knows_optimizers_by_their_very_type():
    """engines/engine.py adds its own to the list."""
    assert isinstance(zero_utils.ZERO_SUPPORTED_OPTIMIZERS, list)
    assert torch.optim.Adam in zero_utils.ZERO_SUPPORTED_OPTIMIZERS
    assert "type(optimizer) in ZERO_SUPPORTED_OPTIMIZERS" in inspect.getsource(zero_utils.is_zero_supported_optimizer)
    assert "adamw_mode" in inspect.signature(DeepSpeedCPUAdam.__init__).parameters


def test_deepspeed_scales_losses():
    """engines/engine.py saves and sets the counters of the dynamic scaler by name."""
    counters = vars(loss_scaler.DynamicLossScaler(2.0**8, 2.0, 1000, 1.0, 2, False))
    assert {"cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"} <= counters.keys()
    for module in (stage3, stage_1_and_2):
        assert "self.loss_scaler = " in inspect.getsource(module)
    for module in (fused_optimizer, unfused_optimizer):
        assert "self.loss_scale_config = " in inspect.getsource(module)


def test_deepspeed_reads_its_section():
    """engines/validate.py has it read, and names the model of a fault; tests/test_config.py compares the keys."""
    assert callable(config.DeepSpeedConfig)
    names = {model.__name__ for model in config_utils.DeepSpeedConfigModel.__subclasses__()}
    assert {"DeepSpeedZeroConfig", "DeepSpeedFP16Config", "DeepSpeedBF16Config"} <= names


# ---- diffusers, transformers, torchmetrics

def test_pipelines():
    """publishing/load.py asks a class what it is made of, publishing/pipeline.py where it runs."""
    expected, options = diffusers.StableDiffusionPipeline._get_signature_keys(diffusers.StableDiffusionPipeline)
    assert {"vae", "text_encoder", "unet", "safety_checker"} <= set(expected) and "requires_safety_checker" in options
    assert "safety_checker" in diffusers.StableDiffusionPipeline._optional_components
    assert isinstance(diffusers.DiffusionPipeline._execution_device, property)
    assert "latents" in diffusers.StableDiffusionPipeline._callback_tensor_inputs
    assert callable(diffusers.DiffusionPipeline.maybe_free_model_hooks)
    assert diffusers.DiffusionPipeline.config_name == "model_index.json"
    for task in ("TEXT2IMAGE", "IMAGE2IMAGE", "INPAINT"):
        assert "stable-diffusion" in getattr(auto_pipeline, f"AUTO_{task}_PIPELINES_MAPPING")


def test_parts_of_networks():
    """accel/unet*.py and accel/decoder.py give modules another forward pass, over parts that have these names."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",),
                                              up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=8)
        vae = diffusers.AutoencoderKL()
    blocks = (*unet.down_blocks, unet.mid_block, *unet.up_blocks, vae.decoder.mid_block)
    assert all(hasattr(block, "resnets") and hasattr(block, "attentions") for block in blocks)
    assert hasattr(unet.down_blocks[0], "downsamplers") and hasattr(unet.up_blocks[0], "upsamplers")
    for name in ("conv_in", "conv_norm_out", "conv_out", "time_embedding", "get_time_embed", "get_aug_embed"):
        assert callable(getattr(unet, name))
    parts = {ResnetBlock2D: ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut"),
             Transformer2DModel: ("norm", "proj_in", "transformer_blocks", "proj_out"),
             BasicTransformerBlock: ("norm1", "attn1", "norm2", "attn2", "norm3", "ff"),
             Attention: ("to_q", "to_k", "to_v", "to_out", "heads", "group_norm")}
    for kind, names in parts.items():
        found = [m for network in (unet, vae) for m in network.modules() if type(m) is kind]
        assert found and all(hasattr(m, name) for m in found for name in names), kind


def test_text_encoders():
    """teachers/untrusted.py fixes the attention; teachers/fingerprint.py and publishing/export.py look at the tokenizer
    itself; evaluation/features.py reads the embeddings."""
    assert transformers.CLIPTextModel._supports_sdpa is True
    assert isinstance(transformers.CLIPTokenizer.backend_tokenizer, property)
    with torch.device("meta"):
        tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=tiny, vision_config=tiny, projection_dim=4))
        text = clip.get_text_features(input_ids=torch.zeros(2, 5, dtype=torch.long))
        images = clip.get_image_features(pixel_values=torch.zeros(2, 3, 224, 224))
    assert text.pooler_output.shape == images.pooler_output.shape == (2, 4)


def test_sums_of_fid():
    """evaluation/metrics.py writes them where a file has the statistics alone."""
    source = inspect.getsource(FrechetInceptionDistance)
    for name in ("real_features_sum", "real_features_cov_sum", "real_features_num_samples", "fake_features_sum"):
        assert f'"{name}"' in source
