import pytest
import torch

from library.diffusion.options import LossOptions
from library.diffusion.schedule import NoiseSchedule
from library.diffusion.weighting import timestep_weight
from tests.library.diffusion.golden import golden

GOLDEN = golden("loss_weights")
TIMESTEPS = torch.tensor(GOLDEN["timesteps"])

CASES = [
    *(("epsilon", {"min_snr_gamma": float(g)}, weights) for g, weights in GOLDEN["min_snr_eps"].items()),
    *(("v_prediction", {"min_snr_gamma": float(g)}, weights) for g, weights in GOLDEN["min_snr_vpred"].items()),
    *(("epsilon", {"v_pred_like_loss": float(s)}, weights) for s, weights in GOLDEN["v_pred_like_loss"].items()),
    (
        "v_prediction",
        {"scale_v_pred_loss_like_noise_pred": True},
        GOLDEN["scale_v_pred_loss_like_noise_pred"],
    ),
    ("epsilon", {"debiased_estimation_loss": True}, GOLDEN["debiased_eps"]),
    ("v_prediction", {"debiased_estimation_loss": True}, GOLDEN["debiased_vpred"]),
    ("epsilon", {}, [1.0] * len(TIMESTEPS)),
    ("epsilon", {"min_snr_gamma": 0.0, "v_pred_like_loss": 0.0}, [1.0] * len(TIMESTEPS)),
]


@pytest.mark.parametrize(("prediction", "options", "expected"), CASES)
def test_weights_equal_the_reference(prediction, options, expected):
    snr = NoiseSchedule.stable_diffusion().snr(TIMESTEPS)
    weights = timestep_weight(LossOptions(**options), prediction)(snr)
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-4, atol=0)


def test_weights_multiply_up():
    snr = NoiseSchedule.stable_diffusion().snr(TIMESTEPS)
    options = LossOptions(min_snr_gamma=5.0, v_pred_like_loss=0.5, debiased_estimation_loss=True)
    parts = [GOLDEN["min_snr_eps"]["5"], GOLDEN["v_pred_like_loss"]["0.5"], GOLDEN["debiased_eps"]]
    expected = torch.tensor(parts).prod(dim=0)
    torch.testing.assert_close(timestep_weight(options, "epsilon")(snr), expected, rtol=1e-4, atol=0)


ALL_WEIGHTS = {
    "epsilon": {"min_snr_gamma": 5.0, "v_pred_like_loss": 1.0, "debiased_estimation_loss": True},
    "v_prediction": {
        "min_snr_gamma": 5.0,
        "scale_v_pred_loss_like_noise_pred": True,
        "debiased_estimation_loss": True,
    },
}


@pytest.mark.parametrize("prediction", ALL_WEIGHTS)
def test_zero_terminal_schedules_give_finite_weights_no_larger_than_the_ordinary_one(prediction):
    # The reference takes the ratios of the ordinary schedule even where it trains on the rescaled one.
    ordinary = NoiseSchedule.stable_diffusion().snr(torch.arange(1000))
    rescaled = NoiseSchedule.stable_diffusion(zero_terminal_snr=True).snr(torch.arange(1000))
    for name, value in ALL_WEIGHTS[prediction].items():
        weight = timestep_weight(LossOptions(**{name: value}), prediction)
        assert weight(rescaled).isfinite().all()
        assert weight(rescaled).min() >= 0
        assert weight(rescaled).max() <= weight(ordinary).max() * 1.01


def test_a_ratio_of_zero_has_its_limit_where_there_is_one():
    zero = torch.zeros(1)
    assert timestep_weight(LossOptions(min_snr_gamma=5.0), "epsilon")(zero).item() == 1
    assert timestep_weight(LossOptions(min_snr_gamma=5.0), "v_prediction")(zero).item() == 0
    assert timestep_weight(LossOptions(debiased_estimation_loss=True), "v_prediction")(zero).item() == 1
