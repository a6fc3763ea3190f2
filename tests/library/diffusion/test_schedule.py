import pytest
import torch
from diffusers import DDPMScheduler

from library.diffusion.schedule import NoiseSchedule
from tests.library.diffusion.golden import golden

WEIGHTS = golden("loss_weights")
VELOCITY = golden("noise")["velocity"]


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule.stable_diffusion()


def velocity_case():
    torch.manual_seed(VELOCITY["seed"])
    return torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2), torch.tensor([100, 800])


def betas(schedule):
    """Variance added at each timestep, as ``alphas_cumprod`` tells it."""
    kept = schedule.alphas_cumprod.double()
    return (1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])).float()


def test_betas_and_what_is_left_equal_the_reference(schedule):
    timesteps = WEIGHTS["timesteps"]
    torch.testing.assert_close(betas(schedule)[timesteps], torch.tensor(WEIGHTS["betas"]), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(schedule.alphas_cumprod[timesteps], torch.tensor(WEIGHTS["alphas_cumprod"]))


def test_snr_equals_the_reference(schedule):
    snr = schedule.snr(torch.tensor(WEIGHTS["timesteps"]))
    torch.testing.assert_close(snr, torch.tensor(WEIGHTS["snr"]), rtol=1e-4, atol=0)


def test_sigma_is_the_inverse_root_of_snr(schedule):
    timesteps = torch.tensor([0, 500, 999])
    kept = schedule.alphas_cumprod.double()[timesteps]
    torch.testing.assert_close(schedule.sigma(timesteps).double(), ((1 - kept) / kept).sqrt(), rtol=1e-4, atol=0)


def test_zero_terminal_schedule_equals_the_reference():
    schedule = NoiseSchedule.stable_diffusion(zero_terminal_snr=True)
    expected = WEIGHTS["zero_terminal_snr"]
    torch.testing.assert_close(
        betas(schedule)[WEIGHTS["timesteps"]], torch.tensor(expected["betas"]), rtol=1e-4, atol=1e-6
    )
    every_25th = [*range(0, 1000, 25), 999]
    torch.testing.assert_close(
        schedule.alphas_cumprod[every_25th], torch.tensor(expected["alphas_cumprod_full"]), rtol=1e-4, atol=1e-7
    )
    assert schedule.alphas_cumprod[-1] == 0
    assert schedule.snr(torch.tensor([999])).tolist() == [0.0]
    assert schedule.sigma(torch.tensor([999])).tolist() == [float("inf")]


def test_add_noise_and_velocity_equal_the_reference(schedule):
    latents, noise, timesteps = velocity_case()
    noisy, velocity = (
        method(latents, noise, timesteps).flatten() for method in (schedule.add_noise, schedule.velocity)
    )
    torch.testing.assert_close(noisy, torch.tensor(VELOCITY["noisy"]), atol=2e-6, rtol=0)
    torch.testing.assert_close(velocity, torch.tensor(VELOCITY["velocity"]), atol=2e-6, rtol=0)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_add_noise_and_velocity_equal_diffusers(zero_terminal_snr):
    theirs = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    ours = NoiseSchedule.stable_diffusion(zero_terminal_snr=zero_terminal_snr)
    latents, noise = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([0, 10, 500, 998, 999])
    torch.testing.assert_close(
        ours.add_noise(latents, noise, timesteps), theirs.add_noise(latents, noise, timesteps), atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(
        ours.velocity(latents, noise, timesteps), theirs.get_velocity(latents, noise, timesteps), atol=1e-6, rtol=1e-5
    )


def test_results_are_on_the_device_of_what_they_are_made_for(schedule):
    latents = torch.zeros(2, 4, 2, 2, device="meta")
    timesteps = torch.tensor([1, 2])
    assert schedule.add_noise(latents, latents, timesteps).device.type == "meta"
    assert schedule.snr(timesteps.to("meta")).device.type == "meta"
    assert schedule.snr(timesteps).device.type == "cpu"


def test_the_dtype_of_latents_is_kept(schedule):
    latents = torch.zeros(2, 4, 2, 2, dtype=torch.bfloat16)
    assert schedule.add_noise(latents, latents, torch.tensor([1, 2])).dtype == torch.bfloat16
