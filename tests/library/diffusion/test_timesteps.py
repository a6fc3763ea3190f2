"""Distributions of timesteps against their closed forms."""

import math

import pytest
import torch
from torch import Tensor

from library.diffusion.noise import sample_timesteps
from library.diffusion.objective import DenoisingObjective
from library.diffusion.options import LossOptions, NoiseOptions
from library.diffusion.schedule import NoiseSchedule
from library.diffusion.timesteps import logit_normal_shares, snr_shares, timestep_sampler

SCHEDULE = NoiseSchedule.stable_diffusion()
DRAWS = 20000


def keys(count: int = DRAWS) -> list[tuple[int, int, int]]:
    return [(5, 1, example) for example in range(count)]


def drawn(**options: object) -> Tensor:
    sample = timestep_sampler(NoiseOptions(**options), SCHEDULE, "epsilon")  # type: ignore[arg-type]
    return sample(keys())


def below(share: float, mean: float, deviation: float) -> float:
    """P(u < share) where log(u / (1 - u)) is normal."""
    logit = math.log(share / (1 - share))
    return 0.5 * (1 + math.erf((logit - mean) / deviation / math.sqrt(2)))


def check_shares(timesteps: Tensor, expected: dict[int, float]) -> None:
    """``expected`` has P(t < edge); six deviations of a count are allowed."""
    for edge, share in expected.items():
        counted = float((timesteps < edge).double().mean())
        assert counted == pytest.approx(share, abs=6 * math.sqrt(max(share * (1 - share), 1e-9) / len(timesteps)))


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (0.8, 0.5), (-1.0, 1.5)])
def test_logit_normal(mean: float, deviation: float) -> None:
    """Esser et al. 2024, arXiv 2403.03206, equation 19, by the distribution function of the normal distribution."""
    timesteps = drawn(timestep_distribution="logit_normal", timestep_logit_mean=mean, timestep_logit_std=deviation)
    assert timesteps.dtype == torch.int64
    check_shares(timesteps, {edge: below(edge / 1000, mean, deviation) for edge in range(50, 1000, 50)})


def test_logit_normal_shares_are_the_density_and_add_up() -> None:
    shares = logit_normal_shares(0.0, 1.0)
    assert float(shares.sum()) == pytest.approx(1, abs=1e-12)
    # Equation 19: 1 / (s sqrt(2 pi)) * 1 / (u (1 - u)) * exp(-(logit u - m)^2 / (2 s^2)).
    middle = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    density = torch.exp(-(torch.logit(middle) ** 2) / 2) / (math.sqrt(2 * math.pi) * middle * (1 - middle))
    torch.testing.assert_close(shares[50:950], density[50:950] / 1000, rtol=1e-4, atol=0)


@pytest.mark.parametrize("bounds", [(200, 300), (0, 1), (999, 1000), (0, 500)])
def test_a_range_takes_its_part_of_the_distribution(bounds: tuple[int, int]) -> None:
    low, high = bounds
    timesteps = drawn(timestep_distribution="logit_normal", min_timestep=low, max_timestep=high)
    assert low <= int(timesteps.min()) <= int(timesteps.max()) < high
    edges = [max(low, 1), (low + high) // 2 or 1, high]
    whole = [below(min(edge / 1000, 1 - 1e-12), 0, 1) for edge in edges]
    first = 0.0 if low == 0 else whole[0]
    check_shares(timesteps, {edges[1]: (whole[1] - first) / (whole[2] - first)} if high - low > 1 else {})


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_snr(prediction: str) -> None:
    """Shares by the weight of Hang et al. 2023, written out."""
    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    snr = kept / (1 - kept)
    weight = snr.clamp(max=3.0) / (snr if prediction == "epsilon" else snr + 1)
    shares = snr_shares(SCHEDULE, prediction, 3.0)  # type: ignore[arg-type]
    torch.testing.assert_close(shares, weight / weight.sum(), rtol=1e-4, atol=0)
    sample = timestep_sampler(
        NoiseOptions(timestep_distribution="snr", timestep_snr_gamma=3.0),
        SCHEDULE,
        prediction,  # type: ignore[arg-type]
    )
    cumulated = (weight / weight.sum()).cumsum(0)
    check_shares(sample(keys()), {edge: float(cumulated[edge - 1]) for edge in range(100, 1000, 100)})


def test_snr_of_a_zero_terminal_schedule_is_finite() -> None:
    for prediction in ("epsilon", "v_prediction"):
        shares = snr_shares(NoiseSchedule.stable_diffusion(zero_terminal_snr=True), prediction, 5.0)  # type: ignore[arg-type]
        assert bool(torch.isfinite(shares).all())
        assert float(shares.sum()) == pytest.approx(1)


def test_drawing_by_snr_is_weighing_by_it() -> None:
    """The mean loss of drawn timesteps is that of uniform ones with the weight, up to the mean weight."""

    def mean_loss(noise: NoiseOptions, loss: LossOptions) -> float:
        objective = DenoisingObjective(SCHEDULE, "epsilon", noise=noise, loss=loss)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            # Finds a part of the noise that depends on the timestep, and so the loss does.
            found = noisy / (1 - SCHEDULE.alphas_cumprod[timesteps]).sqrt().view(-1, 1, 1, 1)
            return found * (1 - timesteps / 1000).view(-1, 1, 1, 1)

        return float(objective(predict, torch.zeros(8000, 4, 2, 2), keys=keys(8000)).mean())

    weight = (5.0 / SCHEDULE.snr(torch.arange(1000))).clamp(max=1).mean()
    weighed = mean_loss(NoiseOptions(), LossOptions(min_snr_gamma=5.0))
    found = mean_loss(NoiseOptions(timestep_distribution="snr"), LossOptions())
    assert found * float(weight) == pytest.approx(weighed, rel=0.05)


@pytest.mark.parametrize("distribution", ["logit_normal", "snr"])
def test_a_draw_depends_on_its_key_alone(distribution: str) -> None:
    sample = timestep_sampler(NoiseOptions(timestep_distribution=distribution), SCHEDULE, "epsilon")
    together = sample([(5, 1, 3), (5, 1, 4), (5, 2, 3)])
    assert sample([(5, 1, 4)]).tolist() == [together[1].item()]
    assert len({*sample(keys(50)).tolist()}) > 30


def test_uniform_draws_are_what_they_were() -> None:
    options = NoiseOptions(min_timestep=10, max_timestep=20)
    assert torch.equal(timestep_sampler(options, SCHEDULE, "epsilon")(keys(50)), sample_timesteps(keys(50), options))


def test_a_distribution_that_never_reaches_the_range_is_refused() -> None:
    unreachable = NoiseOptions(
        timestep_distribution="logit_normal", timestep_logit_mean=50.0, timestep_logit_std=0.1, max_timestep=500
    )
    (problem,) = unreachable.problems()
    assert "0 to 499" in problem.what
    assert not NoiseOptions(timestep_distribution="logit_normal", max_timestep=500).problems()


def test_settings_of_another_distribution_are_told() -> None:
    (notice,) = NoiseOptions(timestep_logit_mean=1.0).notices()
    assert notice == "without effect without --timestep_distribution logit_normal: --timestep_logit_mean"
    assert not NoiseOptions(timestep_distribution="snr", timestep_snr_gamma=3.0).notices()
