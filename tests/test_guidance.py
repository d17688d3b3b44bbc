"""Which passes guidance runs, and denoising and noising against diffusers' schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from helpers_method import TEXT, TinyUNet, assert_close, objective_of, random_batch
from sidfast.kernels.guidance import denoise, guide
from sidfast.kernels.noising import add_noise

from sidfast.accel.unet import fuse
from sidfast.method.equations import copies, predict_guided
from sidfast.method.equations import passes as passes_of
from sidfast.method.generator import generate
from sidfast.teachers.paths import DiscreteBetas
from sidfast.teachers.sd import StableDiffusion

predict = StableDiffusion().predict

PREDICTION_TYPES = ("epsilon", "v_prediction")
TIMESTEPS = (1, 20, 400, 979)


class Recorder:
    """A network that keeps what it is called with."""

    def __init__(self, network):
        self.network, self.calls = network, []

    def __call__(self, x, t, encoder_hidden_states, return_dict):
        self.calls.append((x, t, encoder_hidden_states))
        return self.network(x, t, encoder_hidden_states=encoder_hidden_states, return_dict=return_dict)


def scheduler(prediction_type):
    """DDIM over all 1000 timesteps."""
    result = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                           prediction_type=prediction_type)
    result.set_timesteps(1000)
    return result


@pytest.mark.parametrize("kappas, passes", [
    ([1], "cond"), ([1.0, 1], "cond"), ([0], "null"), ([0, 0.0], "null"), ([1.5], "both"), ([-1], "both"),
    ([0, 1], "both"), ([1, 0], "both"), ([1, 1.5], "both"), ([2, 2], "both"), ([0, -1], "both")], ids=str)
def test_passes(kappas, passes):
    batch, network = random_batch(3), Recorder(TinyUNet(0))
    x_in = batch.z.repeat(passes_of(kappas), 1, 1, 1)
    output = predict_guided(predict, network, x_in, batch.t, batch.cond, batch.uncond, kappas)

    [(x, t, text)] = network.calls                       # one pass, whatever the scales
    null = batch.uncond[TEXT].repeat(3, 1, 1)
    rows = {"cond": batch.cond[TEXT], "null": null, "both": torch.cat([null, batch.cond[TEXT]])}[passes]
    assert torch.equal(text, rows)
    repeat = len(rows) // 3
    assert torch.equal(x, batch.z.repeat(repeat, 1, 1, 1)) and torch.equal(t, batch.t.repeat(repeat))
    assert output.shape == (len(rows), *batch.z.shape[1:])
    assert copies(network, kappas) == passes_of(kappas)


def test_a_fused_network_gets_every_image_once():
    """It repeats images itself; what comes out is the same."""
    unet = UNet2DConditionModel(
        sample_size=4, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
        block_out_channels=(8,), layers_per_block=1, cross_attention_dim=12, attention_head_dim=4).requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    x, text, null = (torch.randn(*shape, generator=g) for shape in ((3, 4, 4, 4), (3, 5, 12), (1, 5, 12)))
    t, outputs = torch.tensor([3, 400, 990]), []
    for network in (unet, fuse(unet)):
        x_in = x.repeat(copies(network, [1.5]), 1, 1, 1)
        outputs.append(predict_guided(predict, network, x_in, t, {TEXT: text}, {TEXT: null}, [1.5]))
    assert len(x_in) == 3 and outputs[0].shape == (6, 4, 4, 4)
    assert_close("output", outputs[1], outputs[0], 1e-5)


@pytest.mark.parametrize("kappa", (0, 1, 1.5, -1, 4.5), ids="kappa={}".format)
def test_guided_output(kappa):
    """Whichever passes are run, the combination is o_null + kappa (o_cond - o_null)."""
    batch, network = random_batch(3), TinyUNet(0)
    x_in = batch.z.repeat(passes_of([kappa]), 1, 1, 1)
    got = guide(predict_guided(predict, network, x_in, batch.t, batch.cond, batch.uncond, [kappa]), 3, kappa)
    cond = network(batch.z, batch.t, batch.cond[TEXT], return_dict=False)[0].double()
    null = network(batch.z, batch.t, batch.uncond[TEXT].repeat(3, 1, 1), return_dict=False)[0].double()
    assert_close("output", got, null + kappa * (cond - null), 1e-6)
    assert not torch.allclose(cond, null, rtol=0.01)     # the prompt matters to the network


def test_guidance_refuses_other_row_counts():
    with pytest.raises(ValueError, match="5 rows are neither 3 nor 6"):
        guide(torch.zeros(5, 4, 2, 2), 3, 1.5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_networks_run_in_the_type_of_the_text(dtype):
    batch, network = random_batch(2), Recorder(TinyUNet(0).to(dtype))
    output = predict(network, batch.z, batch.t, {TEXT: batch.cond[TEXT].to(dtype)})
    assert network.calls[0][0].dtype == output.dtype == dtype


@pytest.mark.parametrize("kappa", (1, 1.5, 0), ids="kappa={}".format)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_denoise_is_that_of_diffusers(prediction_type, kappa):
    ddim, g, n = scheduler(prediction_type), torch.Generator().manual_seed(0), len(TIMESTEPS)
    rows = 2 * n if kappa not in (0, 1) else n
    x_t, output = (torch.randn(k, 4, 5, 3, generator=g) for k in (n, rows))
    schedule = DiscreteBetas(ddim.alphas_cumprod, prediction_type)
    got = denoise(output, x_t, *schedule.to_x0(*schedule.coefficients(torch.tensor(TIMESTEPS))), kappa)

    guided = output if rows == n else output[:n].double() + kappa * (output[n:].double() - output[:n].double())
    for i, t in enumerate(TIMESTEPS):
        want = ddim.step(guided[i].double(), t, x_t[i].double()).pred_original_sample
        assert_close(f"x_hat at t = {t}", got[i], want)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_noising_and_target_are_those_of_diffusers(prediction_type):
    ddim, g, n = scheduler(prediction_type), torch.Generator().manual_seed(0), len(TIMESTEPS)
    x, eps = (torch.randn(n, 4, 5, 3, generator=g) for _ in range(2))
    t = torch.tensor(TIMESTEPS)
    schedule = DiscreteBetas(ddim.alphas_cumprod, prediction_type)
    a, s = schedule.coefficients(t)
    assert_close("x_t", add_noise(x, eps, a, s, 1, torch.float32)[0], ddim.add_noise(x.double(), eps.double(), t))

    target, w = schedule.target(x, eps, a, s)
    if prediction_type == "epsilon":
        assert torch.equal(target, eps) and torch.equal(w, torch.ones(n))
    else:
        assert_close("target", target, ddim.get_velocity(x.double(), eps.double(), t))
        snr = ddim.alphas_cumprod[t].double() / (1 - ddim.alphas_cumprod[t].double())
        assert_close("w", w, snr / (snr + 1))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_denoising_the_exact_prediction_gives_the_image(prediction_type):
    g = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(3, 4, 5, 3, generator=g) for _ in range(2))
    schedule = objective_of(prediction_type=prediction_type).schedule
    a, s = schedule.coefficients(torch.tensor([20.0, 300.4, 800.9]))
    target, _ = schedule.target(x, eps, a, s)
    x_t = add_noise(x, eps, a, s, 1, torch.float32)[0]
    assert_close("x_hat", denoise(target, x_t, *schedule.to_x0(a, s), 1), x)


@pytest.mark.parametrize("t_init", (625, 300), ids="t_init={}".format)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_generator_is_one_step_of_diffusers(prediction_type, t_init):
    """Eq. 4: the network read as a denoiser of pure noise, scaled by s at t_init."""
    ddim, batch, network = scheduler(prediction_type), random_batch(3), TinyUNet(0)
    objective = objective_of(prediction_type=prediction_type, t_init=t_init)
    got = generate(network, batch.z, batch.cond, objective)

    x_t = ddim.add_noise(torch.zeros_like(batch.z), batch.z, torch.tensor([t_init] * 3))
    output = network(x_t, torch.full((3,), t_init), batch.cond[TEXT], return_dict=False)[0]
    assert_close("x_g", got, ddim.step(output, t_init, x_t).pred_original_sample)


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="'sample' is not one of epsilon, v_prediction"):
        DiscreteBetas([0.9, 0.5], "sample")
