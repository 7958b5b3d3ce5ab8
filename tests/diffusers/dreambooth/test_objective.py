"""The objective: each formula against a plain reference, densities against their distributions, and what is refused."""

import math

import diffusers
import numpy as np
import pytest
import torch
from lora_adapters_diffusers.dreambooth.noise import NOISE, OFFSET, normal, posterior_noise
from lora_adapters_diffusers.dreambooth.objective import objective_of
from lora_adapters_diffusers.recipes import Diffusion

from lora_adapters.errors import RequestError, UnsupportedError

SHAPE = (3, 4, 5, 7)
NUMBERS = [(1, 2, 0, index) for index in range(3)]
SCHEDULE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


@pytest.fixture(scope="module")
def pipes(tiny):
    return {kind: tiny.build(kind) for kind in ("sd", "sd3", "flux")}


@pytest.fixture
def made(pipes):
    """Return an objective of a pipeline whose scheduler is replaced, from options of the recipe's section."""

    def make(scheduler=None, kind="sd", **options):
        pipe = pipes[kind]
        kept = pipe.scheduler
        try:
            pipe.scheduler = scheduler or kept
            return objective_of(pipe, Diffusion(**options))
        finally:
            pipe.scheduler = kept

    return make


def schedule(prediction="epsilon", **more):
    return diffusers.DDIMScheduler(prediction_type=prediction, **{**SCHEDULE, **more})


def latents(dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


def alpha_bar(betas=None):
    """Return the cumulated alphas of SD's schedule, in float64."""
    if betas is None:
        betas = np.linspace(math.sqrt(SCHEDULE["beta_start"]), math.sqrt(SCHEDULE["beta_end"]), 1000) ** 2
    return np.cumprod(1 - betas)


def per_row(values):
    return torch.tensor(values).view(-1, 1, 1, 1)


# ---- noise schedules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_targets_of_a_noise_schedule(made, prediction, dtype):
    x = latents(dtype)
    levels = torch.tensor([0.0, 0.4567, 0.99999])
    noisy, timesteps, target, weight = made(schedule(prediction)).noised_at(x, levels, NUMBERS)
    assert timesteps.tolist() == [0, 456, 999]
    x, noise = x.double(), normal(SHAPE[1:], NOISE, NUMBERS).double()
    alpha, sigma = (per_row(np.sqrt(a)) for a in (alpha_bar()[[0, 456, 999]], 1 - alpha_bar()[[0, 456, 999]]))
    wanted = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x, "sample": x}[prediction]
    torch.testing.assert_close(noisy.double(), alpha * x + sigma * noise, rtol=0, atol=2e-5)
    torch.testing.assert_close(target.double(), wanted, rtol=0, atol=2e-5)
    assert noisy.dtype == target.dtype == weight.dtype == torch.float32
    assert weight.tolist() == [1, 1, 1]


def test_the_recipe_may_say_another_prediction(made):
    objective = made(schedule("epsilon"), prediction="v_prediction")
    assert objective.prediction == "v_prediction"
    assert objective.for_inference(schedule()).config.prediction_type == "v_prediction"
    told = schedule("v_prediction")
    assert made(told).prediction == "v_prediction"
    assert made(told).for_inference(told) is told


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr(made, prediction):
    levels = torch.tensor([0.001, 0.3, 0.9])
    steps = [1, 300, 900]
    *_, weight = made(schedule(prediction), min_snr=5.0).noised_at(latents(), levels, NUMBERS)
    snr = alpha_bar()[steps] / (1 - alpha_bar()[steps])
    over = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[prediction]
    torch.testing.assert_close(weight.double(), torch.tensor(np.minimum(snr, 5) / over), rtol=1e-4, atol=0)
    assert snr[2] < 5 < snr[0]  # both sides of gamma are there


def test_min_snr_is_one_weight_in_three_forms(made):
    """An error d in the sample is one of d sqrt(SNR) in epsilon, and of d sqrt(SNR + 1) in v."""
    levels = torch.rand(3, generator=torch.Generator().manual_seed(3))
    snr = torch.tensor(alpha_bar()[(levels * 1000).long()])
    snr = snr / (1 - snr)
    kinds = {"sample": 1.0, "epsilon": snr, "v_prediction": snr + 1}
    found = [made(schedule(k), min_snr=2.0).noised_at(latents(), levels, NUMBERS).weight * f for k, f in kinds.items()]
    torch.testing.assert_close(found[0].double(), found[1].double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found[0].double(), found[2].double(), rtol=1e-4, atol=0)


def test_zero_terminal_snr(made):
    objective = made(schedule("v_prediction"), zero_terminal_snr=True)
    root = np.sqrt(alpha_bar())  # algorithm 1
    wanted = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    np.testing.assert_allclose(objective.schedule.alphas_cumprod.numpy(), wanted, atol=1e-5)
    assert objective.schedule.alphas_cumprod[-1] == 0
    noisy, _, target, _ = objective.noised_at(latents(), torch.tensor([0.9999] * 3), NUMBERS)
    assert torch.equal(noisy, normal(SHAPE[1:], NOISE, NUMBERS))  # pure noise
    assert torch.equal(target, -latents())
    assert made(schedule("v_prediction")).schedule.alphas_cumprod[-1] > 0


def test_zero_terminal_snr_at_inference(made):
    objective = made(schedule("v_prediction"), zero_terminal_snr=True)
    assert objective.scheduler_changes == {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    euler = objective.for_inference(diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", **SCHEDULE))
    assert isinstance(euler, diffusers.EulerDiscreteScheduler)
    assert euler.alphas_cumprod[-1] < 1e-6
    other = objective.for_inference(diffusers.PNDMScheduler(prediction_type="v_prediction", **SCHEDULE))
    assert isinstance(other, diffusers.DDIMScheduler)  # PNDM can't
    assert other.alphas_cumprod[-1] == 0
    other.set_timesteps(4)
    assert other.timesteps[0] == 999


def test_noise_offset(made):
    offset, plain = (made(schedule(), noise_offset=share).noised(latents(), NUMBERS).target for share in (0.1, 0.0))
    constant = offset - plain
    wanted = 0.1 * normal((4, 1, 1), OFFSET, NUMBERS)
    torch.testing.assert_close(constant, wanted.expand(SHAPE), rtol=0, atol=1e-6)
    assert constant.abs().min() > 1e-4


# ---- flow matching ---------------------------------------------------------------------------------------------------


def test_flow_matching(made):
    levels = torch.tensor([0.0, 0.25, 0.9])
    noisy, timesteps, target, weight = made(kind="sd3").noised_at(latents(), levels, NUMBERS)
    noise, t = normal(SHAPE[1:], NOISE, NUMBERS), per_row([0.0, 0.25, 0.9])
    torch.testing.assert_close(noisy, (1 - t) * latents() + t * noise)
    torch.testing.assert_close(target, noise - latents())
    torch.testing.assert_close(timesteps, torch.tensor([0.0, 250.0, 900.0]))
    assert weight.tolist() == [1, 1, 1]
    # The derivative of the path, by differences
    further = made(kind="sd3").noised_at(latents(), levels + 0.01, NUMBERS).noisy
    torch.testing.assert_close((further - noisy) / 0.01, target, rtol=0, atol=1e-3)


def test_a_unet_of_flow_matching(made):
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3)
    objective = made(scheduler, timesteps="shifted")
    assert objective.prediction == "flow"
    assert not torch.equal(objective.levels(latents(), NUMBERS), made(scheduler).levels(latents(), NUMBERS))


def phi(x):
    return 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def logit_normal(mean=0.0, std=1.0):
    return lambda t: phi((np.log(t) - np.log1p(-t) - mean) / std)


def shifted(by):
    return lambda t: logit_normal()(t / (by - (by - 1) * t))


def distance(objective, cdf, count=3000):
    """Return the Kolmogorov-Smirnov distance of drawn levels from a distribution, times sqrt(n): above 1.95 once in a
    thousand times."""
    numbers = [(0, step, 0, 0) for step in range(count)]
    drawn = np.sort(objective.levels(torch.zeros(count, 4, 64, 64), numbers).double().numpy())
    return np.abs(cdf(drawn) - (np.arange(count) + 0.5) / count).max() * math.sqrt(count)


def flux_schedule(**more):
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, **more)


def test_densities(made):
    tokens = 32 * 32  # of 64 x 64 latents
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    static = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    uniform = made(schedule())
    cases = {
        "uniform": (uniform, lambda t: t),
        "uniform flow": (made(kind="sd3", timesteps="uniform"), lambda t: t),
        "logit_normal": (made(kind="sd3"), logit_normal()),
        "logit_normal of a schedule": (made(schedule(), timesteps="logit_normal"), logit_normal()),
        "mean and std": (made(kind="sd3", logit_mean=0.7, logit_std=1.6), logit_normal(0.7, 1.6)),
        "shift": (made(kind="sd3", timesteps="shifted", shift=2.0), shifted(2.0)),
        "the scheduler's shift": (made(static, "sd3", timesteps="shifted"), shifted(3.0)),
        "shift by size": (made(flux_schedule(), "flux", timesteps="shifted"), shifted(math.exp(mu))),
    }
    for name, (objective, cdf) in cases.items():
        assert distance(objective, cdf) < 1.95, name
    assert distance(uniform, logit_normal()) > 5  # the test can fail
    assert distance(cases["shift"][0], shifted(2.4)) > 2.5


@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_shift_is_that_of_inference(made, kind):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = flux_schedule(time_shift_type=kind)
    objective = made(scheduler, "flux", timesteps="shifted")
    even = np.linspace(1.0, 0.1, 10)
    scheduler.set_timesteps(sigmas=even, mu=calculate_shift(16 * 24))
    moved = objective._shift(torch.tensor(even), torch.zeros(10, 4, 32, 48))
    torch.testing.assert_close(moved.float(), scheduler.sigmas[:-1], rtol=1e-5, atol=1e-6)


def test_timesteps_of_a_schedule_are_all_drawn_alike(made):
    numbers = [(7, step) for step in range(2000)]
    timesteps = made(schedule()).noised(torch.zeros(2000, 4, 1, 1), numbers).timesteps
    assert timesteps.dtype == torch.int64
    counts = torch.histc(timesteps.float(), 10, 0, 1000)
    assert ((counts - 200).square() / 200).sum() < 27.9  # chi squared, 9 degrees: once in a thousand


# ---- what follows from what ------------------------------------------------------------------------------------------


def test_another_split_sees_the_same(made):
    objective = made(schedule(), noise_offset=0.1)
    together = objective.noised(latents(), NUMBERS)
    for row in range(3):
        alone = objective.noised(latents()[row : row + 1], NUMBERS[row : row + 1])
        assert all(torch.equal(one, many[row : row + 1]) for one, many in zip(alone, together, strict=True))
    torch.manual_seed(1)
    assert torch.equal(objective.noised(latents(), NUMBERS).noisy, together.noisy)


def test_every_number_counts():
    draws = {n: normal((2,), NOISE, [n]) for n in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 2), (1, 2, 3, 0)]}
    assert len({tuple(value.flatten().tolist()) for value in draws.values()}) == len(draws)
    noise = normal(SHAPE[1:], NOISE, NUMBERS)
    assert (posterior_noise(noise, NUMBERS) - noise).abs().min() > 0


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_of_each_image(made, dtype):
    prediction, target = latents(dtype), torch.randn(SHAPE)
    weight = torch.tensor([1.0, 0.5, 0.0])
    found = made().loss(prediction, target, weight)
    wanted = [w * ((p.double() - t.double()) ** 2).mean() for p, t, w in zip(prediction, target, weight, strict=True)]
    torch.testing.assert_close(found.double(), torch.stack(wanted), rtol=1e-5, atol=1e-7)
    assert found.dtype == torch.float32


def test_masked_loss(made):
    prediction, target, weight = latents(), torch.randn(SHAPE), torch.ones(3)
    mask = (torch.rand(3, 1, 5 * 8, 7 * 8) > 0.4).float()
    mask = 0.25 + 0.75 * mask
    found = made().loss(prediction, target, weight, mask)
    small = mask.view(3, 1, 5, 8, 7, 8).mean((3, 5))
    wanted = ((prediction - target) ** 2 * small).mean((1, 2, 3))
    torch.testing.assert_close(found, wanted)
    whole = made().loss(prediction, target, weight)
    torch.testing.assert_close(made().loss(prediction, target, weight, torch.ones_like(mask)), whole)
    assert not made().loss(prediction, target, weight, torch.zeros_like(mask)).any()
    odd = made().loss(prediction, target, weight, torch.ones(3, 1, 37, 50))
    torch.testing.assert_close(odd, whole)


def test_nothing_is_learned_where_the_mask_is_black(made):
    prediction = latents().requires_grad_()
    mask = torch.zeros(3, 1, 40, 56)
    mask[..., :8, :8] = 1
    made().loss(prediction, torch.zeros(SHAPE), torch.ones(3), mask).sum().backward()
    assert prediction.grad[..., 0, 0].all()
    prediction.grad[..., 0, 0] = 0
    assert not prediction.grad.any()


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("sd", dict(prediction="flow"), "has a noise schedule"),
        ("sd3", dict(prediction="epsilon"), "which is flow matching"),
        ("sd3", dict(min_snr=5.0), "of noise schedules"),
        ("flux", dict(zero_terminal_snr=True), "of noise schedules"),
        ("sd", dict(timesteps="shifted"), "for flow matching"),
        ("sd3", dict(shift=3.0), "without timesteps=shifted"),
        ("sd", dict(logit_std=2.0), "no effect on uniform"),
        ("sd3", dict(timesteps="uniform", logit_mean=1.0), "no effect on uniform"),
        ("sd", dict(zero_terminal_snr=True), "predicts v or the sample"),
    ],
)
def test_what_does_not_go_together(made, kind, options, message):
    with pytest.raises(RequestError, match=message):
        made(kind=kind, **options)


def test_schedulers_without_a_schedule(made):
    with pytest.raises(UnsupportedError, match="no noise schedule"):
        made(diffusers.EDMEulerScheduler())
    with pytest.raises(RequestError, match="rescale_betas_zero_snr"):
        made(schedule(rescale_betas_zero_snr=True))
