"""Previews equal the images of diffusers' own pipeline, with its own scheduler, for each sampler."""

import diffusers
import numpy as np
import pytest
import torch

from library.conditioning import ClipConditioning
from library.diffusion.options import LossOptions, NoiseOptions
from library.diffusion.samplers import build_scheduler
from library.models.options import ModelOptions, PromptOptions
from library.models.stable_diffusion import load_stable_diffusion
from library.runtime import start_runtime
from library.runtime_options import RuntimeOptions
from library.task import DenoisingTask
from library.training.options import SAMPLER_NAMES
from library.training.prompt_files import PreviewPrompt
from tests.tiny import tiny_sd

SAMPLERS = [name for name in SAMPLER_NAMES if not name.startswith("k_")]
LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
# What the names mean, written down once more: class and settings beside the noise schedule.
CLASSES = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, **LEADING}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True, **LEADING}),
    "lms": (diffusers.LMSDiscreteScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "dpm_2": (diffusers.KDPM2DiscreteScheduler, {}),
    "dpm_2_a": (diffusers.KDPM2AncestralDiscreteScheduler, {}),
    "dpmsolver": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "dpmsolver++": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": (diffusers.DPMSolverSinglestepScheduler, {"algorithm_type": "dpmsolver++", "lower_order_final": True}),
}
PROMPT, NEGATIVE = "a cat that sits on a mat", "blurry, ugly"
STEPS, SCALE, SEED, SIDE = 3, 5.0, 11, 64


def scheduler(sampler, prediction, *, zero_terminal_snr=False):
    kind, settings = CLASSES[sampler.removeprefix("k_")]
    settings = {**settings, "prediction_type": prediction, "num_train_timesteps": 1000}
    if zero_terminal_snr:
        settings["trained_betas"] = zero_terminal_betas()
        if "timestep_spacing" in settings:
            settings |= {"timestep_spacing": "trailing", "steps_offset": 0}
    else:
        settings |= {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return kind(**settings)


def zero_terminal_betas():
    """Our betas to the last bit, for dpm_2_a subtracts nearly equal squares; test_samplers.py judges them."""
    return build_scheduler("ddim", prediction="v_prediction", zero_terminal_snr=True).config.trained_betas


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {
        kind: tiny_sd(base / kind, kind, layers_per_block=1, channels=(16, 16, 32, 32)) for kind in ("sd1", "sd2_v")
    }


@pytest.fixture(scope="module")
def tasks(folders):
    runtime = start_runtime(RuntimeOptions(seed=0), find_unused_parameters=False)

    def task(kind, *, zero_terminal_snr=False):
        prompts = PromptOptions()
        is_v = kind == "sd2_v"
        options = ModelOptions(pretrained_model_name_or_path=str(folders[kind]), v2=is_v, v_parameterization=is_v)
        model = load_stable_diffusion(options, prompts, dtype=torch.float32)
        return DenoisingTask.of(
            model,
            ClipConditioning.of(model, prompts),
            runtime,
            noise=NoiseOptions(zero_terminal_snr=zero_terminal_snr),
            loss=LossOptions(),
            vae_batch_size=1,
        )

    return {
        "epsilon": task("sd1"),
        "v_prediction": task("sd2_v"),
        "zero terminal SNR": task("sd2_v", zero_terminal_snr=True),
    }


@pytest.fixture(scope="module")
def pipelines(folders):
    found = {}
    for kind, folder in folders.items():
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        found[kind] = pipeline
    return found


@pytest.mark.parametrize("schedule", ["epsilon", "v_prediction", "zero terminal SNR"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_preview_equals_the_pipelines_image(sampler, schedule, tasks, pipelines):
    prompt = PreviewPrompt(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        width=SIDE,
        height=SIDE,
        steps=STEPS,
        scale=SCALE,
        seed=SEED,
        sampler=sampler,
    )
    ours = np.asarray(tasks[schedule].generate(prompt)).astype(int)

    pipeline = pipelines["sd1" if schedule == "epsilon" else "sd2_v"]
    prediction = "epsilon" if schedule == "epsilon" else "v_prediction"
    pipeline.scheduler = scheduler(sampler, prediction, zero_terminal_snr=schedule == "zero terminal SNR")
    theirs = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        width=SIDE,
        height=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
    ).images[0]
    assert ours.shape == (SIDE, SIDE, 3)
    assert np.abs(ours - theirs * 255).max() < 2
    # Neither black nor white: the comparison means something.
    assert 10 < ours.mean() < 245
    assert ours.std() > 5


@pytest.mark.parametrize("name", [name for name in SAMPLER_NAMES if name.startswith("k_")])
def test_the_longer_names_mean_the_same(name, tasks):
    def image(sampler):
        prompt = PreviewPrompt(prompt=PROMPT, width=SIDE, height=SIDE, steps=2, seed=SEED, sampler=sampler)
        return np.asarray(tasks["epsilon"].generate(prompt))

    assert np.array_equal(image(name), image(name.removeprefix("k_")))
