"""``train_network.py`` on sets described by metadata files and with masks."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.errors import UserError
from library.files import read_metadata
from tests.scripts.runs import STEPS, Run, run_script, write_dataset, write_images
from tests.tiny import tiny_sd

IMAGES = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd1", layers_per_block=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def train(model: Path, output: Path, *arguments: str) -> Run:
    return run_script(
        "train_network",
        output,
        f"--pretrained_model_name_or_path={model}",
        "--network_module=networks.lora",
        "--network_dim=4",
        "--learning_rate=1e-2",
        f"--max_train_steps={STEPS}",
        "--max_data_loader_n_workers=0",
        *arguments,
    )


@pytest.fixture(scope="module")
def plain(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A folder with caption files."""
    return train(model, tmp_path_factory.mktemp("plain"), f"--dataset_config={write_dataset(data, images=IMAGES)}")


def write_metadata(path: Path, image_dir: Path, *, with_sizes: bool = False) -> Path:
    """What the caption files say, told apart into captions and tags."""
    sizes = {"train_resolution": [64, 64]} if with_sizes else {}
    entries = {
        (image_dir / f"{number:02d}.png").as_posix() if number % 2 else f"{number:02d}": {
            "caption": "a thing",
            "tags": f"number {number}",
            **sizes,
        }
        for number in range(IMAGES)
    }
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def test_a_metadata_set_trains_like_the_folder_it_describes(
    model: Path, data: Path, plain: Run, tmp_path: Path
) -> None:
    images = write_images(data / "images", IMAGES)
    metadata = write_metadata(tmp_path / "meta.json", images)
    dataset = tmp_path / "data.toml"
    dataset.write_text(
        "[general]\nenable_bucket = true\n[[datasets]]\nresolution = 64\nmin_bucket_reso = 64\nbatch_size = 2\n"
        f"[[datasets.subsets]]\nimage_dir = '{images.as_posix()}'\nmetadata_file = '{metadata.as_posix()}'\n",
        encoding="utf-8",
    )
    run = train(model, tmp_path / "out", f"--dataset_config={dataset}")
    assert run.losses == plain.losses
    assert run.tensor_hash() == plain.tensor_hash()
    (described,) = json.loads(read_metadata(run.folder / "last.safetensors")["ss_datasets"])
    assert described["is_dreambooth"] is False
    assert described["subsets"][0]["metadata_file"] == "meta.json"


def test_metadata_on_the_command_line(model: Path, data: Path, plain: Run, tmp_path: Path) -> None:
    images = write_images(data / "images", IMAGES)
    metadata = write_metadata(tmp_path / "meta.json", images, with_sizes=True)
    given = (f"--in_json={metadata}", f"--train_data_dir={images}", "--resolution=64", "--train_batch_size=2")
    run = train(model, tmp_path / "out", *given)
    assert run.losses == plain.losses
    described = read_metadata(run.folder / "last.safetensors")
    assert json.loads(described["ss_dataset_dirs"]) == {"meta.json": {"n_repeats": 1, "img_count": IMAGES}}


def masked_dataset(folder: Path, images: Path, level: int) -> Path:
    """The plain set with masks of one grey level each."""
    masks = folder / f"masks-{level}"
    masks.mkdir()
    for number in range(IMAGES):
        Image.fromarray(np.full((64, 64), level, np.uint8)).save(masks / f"{number:02d}.png")
    dataset = folder / f"masked-{level}.toml"
    dataset.write_text(
        "[[datasets]]\nresolution = 64\nbatch_size = 2\nenable_bucket = true\nmin_bucket_reso = 64\n"
        f"[[datasets.subsets]]\nimage_dir = '{images.as_posix()}'\ncaption_extension = '.txt'\n"
        f"conditioning_data_dir = '{masks.as_posix()}'\n",
        encoding="utf-8",
    )
    return dataset


def test_masks_scale_the_loss(model: Path, data: Path, plain: Run, tmp_path: Path) -> None:
    """A white mask changes nothing; the first loss under a grey one of 102 is 102/255 of that without."""
    images = write_images(data / "images", IMAGES)
    white = train(model, tmp_path / "a", f"--dataset_config={masked_dataset(tmp_path, images, 255)}", "--masked_loss")
    assert white.losses == plain.losses
    grey = masked_dataset(tmp_path, images, 102)
    given = (f"--dataset_config={grey}", "--masked_loss", "--cache_latents")
    run = train(model, tmp_path / "b", *given)
    assert run.losses[0] == pytest.approx(plain.losses[0] * 0.4, rel=1e-4)


def test_masks_that_are_asked_for_but_not_there_are_refused(model: Path, data: Path, tmp_path: Path) -> None:
    dataset = write_dataset(data, images=IMAGES)
    with pytest.raises(UserError, match="but no masks"):
        train(model, tmp_path, f"--dataset_config={dataset}", "--masked_loss")


def test_mistakes_in_metadata_stop_the_run_with_all_others(model: Path, data: Path, tmp_path: Path) -> None:
    images = write_images(data / "images", IMAGES)
    metadata = tmp_path / "meta.json"
    metadata.write_text('{"00": {"caption": "a"},\n"gone": {"caption": "b"},\n"01": {"caption": 5}}', encoding="utf-8")
    given = (f"--in_json={metadata}", f"--train_data_dir={images}", "--resolution=64", "--optimizer_type=Adamm")
    with pytest.raises(UserError) as caught:
        train(model, tmp_path / "out", *given)
    told = {str(problem.where): problem.what for problem in caught.value.problems}
    assert "match no image: 'gone'" in told[str(metadata)]
    assert "caption must be text" in told[f"{metadata}:3"]
    assert any("Adamm" in what for what in told.values())


def test_crops_around_faces(model: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "train" / "1_face", 4, size=(96, 128))
    for path in sorted(folder.glob("*.png")):
        path.rename(path.with_name(f"{path.stem}_48_40_20_20.png"))
    given = (f"--train_data_dir={folder.parent}", "--caption_extension=.txt", "--resolution=64")
    run = train(model, tmp_path / "out", *given, "--face_crop_aug_range=1.0,2.0", "--random_crop")
    assert len(run.losses) == STEPS
    assert read_metadata(run.folder / "last.safetensors")["ss_face_crop_aug_range"] == "(1.0, 2.0)"


def test_transparency_as_mask(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "train" / "1_thing"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    losses = {}
    for opacity in (255, 128):
        for number in range(4):
            pixels = rng.integers(0, 256, (64, 64, 4), dtype=np.uint8)
            pixels[..., 3] = opacity
            Image.fromarray(pixels).save(folder / f"{number}.png")
        given = (f"--train_data_dir={folder.parent}", "--resolution=64", "--max_train_steps=1")
        for flag in ("--alpha_mask", ""):
            run = train(model, tmp_path / f"{opacity}{flag}", *given, *filter(None, [flag]))
            losses[opacity, bool(flag)] = run.losses[0]
    assert losses[255, True] == losses[255, False]
    assert losses[128, True] == pytest.approx(losses[128, False] * 128 / 255, rel=1e-4)


def test_latents_alone_train_whatever_is_said_of_caching(model: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        np.savez(
            images / f"{number:02d}.npz",
            latents=rng.standard_normal((4, 8, 8), np.float32),
            original_size=np.array([64, 64]),
            crop_ltrb=np.array([0, 0, 64, 64]),
        )
    given = (f"--in_json={write_metadata(tmp_path / 'meta.json', images)}", f"--train_data_dir={images}")
    runs = [
        train(model, tmp_path / name, *given, "--resolution=64", "--train_batch_size=2", "--seed=1", *more)
        for name, more in (("off", []), ("memory", ["--cache_latents"]), ("disk", ["--cache_latents_to_disk"]))
    ]
    assert len({run.tensor_hash() for run in runs}) == 1
    assert sorted(path.name for path in images.iterdir()) == [f"{number:02d}.npz" for number in range(IMAGES)]
    with pytest.raises(UserError, match="color_aug changes the pixels each time"):
        train(model, tmp_path / "aug", *given, "--resolution=64", "--color_aug")
