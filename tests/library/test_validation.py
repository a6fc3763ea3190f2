"""When validation is due, at which timesteps, and what it tells."""

from dataclasses import replace

import pytest
import torch

from library.data.options import ValidationOptions
from library.diffusion.objective import DenoisingObjective
from library.diffusion.options import LossOptions, NoiseOptions
from library.diffusion.schedule import NoiseSchedule
from library.training.best import BestModel
from library.training.ema import WeightAverage
from library.training.naming import SavePlan
from library.training.options import LoggingOptions
from library.training.tracking import Tracker
from library.validation import ValidationHook, ValidationLoss, validation_timesteps
from tests.library.training.moments import moments


def test_timesteps_are_the_documented_ones():
    assert validation_timesteps(NoiseOptions()) == (200, 400, 600, 800)
    assert validation_timesteps(NoiseOptions(min_timestep=500)) == (600, 700, 800, 900)
    assert validation_timesteps(NoiseOptions(min_timestep=100, max_timestep=200)) == (120, 140, 160, 180)
    assert validation_timesteps(NoiseOptions(min_timestep=7, max_timestep=8)) == (7,)


def measured_steps(tmp_path, options, saving, *, average=None, change=lambda moment: moment):
    """The steps after which a run of 10 steps in epochs of 3 is validated."""
    steps = []
    current = []

    def measure():
        steps.append(current[-1])
        return ValidationLoss(by_timestep={200: 1.0, 400: 3.0})

    tracker = Tracker(LoggingOptions(), tracker_name="toy")
    best = BestModel(tmp_path, "toy")
    hook = ValidationHook(options, saving, measure, average=average, tracker=tracker, best=best)
    for moment in moments(10, 3):
        current.append(moment.step)
        hook(change(moment))
    return steps


@pytest.mark.parametrize(
    ("options", "saving", "expected"),
    [
        (ValidationOptions(), SavePlan(), [3, 6, 9, 10]),
        (ValidationOptions(validate_every_n_epochs=2), SavePlan(), [6, 10]),
        (ValidationOptions(validate_every_n_steps=4, validate_every_n_epochs=3), SavePlan(), [4, 8, 9, 10]),
        (ValidationOptions(validate_every_n_epochs=9), SavePlan(every_steps=5), [5, 10]),
        (ValidationOptions(validate_every_n_epochs=9), SavePlan(every_epochs=1), [3, 6, 9, 10]),
    ],
)
def test_when_it_is_due(tmp_path, options, saving, expected):
    assert measured_steps(tmp_path, options, saving) == expected


def test_an_interrupted_run_is_not_validated(tmp_path):
    def interrupted(moment):
        return replace(moment, interrupted=True)

    assert measured_steps(tmp_path, ValidationOptions(), SavePlan(), change=interrupted) == []


def test_weights_and_average_are_both_measured(tmp_path):
    module = torch.nn.Linear(1, 1)
    average = WeightAverage(module, decay=0.5, device=torch.device("cpu"))
    steps = measured_steps(tmp_path, ValidationOptions(validate_every_n_epochs=9), SavePlan(), average=average)
    assert steps == [10, 10]


def test_the_mean_is_that_of_the_timesteps():
    assert ValidationLoss(by_timestep={200: 1.0, 400: 3.0}).mean == 2.0


def test_the_loss_of_an_example_is_its_own():
    """Whatever batch it comes in, whatever noise and weights training uses."""
    noisy = NoiseOptions(noise_offset=0.3, multires_noise_iterations=4, ip_noise_gamma=0.2)
    weighted = LossOptions(min_snr_gamma=1.0, debiased_estimation_loss=True)
    schedule = NoiseSchedule.stable_diffusion(zero_terminal_snr=False)
    trained = DenoisingObjective(schedule, "epsilon", noise=noisy, loss=weighted)
    plain = DenoisingObjective(schedule, "epsilon", noise=NoiseOptions(), loss=LossOptions())
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    keys = [(1, 400, number) for number in range(3)]

    def predict(noisy, timesteps):
        assert timesteps.tolist() == [400] * len(noisy)
        return noisy * 0.5

    together = trained.at_timestep(predict, latents, 400, keys=keys)
    alone = [plain.at_timestep(predict, latents[[row]], 400, keys=[keys[row]]) for row in range(3)]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-6)
    assert len(set(together.tolist())) == 3
