"""Buckets and latents ahead of training, on a small random model."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from finetune import bucket_latents, prepare_buckets_latents
from finetune.vae_loading import load_vae
from library.data.images import ImageView, LoadedImage, load_image
from library.errors import UserError
from library.models.latents import encode_images, encoder_digest
from library.models.model_saving import save_model
from library.models.options import ModelOptions, PromptOptions
from library.models.stable_diffusion import load_stable_diffusion
from tests.fresh import forget_accelerate
from tests.scripts.runs import run_script
from tests.tiny import tiny_ldm, tiny_sd

ROOT = Path(__file__).parents[2]
SIZES = [(128, 128), (192, 80), (80, 192)]
SMALL = ("--max_resolution=128,128", "--min_bucket_reso=64")
BUCKETS = [[128, 128], [192, 64], [64, 192]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd1", "sd1", layers_per_block=1)


def write_set(folder: Path, count: int = 3) -> tuple[Path, Path]:
    """Images of several shapes, and the metadata that describes them."""
    images = folder / "train_data"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        pixels = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number:02d}.png")
    meta = folder / "meta.json"
    meta.write_text(json.dumps({f"{number:02d}": {"caption": f"number {number}"} for number in range(count)}))
    return images, meta


def run(images: Path, meta: Path, out: Path, model: Path, *more: str) -> int:
    forget_accelerate()
    return prepare_buckets_latents.main([str(images), str(meta), str(out), str(model), *SMALL, *more])


def latents(images: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in images.glob("*.npz")}


def test_sizes_and_latents_are_written(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, meta = write_set(tmp_path)
    out = tmp_path / "lat.json"
    assert run(images, meta, out, model, "--flip_aug", "--alpha_mask", "--batch_size=2") == 0
    assert json.loads(out.read_text()) == {
        f"{number:02d}": {"caption": f"number {number}", "train_resolution": BUCKETS[number]} for number in range(3)
    }
    assert set(latents(images)) == {"00.npz", "01.npz", "02.npz"}
    vae = load_stable_diffusion(ModelOptions(pretrained_model_name_or_path=str(model)), PromptOptions()).vae
    for number, (width, height) in enumerate(BUCKETS):
        with np.load(images / f"{number:02d}.npz", allow_pickle=False) as entry:
            shape = (4, height // 8, width // 8)
            assert entry["latents"].shape == entry["latents_flipped"].shape == shape
            assert entry["latents"].dtype == np.float32
            assert entry["alpha_mask"].shape == (height, width)
            assert tuple(entry["original_size"]) == SIZES[number]
            assert entry["crop_ltrb"].shape == (4,)
            mean = entry["latents"]
        if number == 0:
            # The image has the size of its bucket: composed on white, it is what is encoded.
            rgba = np.asarray(Image.open(images / "00.png")).astype(np.float64)
            rgb = rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]
            pixels = torch.from_numpy(np.rint(rgb) / 127.5 - 1).permute(2, 0, 1)[None].float()
            np.testing.assert_allclose(mean, encode_images(vae, pixels)[0][0].numpy(), atol=2e-3)
    assert capsys.readouterr().out.splitlines()[:3] == [
        "bucket 0: resolution (64, 192), count: 1",
        "bucket 1: resolution (128, 128), count: 1",
        "bucket 2: resolution (192, 64), count: 1",
    ]


@pytest.mark.parametrize("script", ["fine_tune", "train_network"])
def test_training_uses_the_latents_without_encoding(
    script: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, meta = write_set(tmp_path)
    run(images, meta, meta, model)
    made = latents(images)
    given = [
        f"--pretrained_model_name_or_path={model}",
        f"--train_data_dir={images}",
        f"--in_json={meta}",
        *("--resolution=128", "--enable_bucket", "--min_bucket_reso=64", "--cache_latents_to_disk"),
        *("--max_train_steps=1", "--max_data_loader_n_workers=0"),
        *(("--network_module=networks.lora",) if script == "train_network" else ()),
    ]
    plain = run_script(script, tmp_path / "without", *given)

    used: list[str] = []
    move, encode, load = AutoencoderKL.to, AutoencoderKL.encode, AutoencoderKL.load_state_dict

    def watched_move(vae: AutoencoderKL, *where: object, **more: object) -> AutoencoderKL:
        if "device" in more or any(isinstance(one, torch.device | str) for one in where):
            used.append("moved")
        return move(vae, *where, **more)

    def watched_encode(vae: AutoencoderKL, *given: object, **more: object) -> object:
        used.append("encoded")
        return encode(vae, *given, **more)

    def watched_load(vae: AutoencoderKL, *given: object, **more: object) -> object:
        used.append("loaded")
        return load(vae, *given, **more)

    def watched_save(*given: Any, **more: Any) -> None:
        used.append("saving")
        save_model(*given, **more)

    monkeypatch.setattr(AutoencoderKL, "to", watched_move)
    monkeypatch.setattr(AutoencoderKL, "load_state_dict", watched_load)
    monkeypatch.setattr("library.full_model.save_model", watched_save)
    monkeypatch.setattr(AutoencoderKL, "encode", watched_encode)
    again = run_script(script, tmp_path / "with", *given)
    assert (again.code, again.losses) == (0, plain.losses)
    # It is not even loaded, but for the sake of the file that is to hold it.
    expected = ["saving", "loaded"] if script == "fine_tune" else []
    assert used == expected
    assert latents(images) == made
    # Nor are the images needed any more.
    kept = {image: image.read_bytes() for image in images.glob("*.png")}
    for image in kept:
        image.unlink()
    used.clear()
    assert run_script(script, tmp_path / "alone", *given).code == 0
    assert used == expected
    for image, content in kept.items():
        image.write_bytes(content)
    assert run_script(script, tmp_path / "mirrored", *given, "--flip_aug").code == 0
    assert {"loaded", "moved", "encoded"} <= set(used)


def test_as_many_threads_decode_as_are_asked_for(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, meta = write_set(tmp_path)
    together, names = threading.Barrier(3), set()

    def meeting(view: ImageView) -> LoadedImage:
        together.wait(timeout=30)
        return load_image(view)

    def noting(view: ImageView) -> LoadedImage:
        names.add(threading.current_thread().name)
        return load_image(view)

    monkeypatch.setattr(bucket_latents, "load_image", meeting)
    assert run(images, meta, meta, model, "--max_data_loader_n_workers=3") == 0
    monkeypatch.setattr(bucket_latents, "load_image", noting)
    assert run(images, meta, meta, model, "--max_data_loader_n_workers=0", "--flip_aug") == 0
    assert len(names) == 1


def test_what_is_valid_is_kept_and_the_rest_made_anew(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images, meta = write_set(tmp_path)
    run(images, meta, meta, model, "--skip_existing")
    first, made = meta.read_bytes(), latents(images)
    run(images, meta, meta, model, "--skip_existing")
    assert (latents(images), meta.read_bytes()) == (made, first)
    whole = (images / "00.npz").read_bytes()
    (images / "00.npz").write_bytes(whole[:100])
    Image.new("RGB", SIZES[1], "red").save(images / "01.png")
    capfd.readouterr()
    run(images, meta, meta, model, "--skip_existing")
    now = latents(images)
    assert "2 files of latents that do not fit are replaced" in capfd.readouterr().err
    assert {name for name in now if now[name] != made[name]} == {"00.npz", "01.npz"}
    assert (images / "00.npz").read_bytes() == whole


def test_latents_of_another_program_are_kept_if_asked_and_fitting(model: Path, tmp_path: Path) -> None:
    images, meta = write_set(tmp_path)
    for number, (width, height) in enumerate([(128, 128), (128, 128)]):
        fields = {"original_size": np.array(SIZES[number]), "crop_ltrb": np.zeros(4)}
        np.savez(images / f"{number:02d}.npz", latents=np.zeros((4, height // 8, width // 8), np.float32), **fields)
    before = latents(images)
    run(images, meta, meta, model, "--skip_existing")
    kept = latents(images)
    assert kept["00.npz"] == before["00.npz"]
    assert kept["01.npz"] != before["01.npz"]
    run(images, meta, meta, model)
    assert latents(images)["00.npz"] != before["00.npz"]


def test_files_that_are_no_latents_and_shared_names_are_left_alone(model: Path, tmp_path: Path) -> None:
    images, meta = write_set(tmp_path)
    np.savez(images / "00.npz", mine=np.ones(3))
    before = (images / "00.npz").read_bytes()
    (images / "01.jpg").write_bytes((images / "01.png").read_bytes())
    with pytest.raises(UserError, match="1 names belong to several images: '01'"):
        run(images, meta, meta, model)
    run(images, tmp_path / "meta.json", meta, model, "--full_path")
    assert (images / "00.npz").read_bytes() == before
    assert set(latents(images)) == {
        "00.npz",
        "00_0128x0128_sd.npz",
        "01.jpg_0192x0080_sd.npz",
        "01.png_0192x0080_sd.npz",
        "02.npz",
    }


def test_a_bad_image_is_named_and_the_others_done(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images, meta = write_set(tmp_path, 4)
    whole = (images / "01.png").read_bytes()
    (images / "01.png").write_bytes(whole[: len(whole) // 2])
    # Whole to a quick look, and damaged inside.
    middle = bytearray((images / "02.png").read_bytes())
    middle[len(middle) // 2 : len(middle) // 2 + 64] = bytes(64)
    (images / "02.png").write_bytes(bytes(middle))
    out = tmp_path / "lat.json"
    assert run(images, meta, out, model) == 1
    told = capfd.readouterr().err
    assert all(f"skipped: {images / name}" in told for name in ("01.png", "02.png"))
    assert "2 of 4 images were skipped" in told
    assert [key for key, entry in json.loads(out.read_text()).items() if "train_resolution" in entry] == ["00", "03"]
    assert set(latents(images)) == {"00.npz", "03.npz"}


def test_an_image_too_small_for_a_bucket_is_named(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images, meta = write_set(tmp_path)
    Image.new("RGB", (40, 40)).save(images / "00.png")
    assert run(images, meta, meta, model, "--bucket_no_upscale") == 1
    told = capfd.readouterr().err
    assert "00.png: an image of 40x40 pixels fits no bucket" in told
    assert "train without --bucket_no_upscale" in told


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--bucket_reso_steps=20"], "multiple of 8"),
        (["--min_bucket_reso=192"], "fits no bucket"),
        (["--max_bucket_reso=64"], "fits no bucket"),
        (["--alpha_mask=perhaps"], "expects true or false"),
        (["--recursive"], "needs --full_path"),
        (["one", "more"], "words without a flag"),
    ],
)
def test_wrong_options_are_refused(more: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path, tmp_path / "a.json", tmp_path / "b.json", tmp_path / "model", *more)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda images, meta: meta.write_text("{"), "no JSON"),
        (lambda images, meta: meta.write_text("[]"), "no JSON object"),
        (lambda images, meta: meta.unlink(), "metadata file not found"),
        (lambda images, meta: [path.unlink() for path in images.iterdir()], "no images in the folder"),
        (lambda images, meta: images.rename(images.with_name("moved")), "folder not found"),
        (lambda images, meta: [path.write_bytes(b"x") for path in images.iterdir()], "image"),
    ],
)
def test_nothing_is_written_where_nothing_can_be_done(
    spoil: Callable[[Path, Path], object], message: str, model: Path, tmp_path: Path
) -> None:
    images, meta = write_set(tmp_path)
    spoil(images, meta)
    out = tmp_path / "lat.json"
    with pytest.raises(UserError, match=message):
        run(images, meta, out, model)
    assert not out.exists()
    assert not list(tmp_path.rglob("*.npz"))


@pytest.mark.parametrize("kind", ["missing.safetensors", "train_data"])
def test_a_model_that_is_none_is_told(kind: str, tmp_path: Path) -> None:
    images, meta = write_set(tmp_path)
    with pytest.raises(UserError) as caught:
        run(images, meta, tmp_path / "lat.json", tmp_path / kind)
    assert (caught.value.problems[0].where or "").startswith("model_name_or_path")


def test_the_vae_of_every_form_of_a_model_is_the_same(model: Path, tmp_path: Path) -> None:
    file = tiny_ldm(tmp_path, "sd1", layers_per_block=1)
    pickled = tiny_ldm(tmp_path, "sd1", ".ckpt", layers_per_block=1)
    digests = {encoder_digest(load_vae(str(source), torch.float32)) for source in (model, model / "vae", file, pickled)}
    assert len(digests) == 1


def test_it_runs_inside_its_own_folder(model: Path, tmp_path: Path) -> None:
    images, meta = write_set(tmp_path)
    command = [sys.executable, "prepare_buckets_latents.py", "--full_path", str(images), str(meta), str(meta)]
    subprocess.run([*command, str(model), *SMALL], check=True, cwd=ROOT / "finetune", timeout=120)
    assert str(images / "00.png") in json.loads(meta.read_text())


@pytest.mark.slow
def test_two_processes_share_the_images(model: Path, tmp_path: Path) -> None:
    (images, meta), (alone, other) = write_set(tmp_path / "a", 6), write_set(tmp_path / "b", 6)
    (images / "04.png").write_bytes((images / "04.png").read_bytes()[:300])
    (alone / "04.png").write_bytes((alone / "04.png").read_bytes()[:300])
    assert run(alone, other, other, model) == 1
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    command = [
        *(sys.executable, *launcher, "--rdzv_endpoint=localhost:0"),
        *(str(ROOT / "finetune" / "prepare_buckets_latents.py"), str(images), str(meta), str(meta), str(model), *SMALL),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, env=environment, timeout=300, capture_output=True, text=True)
    assert done.returncode == 1
    assert "1 of 6 images were skipped" in done.stderr
    assert meta.read_bytes() == other.read_bytes()
    assert set(latents(images)) == set(latents(alone))
