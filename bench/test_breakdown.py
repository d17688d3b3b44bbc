"""Where the time of SD 1.5's UNet goes, by kind of kernel, as diffusers has it and fused. Needs a GPU."""

import json

import pytest
import torch
from breakdown import kind_of, time_by_kind, trace_by_kind
from test_unet import prepare, unet  # noqa: F401 (a fixture)


@pytest.mark.parametrize("implementation", ("fused", "eager"))
def test_breakdown(machine, record, unet, implementation):  # noqa: F811
    if not machine.gpu:
        pytest.skip("needs a GPU")
    options = {"device": machine.device, "dtype": machine.dtype}
    x = torch.randn(16, 4, 64, 64, **options)
    text, dy = torch.randn(16, 77, 768, **options), torch.randn_like(x)
    t = torch.full((16,), 500, device=machine.device)
    prepare(unet, implementation)
    parameters = list(unet.requires_grad_(True).parameters())
    times = time_by_kind(
        lambda: torch.autograd.grad(unet(x, t, text, return_dict=False)[0], parameters, dy), machine.device)
    record("SD 1.5 UNet, batch 16, forward and backward, ms by kind", implementation, times)


@pytest.mark.parametrize("kernel, kind", [
    ("_group_norm_backward_sums_kernel", "normalisation"), ("_channel_stats_kernel", "normalisation"),
    ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, ...>", "layout"),
    ("sm90_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolution"),
    ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix products"), ("_geglu_backward_kernel", "activation"),
    ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*, void*, ...)", "attention"),
    ("_sum_rows_kernel", "reductions"), ("_accumulate_kernel", "reductions"), ("_separate_kernel", "layout"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
    ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>", "copies"), ("_sid_loss_kernel", "losses"),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "reductions"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "elementwise and other"),
])
def test_kernels_are_told_apart(kernel, kind):
    assert kind_of(kernel) == kind


def test_a_trace(tmp_path):
    """Kernels that overlap are busy once; what the host does counts for nothing."""
    events = [{"cat": "kernel", "name": "_geglu_kernel", "ts": 1000, "dur": 3000},
              {"cat": "gpu_memcpy", "name": "Memcpy DtoD", "ts": 2000, "dur": 4000},
              {"cat": "kernel", "name": "_geglu_kernel", "ts": 9000, "dur": 1000},
              {"cat": "cpu_op", "name": "aten::conv2d", "ts": 0, "dur": 50000}, {"ph": "M", "name": "process_name"}]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    assert trace_by_kind(tmp_path / "trace.json") == (
        {"activation": 4.0, "copies": 4.0}, {"busy": 6.0, "span": 9.0})
