"""The examples: the tiny model's world and recipe, the quickstart's pictures and files, the sheet before and after."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

ROOT = Path(__file__).parent.parent
TINY_SD = ROOT / "examples" / "tiny-sd"
QUICKSTART = ROOT / "examples" / "quickstart"


@pytest.fixture(autouse=True)
def examples_are_importable(monkeypatch):
    """The folders of the examples' scripts, as when one of them is run; paths in them start at the project."""
    for folder in (TINY_SD / "recipe", QUICKSTART):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(ROOT)


# --- the world of shapes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(128, 128), (160, 96), (96, 160)])
def test_drawn_scenes_are_recognised(size):
    from shapes_world import classify, random_scene, render

    rng = np.random.default_rng(3)
    for _ in range(30):
        scene = random_scene(rng)
        seen = classify(render(scene, size, rng))
        assert seen is not None
        assert seen.scene == scene
        assert seen.overlap > 0.9


def test_an_empty_picture_shows_nothing():
    from shapes_world import classify

    assert classify(np.full((128, 128, 3), 128, np.uint8)) is None


def test_captions_say_nothing_that_is_not_there():
    from shapes_world import BACKGROUNDS, COLOURS, SHAPES, Scene, describe

    rng = np.random.default_rng(4)
    scene = Scene(shape="ring", colour="orange", background="sky")
    others = {*SHAPES, *COLOURS, *BACKGROUNDS} - {"ring", "orange", "sky"}
    captions = [describe(scene, rng) for _ in range(300)]
    for caption in captions:
        words = set(caption.replace(",", "").split())
        assert "ring" in words
        assert not words & others
        assert "a orange" not in caption
    assert len(set(captions)) > 15


def test_stripes_begin_where_they_are_told():
    from shapes_world import stripes

    column = stripes((0, 0, 0), (255, 255, 255), 10, shift=5)((4, 60), np.random.default_rng(0))[:, 0, 0]
    assert column[[25, 34, 35, 44, 45]].tolist() == [255, 255, 0, 0, 255]  # the middle is at 30


# --- the recipe ------------------------------------------------------------------------------------------------------


def small_unet(levels, layers):
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16, 16)[:levels],
        layers_per_block=layers,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
    )


def test_grown_unet_takes_every_tensor_of_the_trained_one():
    from starting_weights import grow_unet

    trained, grown = small_unet(3, 1), small_unet(4, 2)
    copied = grow_unet(grown, trained)
    assert len(copied) == len(list(trained.parameters()))
    target, source = dict(grown.named_parameters()), dict(trained.named_parameters())
    for name, place in {
        "conv_in.weight": "conv_in.weight",
        "down_blocks.1.attentions.0.proj_in.weight": "down_blocks.1.attentions.0.proj_in.weight",
        "up_blocks.0.resnets.0.conv1.weight": "up_blocks.1.resnets.0.conv1.weight",
        "up_blocks.2.resnets.1.conv1.weight": "up_blocks.3.resnets.2.conv1.weight",
        "up_blocks.2.attentions.1.proj_out.bias": "up_blocks.3.attentions.2.proj_out.bias",
        "up_blocks.1.upsamplers.0.conv.weight": "up_blocks.2.upsamplers.0.conv.weight",
    }.items():
        assert (target[place] == source[name]).all(), name


def test_unet_grown_by_nothing_is_the_same():
    import torch
    from starting_weights import grow_unet

    trained, grown = small_unet(3, 1), small_unet(3, 1)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)
    grow_unet(grown, trained)
    inputs = (torch.ones(1, 4, 8, 8), torch.tensor([10]), torch.ones(1, 5, 8))
    assert torch.equal(grown(*inputs).sample, trained(*inputs).sample)


@pytest.fixture
def recipe_run(monkeypatch):
    """Run three steps of the recipe with hardly any pictures, in a folder of its own."""
    import train_unet

    def run(work):
        sizes = {"pictures": 40, "batch_size": 2, "steps": 3, "layers": 1, "heads": 2}
        arguments = [f"--work={work}", f"--output={work / 'model'}", *(f"--{name}={n}" for name, n in sizes.items())]
        monkeypatch.setattr(sys, "argv", ["train_unet.py", *arguments, "--channels", "16", "32"])
        train_unet.main()

    return run


def test_stopped_recipe_continues_exactly(tmp_path, monkeypatch, recipe_run):
    import train_unet
    from safetensors.numpy import load_file

    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    recipe_run(whole)
    pieces.mkdir()
    shutil.copy(whole / "latents-40-0.pt", pieces)
    train_step = train_unet.Trainer.train_step

    def stopped_at_one(trainer):
        if trainer.step == 1:
            raise KeyboardInterrupt
        return train_step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(train_unet.Trainer, "train_step", stopped_at_one)
        with pytest.raises(KeyboardInterrupt):
            recipe_run(pieces)
    assert not (pieces / "model").exists()
    recipe_run(pieces)
    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        expected, got = load_file(whole / "model" / name), load_file(pieces / "model" / name)
        assert expected.keys() == got.keys()
        assert all((expected[key] == got[key]).all() for key in expected)
    assert all(key.startswith("text_model.") for key in got)


# --- the model -------------------------------------------------------------------------------------------------------


def test_tiny_model_draws_what_it_is_asked_for():
    import torch
    from diffusers import StableDiffusionPipeline
    from measure import generate, prompt_for, score
    from shapes_world import Scene

    pipeline = StableDiffusionPipeline.from_pretrained(TINY_SD, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    scenes = [
        Scene(shape=shape, colour=colour, background=background)
        for shape, colour, background in (
            ("circle", "red", "white"),
            ("star", "green", "black"),
            ("heart", "purple", "sky"),
            ("ring", "yellow", "sunset"),
        )
    ]
    pictures = generate(pipeline, [prompt_for(scene) for scene in scenes], steps=12, guidance=4, seed=0)
    found = score(scenes, pictures)
    assert (found.shape, found.colour, found.background) == (1, 1, 1)


# --- the quickstart --------------------------------------------------------------------------------------------------


def test_shipped_pictures_are_those_the_script_draws(tmp_path):
    import make_images

    make_images.draw_concept(tmp_path / "images")
    make_images.draw_plain(tmp_path / "regularisation")
    drawn = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")}
    shipped = {
        path.relative_to(QUICKSTART)
        for folder in ("images", "regularisation")
        for path in (QUICKSTART / folder).iterdir()
    }
    assert drawn == shipped
    for name in drawn:
        if name.suffix == ".png":
            difference = np.asarray(Image.open(tmp_path / name), int) - np.asarray(Image.open(QUICKSTART / name), int)
            assert np.abs(difference).max() <= 1, name
        else:
            assert (tmp_path / name).read_bytes() == (QUICKSTART / name).read_bytes()


def quickstart_options():
    from library.options import parse_options
    from train_network import Options

    arguments = ["--config_file", str(QUICKSTART / "train.toml")]
    return parse_options(Options, arguments, prog="train_network.py", description="")


def test_quickstart_options_and_data_are_in_order(caplog):
    from library.inputs import check_inputs

    options = quickstart_options()
    inputs = check_inputs(options)
    concept = [record for record in inputs.records if not record.is_reg]
    plain = [record for record in inputs.records if record.is_reg]
    assert (len(concept), len(plain)) == (10, 16)
    assert all("shs" in record.caption.split() for record in concept)
    assert not any("shs" in record.caption for record in plain)
    assert len({record.size for record in concept}) == 3
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    # Buckets in steps of 32 pixels are meant: in steps of 64, a picture of 128 has hardly any.
    assert [text for text in warnings if "bucket_reso_steps" not in text] == []


def test_quickstart_previews_show_training_and_drift():
    from library.training.prompt_files import load_prompts

    prompts = load_prompts(QUICKSTART / "prompts.txt", default_sampler="ddim")
    with_token = ["shs" in prompt.prompt.split() for prompt in prompts]
    assert 4 <= len(prompts) <= 8
    assert any(with_token)
    assert not all(with_token)
    assert all(prompt.seed is not None and prompt.width == 128 for prompt in prompts)


def save_preview(folder, name, *, prompt, seed, step, colour):
    text = PngInfo()
    for key, value in {"prompt": prompt, "seed": seed, "step": step}.items():
        text.add_itxt(key, str(value))
    Image.new("RGB", (64, 64), colour).save(folder / name, pnginfo=text)


def test_sheet_pairs_first_and_last_previews(tmp_path):
    import before_after

    folder = tmp_path / "sample"
    folder.mkdir()
    for number, prompt in enumerate(("a shs star", "a red star")):
        save_preview(folder, f"x_e000000_{number}.png", prompt=prompt, seed=1, step=0, colour="red")
        save_preview(folder, f"x_000010_{number}.png", prompt=prompt, seed=1, step=10, colour="green")
        save_preview(folder, f"x_000020_{number}.png", prompt=prompt, seed=1, step=20, colour="blue")
    assert before_after.main([str(tmp_path)]) == 0
    sheet = Image.open(tmp_path / "before_after.png").convert("RGB")
    colours = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert {(255, 0, 0), (0, 0, 255)} <= colours
    assert (0, 128, 0) not in colours


def test_sheet_without_previews_says_so(tmp_path, capsys):
    import before_after

    (tmp_path / "sample").mkdir()
    assert before_after.main([str(tmp_path)]) == 2
    assert "no previews" in capsys.readouterr().err
    assert not (tmp_path / "before_after.png").exists()


def test_the_shipped_model_names_no_path() -> None:
    for config in (ROOT / "examples" / "tiny-sd").rglob("*.json"):
        assert '"_name_or_path"' not in config.read_text(encoding="utf-8"), config
