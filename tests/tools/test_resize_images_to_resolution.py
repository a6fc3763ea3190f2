import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.errors import UserError
from tools.resize_images_to_resolution import fitting_size, main

ROOT = Path(__file__).parents[2]


def write_folder(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (100, 200, 3), dtype=np.uint8)).save(folder / "wide.png")
    Image.new("RGB", (30, 30), (10, 200, 30)).save(folder / "small.jpg")
    (folder / "wide.txt").write_text("a caption", encoding="utf-8")
    (folder / "notes.md").write_text("notes", encoding="utf-8")
    return folder


def copies(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".png", ".jpg"):
            with Image.open(path) as image:
                found[path.name] = image.size
    return found


def test_copies_have_at_most_the_area_and_the_others_are_copied(tmp_path: Path) -> None:
    source, target = write_folder(tmp_path / "in"), tmp_path / "out"
    assert main([str(source), str(target), "--max_resolution=64x64,100x32"]) == 0
    assert copies(target) == {
        "small+100x32.jpg": (30, 30),
        "small+64x64.jpg": (30, 30),
        "wide+100x32.jpg": (80, 40),
        "wide+64x64.jpg": (90, 45),
    }
    assert (target / "notes.md").read_text() == "notes"
    assert (target / "wide.txt").read_text() == "a caption"
    assert not (target / "wide+64x64.txt").exists()


def test_each_copy_is_made_of_the_original(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    main([str(source), str(tmp_path / "both"), "--max_resolution=64x64,32x32", "--save_as_png"])
    main([str(source), str(tmp_path / "one"), "--max_resolution=32x32", "--save_as_png"])
    name = "wide+32x32.png"
    assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_sides_are_cut_to_a_multiple_in_the_middle(tmp_path: Path) -> None:
    source, target = write_folder(tmp_path / "in"), tmp_path / "out"
    main([str(source), str(target), "--max_resolution=200x100", "--divisible_by=32", "--save_as_png"])
    assert copies(target)["wide+200x100.png"] == (192, 96)
    whole = np.asarray(Image.open(source / "wide.png"))
    np.testing.assert_array_equal(np.asarray(Image.open(target / "wide+200x100.png")), whole[2:98, 4:196])


def test_associated_files_go_with_each_copy(tmp_path: Path) -> None:
    source, target = write_folder(tmp_path / "in"), tmp_path / "out"
    main([str(source), str(target), "--max_resolution=64x64,32x32", "--copy_associated_files"])
    assert (target / "wide+64x64.txt").read_text() == (target / "wide+32x32.txt").read_text() == "a caption"


@pytest.mark.parametrize("name", ["area", "cubic", "lanczos4", "nearest", "linear", "box"])
def test_every_interpolation_keeps_an_even_colour(name: str, tmp_path: Path) -> None:
    source, target = write_folder(tmp_path / "in"), tmp_path / "out"
    main([str(source), str(target), "--max_resolution=16x16", f"--interpolation={name}", "--save_as_png"])
    colour = np.asarray(Image.open(source / "small.jpg")).reshape(-1, 3)[0]
    assert np.abs(np.asarray(Image.open(target / "small+16x16.png")).astype(int) - colour).max() <= 1


def test_png_keeps_transparency_and_the_colours_under_it(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGBA", (64, 64), (200, 40, 60, 128)).save(tmp_path / "in" / "a.png")
    main([str(tmp_path / "in"), str(tmp_path / "out"), "--max_resolution=32x32", "--save_as_png"])
    pixels = np.asarray(Image.open(tmp_path / "out" / "a+32x32.png")).reshape(-1, 4).astype(int)
    assert np.abs(pixels - (200, 40, 60, 128)).max() <= 1
    main([str(tmp_path / "in"), str(tmp_path / "flat"), "--max_resolution=32x32"])
    shown = np.asarray(Image.open(tmp_path / "flat" / "a+32x32.jpg")).reshape(-1, 3).astype(int)
    assert np.abs(shown - [255 - (255 - level) * 128 // 255 for level in (200, 40, 60)]).max() <= 3


def test_a_bad_image_is_named_and_the_others_done(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, target = write_folder(tmp_path / "in"), tmp_path / "out"
    (source / "bad.png").write_bytes(b"no image")
    (source / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert main([str(source), str(target), "--max_resolution=64x64"]) == 1
    told = capfd.readouterr().err
    assert f"skipped: {source / 'bad.png'}" in told
    assert f"skipped: {source / 'gone.png'}: image not found" in told
    assert set(copies(target)) == {"small+64x64.jpg", "wide+64x64.jpg"}


def test_files_that_are_there_are_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, target = write_folder(tmp_path / "in"), tmp_path / "out"
    main([str(source), str(target), "--max_resolution=64x64"])
    capfd.readouterr()
    main([str(source), str(target), "--max_resolution=64x64"])
    assert "holds 4 files already" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_resolution=64"], "expects resolutions"),
        (["--max_resolution=0x64"], "expects resolutions"),
        (["--interpolation=cubix"], "allows area"),
        (["--divisible_by=0"], "at least 1"),
    ],
)
def test_wrong_options_are_refused(more: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        main([str(write_folder(tmp_path / "in")), str(tmp_path / "out"), *more])
    assert not (tmp_path / "out").exists()


def test_folders_that_will_not_do_are_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="both folders are the same"):
        main([str(source), str(source.parent / "." / "in")])
    with pytest.raises(UserError, match="folder not found"):
        main([str(tmp_path / "im"), str(tmp_path / "out")])
    with pytest.raises(UserError, match="no images"):
        main([str(tmp_path / "empty"), str(tmp_path / "out")])
    with pytest.raises(UserError, match="cannot make the folder"):
        main([str(source), str(source / "notes.md")])
    (source / "wide.jpg").write_bytes((source / "small.jpg").read_bytes())
    with pytest.raises(UserError, match="belong to several images"):
        main([str(source), str(tmp_path / "out")])


@pytest.mark.parametrize("size", [(1, 1000), (999, 1000), (4000, 3000)])
def test_the_area_is_never_larger(size: tuple[int, int]) -> None:
    width, height = fitting_size(size, 64 * 64)
    assert width * height <= 64 * 64 or 1 in (width, height)
    assert width / height == pytest.approx(size[0] / size[1], rel=0.05) or 1 in (width, height)


def test_it_runs_from_any_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "in")
    command = [sys.executable, str(ROOT / "tools" / "resize_images_to_resolution.py"), "in", "out"]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=60)
    assert len(copies(tmp_path / "out")) == 8
