"""One file of the latent cache: others read it, and we read it back."""

import zipfile
from dataclasses import replace

import numpy as np
import pytest

from library.data.buckets import Placement
from library.data.cache_entry import Entry, Settings, Source, UnusableEntryError, read_entry, write_entry
from library.data.images import ImageView

SETTINGS = Settings(
    bucket=(40, 16), resized=(41, 16), origin=(0, 0), interpolation="area", vae="0123456789abcdef", version=1
)


def numbers(seed, order="C"):
    values = np.random.default_rng(seed).normal(size=(4, 2, 5)).astype(np.float32)
    return np.asarray(values, order=order)


def make_entry(*, mirrored=False, order="C"):
    return Entry(
        mean=numbers(0, order),
        std=numbers(1, order),
        mirrored=(numbers(2, order), numbers(3, order)) if mirrored else None,
        original_size=(82, 32),
        settings=SETTINGS,
        source=Source(size=10, mtime_ns=2**62, content="ab"),
    )


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_is_written_is_read_back(tmp_path, mirrored, order):
    path = tmp_path / "ü.npz"
    entry = make_entry(mirrored=mirrored, order=order)
    write_entry(path, entry)
    found = read_entry(path)
    assert (found.settings, found.source, found.original_size) == (SETTINGS, entry.source, (82, 32))
    for flipped in (False, True):
        pair = found.pair(flipped=flipped)
        if flipped and not mirrored:
            assert pair is None
            continue
        for one, expected in zip(pair, entry.pair(flipped=flipped), strict=True):
            assert one.flags.writeable
            np.testing.assert_array_equal(one, expected)
    assert found.fits((40, 16))
    assert not found.fits((16, 40))


def test_it_is_an_ordinary_archive_of_arrays(tmp_path):
    entry = make_entry(mirrored=True)
    write_entry(tmp_path / "a.npz", entry)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.testzip() is None
    with np.load(tmp_path / "a.npz") as archive:
        np.testing.assert_array_equal(archive["latents"], entry.mean)
        np.testing.assert_array_equal(archive["latents_std"], entry.std)
        np.testing.assert_array_equal(archive["latents_flipped"], entry.mirrored[0])
        np.testing.assert_array_equal(archive["latents_flipped_std"], entry.mirrored[1])
        assert archive["original_size"].tolist() == [82, 32]
        assert archive["crop_ltrb"].tolist() == [0, 0, 40, 16]
        assert b'"vae": "0123456789abcdef"' in archive["cache_entry"].item()


def test_the_same_entry_is_the_same_file(tmp_path):
    for name in ("a.npz", "b.npz"):
        write_entry(tmp_path / name, make_entry())
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "a.npz"
    write_entry(path, make_entry())
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UnusableEntryError, match="damaged"):
            read_entry(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version of the encoding: 2 instead of 1"),
        ({"bucket": (16, 40)}, "another size: 16x40 instead of 40x16"),
        ({"resized": (44, 16)}, "another crop: 44x16"),
        ({"origin": (1, 0)}, "another crop"),
        ({"interpolation": "lanczos"}, "another interpolation: lanczos instead of area"),
        ({"vae": "b"}, "another VAE"),
    ],
)
def test_every_difference_of_settings_is_named(change, words):
    other = replace(SETTINGS, **change)
    assert words in other.difference(SETTINGS)
    assert other.digest() != SETTINGS.digest()
    assert SETTINGS.difference(replace(SETTINGS)) is None


@pytest.mark.parametrize(
    ("size", "resized", "given", "expected"),
    [
        ((64, 64), (64, 64), "lanczos", "none"),
        ((128, 64), (64, 64), None, "area"),
        ((32, 64), (64, 128), None, "lanczos"),
        ((32, 64), (64, 128), "linear", "bilinear"),
        ((32, 64), (64, 128), "cubic", "bicubic"),
    ],
)
def test_the_filter_is_the_one_that_is_used(tmp_path, size, resized, given, expected):
    view = ImageView(tmp_path / "a.png", size, Placement((64, 64), resized), given)
    assert Settings.of(view, "a").interpolation == expected
