"""What the scripts that train the model itself write, in every format: bit-equal here, and read by diffusers."""

from pathlib import Path

import pytest
import torch

from library.files import read_tensors
from tests.scripts.methods import method_arguments
from tests.scripts.runs import run_script
from tests.scripts.test_train_db import PARTS, loaded
from tests.tiny import tiny_sd

BOTH = {"train_db": [], "fine_tune": ["--train_text_encoder"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd1", "sd1", layers_per_block=1)


@pytest.mark.parametrize("script", BOTH)
@pytest.mark.parametrize("format", ["safetensors", "ckpt", "diffusers", "diffusers_safetensors"])
def test_every_format_holds_the_same_weights(format: str, script: str, model: Path, tmp_path: Path) -> None:
    """The trained parts as the state of the same step has them, the others as the base model."""
    from diffusers import StableDiffusionPipeline

    given = method_arguments(script, model, tmp_path, steps=1)
    more = [f"--save_model_as={format}", "--save_state_on_train_end", *BOTH[script]]
    run = run_script(script, tmp_path / "out", *given, *more)
    suffix = f".{format}" if not format.startswith("diffusers") else ""
    saved = run.folder / f"thing{suffix}"
    ours = loaded(saved)
    assert {path.name for path in run.folder.iterdir()} == {
        *(saved.name, "thing-state", "thing-report.html", "thing.run.json", "log")
    }
    state = read_tensors(run.folder / "thing-state" / "model.safetensors").tensors
    expected = {**loaded(model), **state}
    assert expected.keys() == ours.keys()
    assert {name for name, tensor in expected.items() if not torch.equal(ours[name], tensor)} == set()
    if suffix:
        theirs = StableDiffusionPipeline.from_single_file(str(saved), config=str(model), local_files_only=True)
    else:
        theirs = StableDiffusionPipeline.from_pretrained(saved, local_files_only=True)
    for part in PARTS:
        for name, tensor in getattr(theirs, part).state_dict().items():
            assert torch.equal(ours[f"{part}.{name.removeprefix('text_model.')}"], tensor), name


def test_a_folder_tells_the_rescaled_schedule(tmp_path: Path) -> None:
    """Diffusers' own rescaling of the scheduler that was saved is that of training."""
    from diffusers import StableDiffusionPipeline

    from library.diffusion.schedule import NoiseSchedule

    model = tiny_sd(tmp_path / "sd2_v", "sd2_v", layers_per_block=1)
    given = [*method_arguments("train_db", model, tmp_path, steps=1), "--save_model_as=diffusers_safetensors"]
    run = run_script("train_db", tmp_path / "out", *given, "--v2", "--v_parameterization", "--zero_terminal_snr")
    scheduler = StableDiffusionPipeline.from_pretrained(run.folder / "thing", local_files_only=True).scheduler
    trained = NoiseSchedule.stable_diffusion(zero_terminal_snr=True).alphas_cumprod
    torch.testing.assert_close(scheduler.alphas_cumprod[:-1], trained[:-1].float(), rtol=1e-3, atol=1e-6)
    assert scheduler.alphas_cumprod[-1] < 1e-6
    assert scheduler.config.prediction_type == "v_prediction"
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[0] == 999
