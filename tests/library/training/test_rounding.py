import pytest
import torch

from library.training.rounding import stochastic_round, widened


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_each_value_becomes_one_of_its_two_neighbours() -> None:
    values = torch.randn(10_000, generator=generator(1))
    rounded = stochastic_round(values, generator()).float()
    nearest = values.to(torch.bfloat16)
    below = torch.minimum(nearest.float(), torch.nextafter(nearest, torch.tensor(-torch.inf).bfloat16()).float())
    above = torch.nextafter(nearest, torch.tensor(torch.inf).bfloat16()).float()
    choices = torch.stack([below, nearest.float(), above])
    assert bool((choices == rounded).any(0).all())
    assert float((rounded - values).abs().max() / values.abs().max()) < 2**-7


def test_the_expectation_is_the_value_itself() -> None:
    value = 1 + 2**-7 / 4
    rounded = stochastic_round(torch.full((100_000,), value), generator()).float()
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7}
    # A quarter is rounded up: the deviation of the mean is 2^-7 * sqrt(3/16 / 100000) = 1.1e-5.
    assert float(rounded.mean()) == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.5, 2.0**-120, float("inf"), -float("inf")])
def test_what_bf16_holds_stays(value: float) -> None:
    assert stochastic_round(torch.full((100,), value), generator()).unique().tolist() == [value]


def test_nan_stays() -> None:
    assert bool(stochastic_round(torch.full((100,), float("nan")), generator()).isnan().all())


def test_small_steps_add_up_where_rounding_to_the_nearest_would_lose_them() -> None:
    weight = torch.nn.Parameter(torch.ones(2_000, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    for step in range(200):
        weight.grad = torch.full_like(weight, -0.5)
        with widened(weight, optimizer.state[weight], generator(step)):
            optimizer.step()
    assert weight.dtype == torch.bfloat16
    assert float(weight.float().mean()) == pytest.approx(1 + 200 * 5e-4, rel=5e-3)
    assert float((torch.ones(1, dtype=torch.bfloat16) + 5e-4).item()) == 1.0


def test_moments_are_narrow_between_steps_and_counts_are_not_touched() -> None:
    weight = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([weight], lr=1e-2)
    for step in range(3):
        weight.grad = torch.ones_like(weight)
        with widened(weight, optimizer.state[weight], generator(step)):
            optimizer.step()
    state = optimizer.state[weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    assert state["step"].item() == 3
    assert state["step"].dtype == torch.float32


def test_moments_that_are_paged_stay_as_the_optimizer_keeps_them() -> None:
    """bitsandbytes' lie in memory of its own, which torch takes for the CPU's: a GPU's generator does not fit it."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    paged, own = torch.full((4,), 1 / 3), torch.full((4,), 1 / 3)
    paged.is_paged = True
    state = {"state1": paged, "own": own, "elsewhere": torch.empty(4, device="meta")}
    for step in range(2):
        weight.grad = torch.ones_like(weight)
        with widened(weight, state, generator(step)):
            assert all(value.dtype == torch.float32 for value in state.values())
    assert state["state1"] is paged
    assert paged.tolist() == [torch.tensor(1 / 3).item()] * 4
    assert (state["own"].dtype, state["elsewhere"].dtype) == (torch.bfloat16, torch.float32)
