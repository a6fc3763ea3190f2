"""The documented way from a folder of images to a fine-tuned model, with small models made here."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune import (
    clean_captions_and_tags,
    make_captions,
    merge_captions_to_metadata,
    merge_dd_tags_to_metadata,
    prepare_buckets_latents,
    tag_images_by_wd14_tagger,
)
from library.models.options import ModelOptions, PromptOptions
from library.models.stable_diffusion import load_stable_diffusion
from tests.scripts.runs import run_script
from tests.tiny import tiny_sd

IMAGES = 12


def write_images(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        width, height = [(128, 128), (192, 80), (80, 192)][number % 3]
        pixels = rng.integers(0, 256, 3) + rng.integers(-40, 40, (height, width, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02d}.png")


def test_from_images_to_a_model(
    blip_folder: Path, tagger_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "train_data")
    model = tiny_sd(tmp_path / "model", "sd1", layers_per_block=1)
    captioning = [f"--caption_weights={blip_folder}", "--batch_size=4", "--max_length=12", "--min_length=3"]
    assert make_captions.main([*captioning, "train_data"]) == 0
    tagging = [f"--model_dir={tagger_dir}", "--onnx", "--batch_size=4", "--thresh=0.2"]
    assert tag_images_by_wd14_tagger.main([*tagging, "train_data"]) == 0
    assert merge_captions_to_metadata.main(["--full_path", "train_data", "meta_cap.json"]) == 0
    merging = ["--full_path", "train_data", "--in_json", "meta_cap.json", "meta_cap_dd.json"]
    assert merge_dd_tags_to_metadata.main(merging) == 0
    assert clean_captions_and_tags.main(["meta_cap_dd.json", "meta_clean.json"]) == 0
    preparing = ["--full_path", "train_data", "meta_clean.json", "meta_lat.json", str(model)]
    sizes = ["--batch_size", "4", "--max_resolution", "128,128", "--min_bucket_reso", "64", "--mixed_precision", "no"]
    assert prepare_buckets_latents.main([*preparing, *sizes]) == 0

    entries = json.loads((tmp_path / "meta_lat.json").read_text())
    assert list(entries) == [str(Path("train_data") / f"{number:02d}.png") for number in range(IMAGES)]
    assert all(set(entry) == {"caption", "tags", "train_resolution"} for entry in entries.values())
    # A model of random weights may end a caption at once.
    assert sum(bool(entry["caption"]) for entry in entries.values()) > IMAGES // 2
    assert any(entry["tags"] for entry in entries.values())
    assert not any("_" in tag.replace("^_^", "") for entry in entries.values() for tag in entry["tags"].split(", "))

    def never(*_: object) -> None:
        raise AssertionError("an image was encoded")

    monkeypatch.setattr("diffusers.AutoencoderKL.encode", never)
    run = run_script(
        "fine_tune",
        tmp_path / "out",
        f"--pretrained_model_name_or_path={model}",
        *("--train_data_dir=train_data", "--in_json=meta_lat.json", "--cache_latents_to_disk"),
        *("--resolution=128", "--enable_bucket", "--min_bucket_reso=64", "--train_batch_size=4"),
        *("--learning_rate=1e-3", "--max_train_steps=2", "--max_data_loader_n_workers=0"),
        "--save_model_as=safetensors",
    )
    assert run.code == 0
    assert len(run.losses) == 2
    before, after = (
        load_stable_diffusion(ModelOptions(pretrained_model_name_or_path=str(path)), PromptOptions()).unet.state_dict()
        for path in (model, tmp_path / "out" / "last.safetensors")
    )
    assert any(not bool((tensor == after[name]).all()) for name, tensor in before.items())
