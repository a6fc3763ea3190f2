import importlib.util
import subprocess
import sys

import diffusers
import pytest
import torch

from library.diffusion.samplers import SAMPLERS, build_scheduler, check_sampler, generate_latents
from library.diffusion.schedule import NoiseSchedule
from library.errors import UserError
from library.randomness import seeded_globals
from library.training.options import SAMPLER_NAMES
from tests.library.diffusion.golden import golden

GOLDEN = golden("sample_samplers")["cases"]
SHAPE = (4, 8, 8)
TARGET = torch.linspace(-2.5, 2.5, 4 * 8 * 8).view(1, *SHAPE)
EACH_ONCE = [name for name in SAMPLERS if not name.startswith("k_")]

# diffusers' schedulers hand tensors to numpy functions.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# What is set otherwise than in the reference, and why.
DIFFERENCES = {
    # Clipping latents to [-1, 1] spoils them; Stable Diffusion's own configuration starts at timestep 1 and ends on the
    # first alpha of the schedule, and other programs' pictures are made so.
    "ddim": {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    # As above; and without the Runge-Kutta start, which needs four steps and twelve more model calls ("PLMS").
    "pndm": {"skip_prk_steps": True, "steps_offset": 1},
}


def known_name(case):
    """The name as our options take it: the reference takes any other text for ddim."""
    return case["sampler"] if case["sampler"] in SAMPLERS else "ddim"


@pytest.mark.parametrize(
    "case", [case for case in GOLDEN if case["sampler"] != "ddpm"], ids=lambda c: f"{c['sampler']}-v{c.get('v')}"
)
def test_schedulers_equal_the_reference(case):
    name = known_name(case)
    prediction = "v_prediction" if case["v"] else "epsilon"
    scheduler = build_scheduler(name, prediction=prediction)
    if case.get("error"):
        # The reference cannot run its own choice "dpmsolver".
        assert name == "dpmsolver"
        assert scheduler.config.algorithm_type == "dpmsolver"
        return
    assert type(scheduler).__name__ == case["cls"]
    expected = case["config"] | DIFFERENCES.get(name, {})
    assert {key: scheduler.config[key] for key in expected} == expected


def test_every_sampler_of_the_option_is_here():
    names = "ddim pndm lms euler euler_a heun dpm_2 dpm_2_a dpmsolver dpmsolver++ dpmsingle"
    names += " k_lms k_euler k_euler_a k_dpm_2 k_dpm_2_a"
    assert set(SAMPLERS) == set(names.split())
    assert set(SAMPLERS) == set(SAMPLER_NAMES)


@pytest.mark.parametrize(("name", "nearest"), [("EULER", "euler"), ("dpm++", "dpmsolver++"), ("euler-a", "euler_a")])
def test_an_unknown_sampler_is_refused_with_the_nearest_name(name, nearest):
    with pytest.raises(UserError) as caught:
        check_sampler(name, where="prompts.txt:3")
    [problem] = caught.value.problems
    assert repr(name) in problem.what
    assert problem.where == "prompts.txt:3"
    assert f"did you mean {nearest!r}?" in problem.remedy


@pytest.mark.parametrize("name", ["lms", "k_lms"])
def test_lms_says_what_to_install(name, monkeypatch):
    check_sampler(name)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "scipy" else find(name))
    with pytest.raises(UserError) as caught:
        check_sampler(name)
    assert "pip install scipy" in caught.value.problems[0].remedy


def test_the_names_are_known_without_heavy_imports():
    heavy = "{'torch', 'diffusers', 'transformers'}"
    code = f"import sys, library.diffusion.samplers; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def sample_the_one_picture(sampler, steps, *, prediction="epsilon", zero_terminal_snr=False):
    """Sample with a perfect model of a world that has no picture but ``TARGET``."""
    schedule = NoiseSchedule.stable_diffusion(zero_terminal_snr=zero_terminal_snr)
    kept = schedule.alphas_cumprod.clamp(min=2**-24).log()

    def predict(noisy, timesteps, context):
        assert timesteps.shape == (len(noisy),)
        assert not torch.is_grad_enabled()
        # Solvers of second order ask between timesteps as well.
        share = timesteps - timesteps.floor()
        low, high = kept[timesteps.floor().long()], kept[timesteps.ceil().long()]
        left = (low + (high - low) * share).exp().view(-1, 1, 1, 1)
        noise = (noisy - left.sqrt() * TARGET) / (1 - left).sqrt()
        return noise if prediction == "epsilon" else left.sqrt() * noise - (1 - left).sqrt() * TARGET

    return generate_latents(
        predict,
        torch.zeros(1, 77, 8),
        None,
        prediction=prediction,
        zero_terminal_snr=zero_terminal_snr,
        sampler=sampler,
        steps=steps,
        guidance=7.5,
        shape=SHAPE,
        generator=torch.Generator().manual_seed(0),
    )


@pytest.mark.parametrize("sampler", EACH_ONCE)
@pytest.mark.parametrize(("prediction", "zero_terminal_snr"), [("epsilon", False), ("v_prediction", True)])
def test_every_sampler_finds_the_one_picture_there_is(sampler, prediction, zero_terminal_snr):
    found = sample_the_one_picture(sampler, 20, prediction=prediction, zero_terminal_snr=zero_terminal_snr)
    # ddim, pndm and dpmsolver end on the first timestep's noise, a deviation of 0.03. 2.5 is found: nothing is clipped.
    assert (found - TARGET).abs().max() < 0.12
    assert (found - TARGET).std() < 0.04


@pytest.mark.parametrize("sampler", EACH_ONCE)
@pytest.mark.parametrize("steps", [1, 3])
def test_few_steps_run(sampler, steps):
    assert sample_the_one_picture(sampler, steps).isfinite().all()


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "euler", "dpmsolver", "dpmsolver++", "dpmsingle"])
def test_as_many_steps_as_timesteps_run(sampler):
    assert (sample_the_one_picture(sampler, 1000) - TARGET).std() < 0.04


@pytest.mark.parametrize("sampler", EACH_ONCE)
def test_a_noise_prediction_model_stays_finite_with_a_zero_terminal_schedule(sampler):
    assert sample_the_one_picture(sampler, 5, zero_terminal_snr=True).isfinite().all()


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_a", "dpmsolver++"])
def test_a_zero_terminal_schedule_starts_at_its_last_timestep(sampler):
    scheduler = build_scheduler(sampler, prediction="v_prediction", zero_terminal_snr=True)
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[0] == 999
    theirs = type(scheduler)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    torch.testing.assert_close(scheduler.alphas_cumprod, theirs.alphas_cumprod, atol=1e-6, rtol=1e-4)


@pytest.fixture(scope="module")
def pipeline():
    # A model this small is slower on several threads than on one.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tiny_pipeline()
    torch.set_num_threads(threads)


def tiny_pipeline():
    with seeded_globals("pipeline"):
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        # Four levels make a latent value stand for eight pixels; nothing else of it is used.
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = diffusers.AutoencoderKL(block_out_channels=(4,) * 4, norm_num_groups=2, **blocks)
    return diffusers.StableDiffusionPipeline(
        unet=unet.eval(),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        scheduler=build_scheduler("ddim", prediction="epsilon"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.mark.parametrize(
    ("sampler", "prediction", "guidance"),
    [
        *((sampler, "epsilon", 5.0) for sampler in EACH_ONCE),
        *((sampler, "v_prediction", 5.0) for sampler in ("ddim", "euler_a", "dpmsolver++")),
        ("ddim", "epsilon", 1.0),
    ],
)
def test_latents_equal_those_of_the_diffusers_pipeline(pipeline, sampler, prediction, guidance):
    width = pipeline.unet.config.cross_attention_dim
    context, uncond = torch.randn(2, 2, 77, width, generator=torch.Generator().manual_seed(3))
    steps = 3

    def generator():
        return torch.Generator().manual_seed(8)

    def predict(noisy, timesteps, context):
        return pipeline.unet(noisy, timesteps, context).sample

    ours = generate_latents(
        predict,
        context,
        uncond,
        prediction=prediction,
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        shape=SHAPE,
        generator=generator(),
    )
    pipeline.scheduler = build_scheduler(sampler, prediction=prediction)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt_embeds=context,
        negative_prompt_embeds=uncond,
        height=64,
        width=64,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generator(),
        output_type="latent",
    ).images
    assert ours.shape == (2, *SHAPE)
    assert (ours - theirs).abs().max() < 1e-4
    assert ours.std() > 0.1


def test_guidance_goes_from_the_negative_prompt_towards_the_prompt():
    seen = []

    def predict(noisy, timesteps, context):
        seen.append(len(noisy))
        assert len(timesteps) == len(context) == len(noisy)
        return context.mean(dim=(1, 2)).view(-1, 1, 1, 1).expand_as(noisy)

    def two_steps(guidance, uncond):
        seen.clear()
        return generate_latents(
            predict,
            torch.full((1, 77, 2), 3.0),
            uncond,
            prediction="epsilon",
            sampler="euler",
            steps=2,
            guidance=guidance,
            shape=SHAPE,
            generator=torch.Generator().manual_seed(0),
        )

    negative = torch.full((1, 77, 2), 1.0)
    plain, unguided = two_steps(7.5, None), two_steps(1.0, negative)
    assert torch.equal(plain, unguided)
    assert seen == [1, 1]
    guided = two_steps(2.5, negative)
    assert seen == [2, 2]
    # Euler's steps add up to x - sigma * e, and e is 1 + 2.5 * (3 - 1) = 6 here in place of 3.
    sigma = build_scheduler("euler", prediction="epsilon").sigmas.max()
    torch.testing.assert_close(plain - guided, torch.full_like(plain, 3.0) * sigma, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("sampler", ["euler_a", "dpm_2_a"])
def test_all_noise_comes_from_the_generator(sampler):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = sample_the_one_picture(sampler, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(one, sample_the_one_picture(sampler, 3))
