"""One picture of every kind that is easily read wrongly, and the resizing filters against golden values."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from library.data.buckets import Placement
from library.data.image_headers import UnreadableImageError, displayed_size
from library.data.images import (
    ImageView,
    apply_gamma,
    centre_origin,
    decode,
    jitter_colour,
    load_view,
    random_origin,
    resize,
    shift_hue,
    to_tensor,
)
from library.errors import UserError

GOLDEN = Path(__file__).parents[2] / "golden"
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def quadrants():
    """4 x 2 pixels, every one different, so that each orientation gives another picture."""
    return Image.fromarray(noise(2, 4))


@pytest.mark.parametrize("value", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, quadrants, value):
    exif = Image.Exif()
    exif[0x0112] = value
    quadrants.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert expected.shape == ((2, 4, 3) if value < 5 else (4, 2, 3))
    found = decode(tmp_path / "a.png").rgb
    np.testing.assert_array_equal(found, expected)
    assert value == 1 or not np.array_equal(found, np.asarray(quadrants))


def test_orientation_of_a_phone_photo_by_hand(tmp_path):
    """Orientation 6: the first row of the file is the right edge of the picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[0:8] = RED
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    found = decode(tmp_path / "a.jpg")
    assert found.size == (16, 32)
    assert (found.rgb[:, 8:, 0] > 200).all()
    assert (found.rgb[:, :8, 0] < 50).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_turns_like_a_png(tmp_path, quadrants, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.tif", "a.png"):
        quadrants.save(tmp_path / name, exif=exif)
    np.testing.assert_array_equal(decode(tmp_path / "a.tif").rgb, decode(tmp_path / "a.png").rgb)


@pytest.mark.parametrize("value", [0, 9, 255])
def test_an_impossible_orientation_is_upright(tmp_path, quadrants, value):
    exif = Image.Exif()
    exif[0x0112] = value
    quadrants.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(decode(tmp_path / "a.png").rgb, np.asarray(quadrants))


def test_transparent_pixels_are_white_and_hide_their_colour(tmp_path):
    pixels = np.array([[(255, 0, 0, 0), (255, 0, 0, 255), (0, 0, 0, 128), (0, 0, 255, 51)]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = decode(tmp_path / "a.png")
    assert image.rgb.tolist() == [[[255, 255, 255], [255, 0, 0], [127, 127, 127], [204, 204, 255]]]
    assert image.alpha.tolist() == [[0, 255, 128, 51]]


def test_the_hidden_colour_does_not_leak_into_a_resized_edge(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[...] = (255, 0, 0, 0)
    pixels[:, 3:] = (0, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "a.webp", lossless=True, exact=True)
    view = ImageView(tmp_path / "a.webp", (8, 8), Placement((4, 4), (4, 4)), None)
    found = load_view(view).astype(int)
    assert (found[..., 0] == found[..., 1]).all()
    assert (found[..., 0] == found[..., 2]).all()


def test_alpha_turns_with_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[0, 2, 3] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert decode(tmp_path / "a.png").alpha.tolist() == [[200, 0], [0, 0], [0, 0]]


def test_grey_with_alpha(tmp_path):
    Image.fromarray(np.array([[(10, 255), (10, 0)]], np.uint8), "LA").save(tmp_path / "a.png")
    image = decode(tmp_path / "a.png")
    assert image.rgb.tolist() == [[[10] * 3, [255] * 3]]


def test_an_opaque_format_has_no_alpha(tmp_path, quadrants):
    quadrants.save(tmp_path / "a.bmp")
    image = decode(tmp_path / "a.bmp")
    assert image.alpha is None
    np.testing.assert_array_equal(image.rgb, np.asarray(quadrants))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    """46 % grey stays 46 % grey."""
    values = np.array([[0, 257, 30147, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png").rgb[0, :, 0].tolist() == [0, 1, 117, 255]


def test_sixteen_bit_grey_with_a_transparent_value(tmp_path):
    Image.fromarray(np.array([[1000, 30147]], np.uint16)).save(tmp_path / "a.png", transparency=1000)
    image = decode(tmp_path / "a.png")
    assert image.alpha.tolist() == [[0, 255]]
    assert image.rgb[0, :, 0].tolist() == [255, 117]


def test_sixteen_bit_colour_and_alpha(tmp_path):
    bgra = np.array([[(0, 30147, 65535, 65535), (65535, 0, 0, 0)]], np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), bgra)
    cv2.imwrite(str(tmp_path / "b.png"), bgra[..., :3])
    for name in ("a.png", "b.png"):
        np.testing.assert_allclose(decode(tmp_path / name).rgb[0, 0], [255, 117, 0], atol=1)
    assert decode(tmp_path / "a.png").rgb[0, 1].tolist() == [255, 255, 255]


def test_cmyk_jpeg_becomes_the_right_colours(tmp_path):
    """Ink amounts, 255 is full: no ink is white, cyan and yellow make green, black ink is black."""
    inks = np.zeros((8, 32, 4), np.uint8)
    inks[:, 8:16] = (255, 0, 255, 0)
    inks[:, 16:24] = (0, 0, 0, 255)
    inks[:, 24:] = (0, 255, 255, 0)
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.jpg", quality=100)
    found = decode(tmp_path / "a.jpg").rgb[4, 4::8]
    np.testing.assert_allclose(found, [WHITE, GREEN, (0, 0, 0), RED], atol=6)


def test_palette(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*BLUE, *RED])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png")
    found = decode(tmp_path / "a.png")
    assert found.alpha is None
    assert found.rgb.tolist() == [[list(BLUE), list(RED)]]
    image.save(tmp_path / "b.png", transparency=1)
    found = decode(tmp_path / "b.png")
    assert found.rgb.tolist() == [[list(BLUE), list(WHITE)]]
    assert found.alpha.tolist() == [[255, 0]]


def test_palette_with_partly_transparent_entries(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*BLUE, *RED])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=bytes([255, 51]))
    assert decode(tmp_path / "a.png").rgb.tolist() == [[list(BLUE), [255, 204, 204]]]


def test_colour_declared_transparent(tmp_path):
    Image.fromarray(np.array([[RED, BLUE]], np.uint8)).save(tmp_path / "a.png", transparency=RED)
    assert decode(tmp_path / "a.png").rgb.tolist() == [[list(WHITE), list(BLUE)]]


def test_one_bit(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png").rgb.tolist() == [[[255] * 3, [0] * 3]]


def test_grey(tmp_path):
    Image.fromarray(np.array([[0, 100, 255]], np.uint8)).save(tmp_path / "a.png")
    image = decode(tmp_path / "a.png")
    assert image.rgb.tolist() == [[[0] * 3, [100] * 3, [255] * 3]]
    assert image.alpha is None


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    lossless = {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], duration=100, **lossless)
    with Image.open(tmp_path / f"a{suffix}") as image:
        assert image.n_frames == 2
    assert (decode(tmp_path / f"a{suffix}").rgb == RED).all()


def swapped_profile(description=b"\0t\0e\0s\0t"):
    """A profile whose red is sRGB's blue and the other way round."""
    content = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"swap"), (b"bXYZ", b"rXYZ"), (b"swap", b"bXYZ"), (b"\0s\0R\0G\0B", description)):
        assert old in content
        content = content.replace(old, new)
    return content


def test_an_icc_profile_is_converted_to_srgb(tmp_path):
    Image.new("RGB", (2, 2), RED).save(tmp_path / "a.png", icc_profile=swapped_profile())
    np.testing.assert_allclose(decode(tmp_path / "a.png").rgb[0, 0], BLUE, atol=2)


def test_an_icc_profile_applies_below_alpha_and_to_palettes(tmp_path):
    Image.new("RGBA", (1, 1), (*RED, 51)).save(tmp_path / "a.png", icc_profile=swapped_profile())
    np.testing.assert_allclose(decode(tmp_path / "a.png").rgb[0, 0], (204, 204, 255), atol=2)
    image = Image.new("P", (1, 1))
    image.putpalette([*RED])
    image.save(tmp_path / "b.png", icc_profile=swapped_profile())
    np.testing.assert_allclose(decode(tmp_path / "b.png").rgb[0, 0], BLUE, atol=2)


def test_an_srgb_profile_changes_nothing(tmp_path):
    pixels = noise(4, 4)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile)
    np.testing.assert_array_equal(decode(tmp_path / "a.png").rgb, pixels)


@pytest.mark.parametrize("profile", [b"no profile at all", swapped_profile()[:200]])
def test_a_damaged_profile_is_ignored(tmp_path, profile):
    Image.new("RGB", (2, 2), RED).save(tmp_path / "a.png", icc_profile=profile)
    assert (decode(tmp_path / "a.png").rgb == RED).all()


def test_a_profile_for_another_kind_of_image_is_ignored(tmp_path):
    inks = np.zeros((8, 8, 4), np.uint8)
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.jpg", quality=100, icc_profile=swapped_profile())
    assert (decode(tmp_path / "a.jpg").rgb > 250).all()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_truncated_file_is_named(tmp_path, suffix):
    path = tmp_path / f"broken{suffix}"
    Image.fromarray(noise(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError) as caught:
        decode(path)
    (problem,) = caught.value.problems
    assert str(path) == problem.where
    assert "replace it" in problem.remedy


@pytest.mark.parametrize("content", [b"", b"this is text", b"\x89PNG\r\n\x1a\n garbage"])
def test_what_is_no_image_is_named(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot read the image"):
        decode(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="image not found"):
        decode(tmp_path / "gone.png")


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="floating-point"):
        decode(tmp_path / "a.tif")


RESIZED = json.loads((GOLDEN / "resize_interpolation.json").read_text())["cases"]


@pytest.mark.parametrize("case", RESIZED, ids=lambda c: f"{c['src']}-{c['dst']}-{c['interpolation']}")
def test_resizing_filters_are_the_golden_ones(case):
    source = noise(12, 16)
    found = resize(source, tuple(case["dst"]), case["interpolation"])
    assert found.shape == (case["dst"][1], case["dst"][0], 3)
    assert found[0, :3].tolist() == case["first_row_first3"]
    assert found.mean() == pytest.approx(case["mean"], abs=1e-4)


@pytest.mark.parametrize(("name", "same"), [("linear", "bilinear"), ("cubic", "bicubic")])
def test_filters_with_two_names(name, same):
    source = noise(12, 16)
    np.testing.assert_array_equal(resize(source, (9, 7), name), resize(source, (9, 7), same))


def test_the_crop_is_centred_with_the_odd_pixel_cut_at_the_far_side(tmp_path):
    pixels = noise(9, 12)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    view = ImageView(tmp_path / "a.png", (12, 9), Placement((8, 6), (12, 9)), None)
    np.testing.assert_array_equal(load_view(view), pixels[1:7, 2:10])
    assert centre_origin((5, 3)) == (2, 1)


def test_a_random_crop_reaches_every_position_and_repeats_with_its_key(tmp_path):
    assert {random_origin((2, 1), Random(seed)) for seed in range(100)} == {(x, y) for x in range(3) for y in range(2)}
    pixels = noise(9, 12)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    view = ImageView(tmp_path / "a.png", (12, 9), Placement((8, 6), (12, 9)), None)
    left, top = random_origin((4, 3), Random(3))
    np.testing.assert_array_equal(load_view(view, origin=(left, top)), pixels[top : top + 6, left : left + 8])


def test_an_image_that_changed_since_it_was_placed_is_named(tmp_path):
    Image.fromarray(noise(9, 12)).save(tmp_path / "a.png")
    view = ImageView(tmp_path / "a.png", (9, 12), Placement((6, 8), (9, 12)), None)
    with pytest.raises(UserError, match="12x9 pixels, but was 9x12"):
        load_view(view)


def test_colour_jitter_is_rare_weak_and_repeatable():
    pixels = noise(16, 16)
    results = [jitter_colour(pixels, Random(seed)) for seed in range(600)]
    changed = [result for result in results if not np.array_equal(result, pixels)]
    # A third of them, less the 1 in 17 hue shifts by zero; five standard deviations either way.
    assert 130 < len(changed) < 255
    np.testing.assert_array_equal(jitter_colour(pixels, Random(5)), results[5])
    brightness = [abs(result.mean() - pixels.mean()) for result in changed]
    assert max(brightness) < 12


def test_hue_and_gamma_against_values_by_hand():
    red = np.full((1, 1, 3), RED, np.uint8)
    # 60 steps of 2 degrees are a third of the circle.
    assert shift_hue(red, 60).tolist() == [[list(GREEN)]]
    assert shift_hue(red, -60).tolist() == [[list(BLUE)]]
    grey = np.array([[[0, 64, 255]]], np.uint8)
    assert apply_gamma(grey, 2.0).tolist() == [[[0, 16, 255]]]


def test_pixels_become_minus_one_to_one():
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 1] = (255, 0, 51)
    tensor = to_tensor(pixels[:, ::-1])
    assert tensor.shape == (3, 2, 3)
    assert str(tensor.dtype) == "torch.float32"
    assert tensor[:, 0, 1].tolist() == pytest.approx([1.0, -1.0, -0.6])


def test_importing_needs_neither_torch_nor_opencv():
    code = "import sys, library.data.images; sys.exit(bool({'torch', 'cv2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_plugin_that_fails_in_its_own_way_makes_an_unreadable_image(tmp_path, monkeypatch):
    """The decoder of JPEG XL raises RuntimeError for a damaged file."""

    def broken(*_):
        raise RuntimeError("Generic Error. \nBuild the library yourself to know more.")

    Image.init()
    monkeypatch.setitem(Image.OPEN, "PNG", (broken, lambda start: start.startswith(b"broken")))
    path = tmp_path / "a.png"
    path.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"cannot read the image: Generic Error\.$|Error\.\n  where"):
        decode(path)
    with pytest.raises(UnreadableImageError, match=r"Generic Error\.$"):
        displayed_size(path)


def test_a_file_that_is_no_image_is_told_without_its_path(tmp_path):
    path = tmp_path / "a.png"
    for content, reason in ((b"", "the file is empty"), (b"<html>", "text such as a web page"), (b"12", "no image")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=reason):
            decode(path)
        with pytest.raises(UnreadableImageError, match=reason):
            displayed_size(path)
    path.unlink()
    path.symlink_to(tmp_path / "gone.png")
    with pytest.raises(UnreadableImageError, match="what it links to is gone"):
        displayed_size(path)
