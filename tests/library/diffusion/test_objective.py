import pickle

import pytest
import torch

from library.diffusion.noise import perturb_noise, sample_noise, sample_timesteps
from library.diffusion.objective import DenoisingObjective, element_loss, latent_mask, smooth_l1_loss
from library.diffusion.options import LossOptions, NoiseOptions
from library.diffusion.schedule import NoiseSchedule
from tests.library.diffusion.golden import golden

HUBER = golden("huber")
MASKED = golden("masked_loss")
HUBER_TIMESTEPS = [0, 250, 500, 999]
KEYS = [(7, 1, example) for example in range(4)]
LATENTS = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(2))


def objective(prediction="epsilon", *, noise=None, loss=None, zero_terminal_snr=False):
    schedule = NoiseSchedule.stable_diffusion(zero_terminal_snr=zero_terminal_snr)
    return DenoisingObjective(
        schedule, prediction, noise=NoiseOptions(**(noise or {})), loss=LossOptions(**(loss or {}))
    )


def huber_case(case):
    options = {name: case[name] for name in ("loss_type", "huber_schedule", "huber_c", "huber_scale")}
    prediction, target = (torch.tensor(HUBER[name]).view(4, 1, 2, 2) for name in ("pred", "target"))
    return element_loss(LossOptions(**options), NoiseSchedule.stable_diffusion()), prediction, target


@pytest.mark.parametrize(
    "case", HUBER["cases"], ids=lambda c: f"{c['loss_type']}-{c['huber_schedule']}-{c['huber_c']}-{c['huber_scale']}"
)
def test_losses_equal_the_reference(case):
    loss, prediction, target = huber_case(case)
    losses = loss(prediction, target, torch.tensor(HUBER_TIMESTEPS)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses, torch.tensor(case["per_sample_loss"]), atol=1e-6, rtol=1e-5)
    assert losses.mean().item() == pytest.approx(case["mean"], rel=1e-5)


def test_l1_is_the_absolute_error():
    loss = element_loss(LossOptions(loss_type="l1"), NoiseSchedule.stable_diffusion())
    assert loss(torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 1.0]]), torch.tensor([0])).tolist() == [[2, 3]]


def test_small_errors_keep_their_digits():
    error = torch.tensor([[1e-6]], dtype=torch.float32)
    loss = smooth_l1_loss(error, torch.zeros(1, 1), torch.ones(1))
    # (1 + 1e-12) ** 0.5 - 1 is 0 in 32 bits.
    assert loss.item() == pytest.approx(1e-12, rel=1e-4)


def test_masked_losses_equal_the_reference():
    torch.manual_seed(5)
    losses = torch.rand(1, 4, 4, 4)
    mask = (torch.rand(1, 32, 32) > 0.5).float()
    torch.testing.assert_close(losses.flatten(), torch.tensor(MASKED["loss"]), atol=1e-6, rtol=0)
    small = latent_mask(mask, (4, 4))
    torch.testing.assert_close(small.flatten(), torch.tensor(MASKED["mask_downsampled"]))
    torch.testing.assert_close((losses * small).flatten(), torch.tensor(MASKED["result"]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_a_model_that_finds_its_target_has_no_loss(prediction, zero_terminal_snr):
    noise_options = NoiseOptions(noise_offset=0.1, ip_noise_gamma=0.2)
    schedule = NoiseSchedule.stable_diffusion(zero_terminal_snr=zero_terminal_snr)
    made = DenoisingObjective(schedule, prediction, noise=noise_options, loss=LossOptions())
    noise = sample_noise(LATENTS, KEYS, noise_options)
    seen = []

    def predict(noisy, timesteps):
        seen.append((noisy, timesteps))
        kept = schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return noise if prediction == "epsilon" else kept.sqrt() * noise - (1 - kept).sqrt() * LATENTS

    assert made(predict, LATENTS, keys=KEYS).tolist() == pytest.approx([0] * 4, abs=1e-10)
    [(noisy, timesteps)] = seen
    assert torch.equal(timesteps, sample_timesteps(KEYS, noise_options))
    # Input perturbation is in what the model sees, and not in what it is to find.
    mixed_in = perturb_noise(noise, KEYS, noise_options)
    assert torch.equal(noisy, schedule.add_noise(LATENTS, mixed_in, timesteps))
    assert not torch.allclose(mixed_in, noise)


def test_the_loss_is_the_masked_mean_times_the_weight_of_the_timestep():
    made = objective(loss={"min_snr_gamma": 5.0})
    mask = torch.rand(4, 32, 32, generator=torch.Generator().manual_seed(3))
    losses = made(lambda noisy, timesteps: torch.zeros_like(noisy), LATENTS, keys=KEYS, mask=mask)
    noise, timesteps = sample_noise(LATENTS, KEYS, NoiseOptions()), sample_timesteps(KEYS, NoiseOptions())
    kept = NoiseSchedule.stable_diffusion().alphas_cumprod.double()[timesteps]
    snr = kept / (1 - kept)
    weight = torch.minimum(snr, torch.tensor(5.0)) / snr
    averaged = mask.view(4, 1, 4, 8, 4, 8).mean(dim=(3, 5))
    expected = (noise**2 * averaged).mean(dim=(1, 2, 3)).double() * weight
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0)
    assert losses.dtype == torch.float32


def test_weights_follow_the_schedule_that_is_trained_on():
    noise = {"min_timestep": 900, "max_timestep": 901}
    losses = {}
    for zero_terminal_snr in (False, True):
        made = objective("v_prediction", noise=noise, loss={"min_snr_gamma": 5.0}, zero_terminal_snr=zero_terminal_snr)
        target_of_zero = made(lambda noisy, timesteps: torch.zeros_like(noisy), LATENTS, keys=KEYS)
        unweighted = objective("v_prediction", noise=noise, zero_terminal_snr=zero_terminal_snr)
        losses[zero_terminal_snr] = target_of_zero / unweighted(
            lambda noisy, timesteps: torch.zeros_like(noisy), LATENTS, keys=KEYS
        )
    weights = golden("loss_weights")
    index = weights["timesteps"].index(900)
    kept = weights["zero_terminal_snr"]["alphas_cumprod"][index]
    torch.testing.assert_close(losses[False], torch.full((4,), weights["min_snr_vpred"]["5"][index]), rtol=1e-4, atol=0)
    # snr / (snr + 1) is what is left of the image; the reference stays with the ordinary schedule's.
    torch.testing.assert_close(losses[True], torch.full((4,), kept), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"loss_type": "huber", "min_snr_gamma": 5.0},
        {"loss_type": "smooth_l1", "huber_schedule": "exponential", "debiased_estimation_loss": True},
        {"loss_type": "l1", "v_pred_like_loss": 0.5},
    ],
    ids=str,
)
def test_an_example_has_the_same_loss_in_every_batch(loss):
    made = objective(noise={"noise_offset": 0.1, "ip_noise_gamma": 0.1}, loss=loss)

    def losses(chosen):
        return made(lambda noisy, t: noisy.sin(), LATENTS[chosen], keys=[KEYS[index] for index in chosen])

    torch.testing.assert_close(losses([0, 1, 2, 3]), torch.cat([losses([0, 1]), losses([2]), losses([3])]))


@pytest.mark.parametrize("loss_type", ["l1", "l2", "huber", "smooth_l1"])
def test_the_last_timestep_of_a_zero_terminal_schedule_has_finite_losses_and_gradients(loss_type):
    noise = {"min_timestep": 999, "max_timestep": 1000}
    made = objective("v_prediction", noise=noise, loss={"loss_type": loss_type}, zero_terminal_snr=True)
    scale = torch.ones(1, requires_grad=True)
    losses = made(lambda noisy, timesteps: noisy * scale, LATENTS, keys=KEYS)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert scale.grad.isfinite().all()


def test_half_precision_latents_reach_the_model_as_they_are_and_the_loss_is_computed_in_full():
    seen = []

    def predict(noisy, timesteps):
        seen.append(noisy.dtype)
        return torch.zeros_like(noisy)

    losses = objective()(predict, LATENTS.bfloat16(), keys=KEYS)
    expected = (sample_noise(LATENTS, KEYS, NoiseOptions()) ** 2).mean(dim=(1, 2, 3))
    assert seen == [torch.bfloat16]
    assert torch.equal(losses, expected)


def test_an_objective_survives_pickling():
    made = objective(loss={"loss_type": "huber", "min_snr_gamma": 5.0})
    copy = pickle.loads(pickle.dumps(made))
    first, second = (each(lambda noisy, t: noisy, LATENTS, keys=KEYS) for each in (made, copy))
    assert torch.equal(first, second)
