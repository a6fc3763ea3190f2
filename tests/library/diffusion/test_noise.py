import itertools
import random

import pytest
import torch

from library.diffusion.noise import (
    offset_noise,
    perturb_noise,
    pyramid,
    pyramid_sizes,
    sample_noise,
    sample_timesteps,
    unit_deviation,
)
from library.diffusion.options import NoiseOptions
from library.diffusion.schedule import NoiseSchedule
from library.errors import raise_if_any
from tests.library.diffusion.golden import golden

CASES = golden("noise")["cases"]
RANGES = golden("noise")["timestep_ranges_min_max_of_2000_draws"]
PYRAMIDS = golden("pyramid_noise")["cases"]
KEYS = [(7, 1, example) for example in range(4)]

EVERY_OPTION = {
    "plain": {},
    "offset": {"noise_offset": 0.1},
    "random offset": {"noise_offset": 0.1, "noise_offset_random_strength": True},
    "adaptive offset": {"noise_offset": 0.1, "adaptive_noise_scale": 0.5},
    "only adaptive offset": {"noise_offset": 0.0, "adaptive_noise_scale": 0.5},
    "perturbation": {"ip_noise_gamma": 0.1},
    "random perturbation": {"ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True},
}


def reference_ratios():
    """What the reference draws from Python's generator."""
    while True:
        yield random.random() * 2 + 2


def reference_levels(shape, iterations):
    sizes = pyramid_sizes(shape[2:], itertools.islice(reference_ratios(), iterations))
    return [torch.randn(*shape[:2], *size) for size in sizes]


def reference_draws(shape, options):
    """Noise and what is mixed in, by our formulas from the reference's draws in the reference's order."""
    torch.manual_seed(1)
    latents = torch.randn(shape) * 0.5 + 0.2
    torch.manual_seed(42)
    random.seed(42)
    noise = torch.randn(shape)
    if options.noise_offset:
        strength = options.noise_offset * (torch.rand(1) if options.noise_offset_random_strength else 1)
        draws = torch.randn(*shape[:2], 1, 1)
        noise = offset_noise(
            noise, draws, latents, strength=strength, adaptive_scale=options.adaptive_noise_scale or 0.0
        )
    if options.multires_noise_iterations:
        levels = reference_levels(shape, options.multires_noise_iterations)
        noise = unit_deviation(noise + pyramid(levels, shape[2:], options.multires_noise_discount))
    low, high = options.min_timestep or 0, options.max_timestep or 1000
    timesteps = torch.randint(low, high, (shape[0],)) if low < high else torch.full((shape[0],), high)
    mixed_in = noise
    if options.ip_noise_gamma:
        strength = options.ip_noise_gamma * (torch.rand(1) if options.ip_noise_gamma_random_strength else 1)
        mixed_in = noise + strength * torch.randn(shape)
    return noise, NoiseSchedule.stable_diffusion().add_noise(latents, mixed_in, timesteps), timesteps


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["label"])
def test_formulas_equal_the_reference(case):
    assert case["seed"] == 42
    noise, noisy, timesteps = reference_draws(case["shape"], NoiseOptions(**case["options"]))
    assert timesteps.tolist() == case["timesteps"]
    torch.testing.assert_close(noise.flatten(), torch.tensor(case["noise"]), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(noisy.flatten(), torch.tensor(case["noisy_latents"]), atol=2e-6, rtol=1e-5)
    if "equal" not in case["label"] and ">" not in case["label"]:
        # As many draws as the reference: the next one is the same.
        assert torch.randn(1).item() == pytest.approx(case["next_randn"], abs=1e-6)


@pytest.mark.parametrize("case", PYRAMIDS, ids=lambda case: f"{case['iterations']}-{case['discount']}")
def test_pyramids_equal_the_reference(case):
    torch.manual_seed(case["seed"])
    random.seed(case["seed"])
    shape = case["shape"]
    noise = torch.randn(shape)
    levels = reference_levels(shape, case["iterations"])
    noise = unit_deviation(noise + pyramid(levels, shape[2:], case["discount"]))
    torch.testing.assert_close(noise.flatten(), torch.tensor(case["out"]), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("bounds", RANGES, ids=str)
def test_timesteps_fill_their_range(bounds):
    low, high = (int(bound) for bound in bounds.split(","))
    options = NoiseOptions(min_timestep=low, max_timestep=high)
    problems = options.problems()
    if low >= high:
        # The reference trains the timestep `high` alone then, or fails; here the options are refused.
        assert problems
        return
    raise_if_any(problems)
    keys = [(3, 1, example) for example in range(300 if high - low < 300 else 8000)]
    timesteps = sample_timesteps(keys, options)
    assert timesteps.dtype == torch.int64
    assert [timesteps.min().item(), timesteps.max().item()] == RANGES[bounds]


def test_timesteps_are_spread_evenly():
    timesteps = sample_timesteps([(5, 1, example) for example in range(4000)], NoiseOptions())
    counts = torch.histc(timesteps.float(), bins=10, min=0, max=1000)
    # 400 +- 19 each; six deviations
    assert (counts - 400).abs().max() < 115


@pytest.mark.parametrize("options", EVERY_OPTION.values(), ids=EVERY_OPTION)
def test_an_example_has_the_same_noise_in_every_batch(options):
    options = NoiseOptions(**options)
    latents = torch.randn(4, 4, 6, 5, generator=torch.Generator().manual_seed(1))

    def draw(chosen):
        keys = [KEYS[index] for index in chosen]
        noise = sample_noise(latents[chosen], keys, options)
        return noise, perturb_noise(noise, keys, options), sample_timesteps(keys, options)

    for whole, first, second in zip(draw([0, 1, 2, 3]), draw([2]), draw([3, 1, 0]), strict=True):
        assert torch.equal(whole[[2, 3, 1, 0]], torch.cat([first, second]))


def test_multires_noise_is_repeatable_and_differs_between_examples():
    options = NoiseOptions(multires_noise_iterations=6)
    latents = torch.zeros(4, 4, 16, 16)
    noise = sample_noise(latents, KEYS, options)
    assert torch.equal(noise, sample_noise(latents, KEYS, options))
    assert noise.std().item() == pytest.approx(1, abs=1e-5)
    # Before the division by the batch's deviation an example depends on its key alone.
    alone = sample_noise(latents[:1], KEYS[:1], options)
    ratio = alone[0] / noise[0]
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)
    assert not torch.allclose(noise[0], noise[1])


def test_noise_depends_on_seed_epoch_and_example_only():
    latents = torch.zeros(1, 4, 4, 4)
    noises = [sample_noise(latents, [key], NoiseOptions()) for key in [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)]]
    for one, other in itertools.combinations(noises, 2):
        assert not torch.allclose(one, other)
    torch.manual_seed(0)
    again = sample_noise(latents + 3, [(1, 1, 1)], NoiseOptions())
    assert torch.equal(again, noises[0])


def test_global_generators_are_not_touched():
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    options = NoiseOptions(
        noise_offset=0.1, noise_offset_random_strength=True, multires_noise_iterations=4, ip_noise_gamma=0.1
    )
    latents = torch.zeros(4, 4, 8, 8)
    perturb_noise(sample_noise(latents, KEYS, options), KEYS, options)
    sample_timesteps(KEYS, options)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_noise_is_standard_normal():
    noise = sample_noise(torch.zeros(4, 4, 64, 64), KEYS, NoiseOptions())
    assert noise.dtype == torch.float32
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)


def test_random_strengths_vary_between_examples_and_stay_below_the_option():
    latents = torch.zeros(4, 1, 2, 2)
    plain = sample_noise(latents, KEYS, NoiseOptions())
    fixed = sample_noise(latents, KEYS, NoiseOptions(noise_offset=0.1)) - plain
    drawn = sample_noise(latents, KEYS, NoiseOptions(noise_offset=0.1, noise_offset_random_strength=True)) - plain
    strengths = (drawn / fixed)[:, 0, 0, 0]
    assert 0 <= strengths.min() < strengths.max() <= 1
    assert len(set(strengths.tolist())) == 4
