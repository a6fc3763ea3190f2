"""The latent cache on disk: what is rebuilt when, and what is never trusted."""

import io
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.data import cache_entry
from library.data.cache_upkeep import unused_files
from library.data.disk_cache import DiskLatentCache, Share
from library.data.latent_cache import LatentCache
from library.data.latent_encoding import uses_of
from library.data.setup import prepare_data
from library.data.spec import AugmentRules
from library.errors import UserError
from tests.library.data.small_set import BUCKETS, encode, make_spec, make_subset, write_images

ROOT = Path(__file__).parents[3]
NAMES = {
    "0_0064x0064_sd.npz",
    "1_0064x0064_sd.npz",
    "2_0096x0048_sd.npz",
    "3_0048x0096_sd.npz",
    "4_0064x0064_sd.npz",
}


class Counting:
    """An encoder that counts the images it is given."""

    def __init__(self):
        self.images = 0

    def __call__(self, pixels):
        self.images += len(pixels)
        return encode(pixels)


def records_of(folder):
    """The records of what lies in ``folder``, with their sizes as they are."""
    (template,) = write_images(folder.parent / "template", [(64, 64)])
    paths = sorted(path for path in folder.iterdir() if path.suffix in (".png", ".jpg"))
    return [replace(template, folder=path.parent, name=path.name, size=Image.open(path).size) for path in paths]


def data_of(folder, *, resolution=(64, 64), buckets=BUCKETS, **changes):
    return prepare_data(
        make_spec(make_subset(folder, **changes), resolution=resolution, buckets=buckets), records_of(folder)
    )


def fill(data, *, vae="a", batch_size=1, **more):
    """The filled cache, and how many images were encoded for it."""
    counting = Counting()
    cache = DiskLatentCache.fill(data, counting, vae=vae, batch_size=batch_size, progress=False, **more)
    return cache, counting.images


def entries(folder):
    return {path.name for path in folder.iterdir() if path.suffix == ".npz"}


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def data(folder):
    return data_of(folder)


def assert_equals_memory(cache, data, flip=False):
    expected = LatentCache.fill(data, encode, batch_size=1, progress=False)
    for number in range(len(data.records)):
        for flipped in (False, True) if flip else (False,):
            pair = cache.get(number, flipped=flipped)
            for found, wanted in zip(pair, expected.get(number, flipped=flipped), strict=True):
                assert found.dtype == torch.float32
                assert torch.equal(found, wanted)


# --- what an entry is


def test_entries_have_the_names_and_keys_that_other_programs_read(folder, data):
    fill(data_of(folder, augment=AugmentRules(flip_aug=True)))
    assert entries(folder) == NAMES
    with np.load(folder / "2_0096x0048_sd.npz") as archive:
        assert {"latents", "latents_flipped", "original_size", "crop_ltrb"} < set(archive.files)
        assert archive["latents"].dtype == np.float32
        assert archive["latents"].shape == (4, 5, 11)
        assert archive["latents_flipped"].shape == (4, 5, 11)
        assert archive["original_size"].tolist() == [96, 48]
        assert len(archive["crop_ltrb"]) == 4


@pytest.mark.parametrize("flip", [False, True])
def test_the_cache_on_disk_equals_the_one_in_memory(folder, flip):
    data = data_of(folder, augment=AugmentRules(flip_aug=flip))
    cache, encoded = fill(data, batch_size=1)
    assert encoded == (10 if flip else 5)
    assert_equals_memory(cache, data, flip)
    assert_equals_memory(pickle.loads(pickle.dumps(cache)), data, flip)


def test_a_second_start_makes_nothing_and_reads_no_image(data, monkeypatch):
    fill(data)
    monkeypatch.setattr(cache_entry, "content_digest", lambda path: pytest.fail(f"{path} was read"))
    assert fill(data)[1] == 0


# --- the matrix: what changes, and what is rebuilt


def test_other_pixels_rebuild_that_image_alone(folder, data, caplog):
    fill(data)
    write_images(folder.parent / "new", [(64, 64)], seed=9)
    (folder.parent / "new" / "0.png").replace(folder / "1.png")
    caplog.set_level(logging.INFO)
    cache, encoded = fill(data)
    assert encoded == 1
    assert_equals_memory(cache, data)
    assert "1 made anew: the image has changed (1.png)" in caplog.text


def test_a_touched_image_is_read_once_and_not_rebuilt(folder, data, monkeypatch):
    fill(data)
    os.utime(folder / "1.png", ns=(1, 1))
    assert fill(data)[1] == 0
    monkeypatch.setattr(cache_entry, "content_digest", lambda path: pytest.fail(f"{path} was read"))
    assert fill(data)[1] == 0


def test_another_resolution_rebuilds_all_and_the_first_stays_valid(folder, data):
    first, _ = fill(data)
    larger = data_of(folder, resolution=(96, 96))
    second, encoded = fill(larger)
    assert encoded == 5
    assert_equals_memory(second, larger)
    assert_equals_memory(first, data)
    assert fill(data)[1] == 0
    assert fill(larger)[1] == 0


def test_another_crop_rebuilds_the_images_that_are_cropped_otherwise(folder, data):
    fill(data)
    coarse = data_of(folder, buckets=replace(BUCKETS, bucket_reso_steps=32))
    changed = sum(coarse.placements[number] != data.placements[number] for number in range(5))
    assert changed == 2
    cache, encoded = fill(coarse)
    assert encoded == changed
    assert_equals_memory(cache, coarse)


def test_mirroring_rebuilds_and_dropping_it_does_not(folder, data):
    fill(data)
    mirrored = data_of(folder, augment=AugmentRules(flip_aug=True))
    cache, encoded = fill(mirrored)
    assert encoded == 10
    assert_equals_memory(cache, mirrored, flip=True)
    assert entries(folder) == NAMES
    assert fill(data)[1] == 0


@pytest.mark.parametrize("changes", [{"augment": AugmentRules(flip_aug=True)}, {"alpha_mask": True}], ids=str)
def test_a_change_of_one_subset_rebuilds_its_entries_alone(tmp_path, changes):
    records = [*write_images(tmp_path / "a"), *write_images(tmp_path / "b", [(64, 64)] * 2, subset=1)]
    first = make_subset(tmp_path / "a")
    fill(prepare_data(make_spec(first, make_subset(tmp_path / "b")), records))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.npz")}
    changed = prepare_data(make_spec(first, make_subset(tmp_path / "b", **changes)), records)
    fill(changed)
    rebuilt = {path for path in before if path.stat().st_mtime_ns != before[path]}
    assert rebuilt == set((tmp_path / "b").glob("*.npz"))
    assert len(rebuilt) == 2
    assert fill(changed)[1] == 0


def test_another_interpolation_rebuilds_what_is_resized(folder, data):
    fill(data)
    resized = sum(
        placement.resized != record.size for placement, record in zip(data.placements, data.records, strict=True)
    )
    assert 0 < resized < 5
    nearest = data_of(folder, resize_interpolation="nearest")
    cache, encoded = fill(nearest)
    assert encoded == resized
    assert_equals_memory(cache, nearest)
    assert fill(data_of(folder, resize_interpolation="area"))[1] == 0


def test_another_vae_rebuilds_all(data, caplog):
    fill(data)
    assert fill(data, vae="b")[1] == 5
    assert "5 made anew: made with another VAE" in caplog.text
    assert fill(data, vae="a")[1] == 0


def test_another_version_rebuilds_all_in_place(folder, data, monkeypatch):
    fill(data)
    monkeypatch.setattr(cache_entry, "ENCODING_VERSION", 2)
    assert fill(data)[1] == 5
    assert entries(folder) == NAMES


def test_an_image_that_changes_while_it_is_encoded_is_rebuilt_next_time(folder, data):
    (folder.parent / "new").mkdir()
    write_images(folder.parent / "new", [(64, 64)], seed=9)

    def replacing(pixels):
        if (folder.parent / "new" / "0.png").exists():
            content = (folder.parent / "new" / "0.png").read_bytes()
            (folder.parent / "new" / "0.png").unlink()
            for name in ("0.png", "1.png", "4.png"):
                # In one go: another thread may be reading the image.
                (folder.parent / "new" / "whole").write_bytes(content)
                (folder.parent / "new" / "whole").replace(folder / name)
        return encode(pixels)

    DiskLatentCache.fill(data, replacing, vae="a", batch_size=1, progress=False)
    cache, _ = fill(data)
    assert_equals_memory(cache, data)


# --- damage


def truncate(path):
    path.write_bytes(path.read_bytes()[:-30])


def empty(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    with np.load(io.BytesIO(bytes(content))) as archive:
        position = content.find(archive["latents"].tobytes())
    content[position + 5] ^= 4
    path.write_bytes(bytes(content))


def other_numbers(path):
    """As a program that does not know of the checksum would write it."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    np.savez(path, **{**arrays, "latents": arrays["latents"] + 1})


def other_facts(path):
    """As if it were made with another VAE."""
    content = path.read_bytes()
    assert content.count(b'"vae": "a"') == 2
    path.write_bytes(content.replace(b'"vae": "a"', b'"vae": "b"'))


def no_archive(path):
    path.write_bytes(b"PK\x03\x04 nothing of the kind")


def a_pickle(path):
    np.savez(path, latents=np.array([{"run": "me"}], dtype=object))


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, other_numbers, other_facts, no_archive, a_pickle])
def test_a_damaged_entry_is_rebuilt_and_reported(damage, folder, data, caplog):
    fill(data)
    damage(folder / "4_0064x0064_sd.npz")
    cache, encoded = fill(data)
    assert encoded == 1
    assert_equals_memory(cache, data)
    assert "1 made anew: damaged" in caplog.text
    assert "(4.png)" in caplog.text


def test_every_flipped_bit_of_an_entry_is_harmless(folder, data):
    """Whatever byte is hit: the entry is rebuilt, or what it holds is what was written."""
    cache, _ = fill(data)
    path = folder / "4_0064x0064_sd.npz"
    whole = path.read_bytes()
    expected = cache.get(4, flipped=False)
    rng = np.random.default_rng(1)
    for position in rng.integers(0, len(whole), 300).tolist():
        broken = bytearray(whole)
        broken[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(broken))
        if cache.judge(data.view(4), flip=False).path is not None:
            assert all(torch.equal(a, b) for a, b in zip(cache.get(4, flipped=False), expected, strict=True))


def test_an_entry_lost_during_the_run_is_an_error_that_names_the_image(folder, data):
    cache, _ = fill(data)
    truncate(folder / "1_0064x0064_sd.npz")
    with pytest.raises(UserError, match="changed during the run") as caught:
        cache.get(1, flipped=False)
    assert caught.value.problems[0].where == str(folder / "1.png")


# --- files of other programs


def foreign(folder, name, *, shape=(4, 8, 8), size=(64, 64), **more):
    arrays = {
        "latents": np.full(shape, 0.5, np.float32),
        "original_size": np.array(size),
        "crop_ltrb": np.array([0, 0, 64, 64]),
    }
    np.savez(folder / name, **{**arrays, **more})


@pytest.mark.parametrize("name", ["0_0064x0064_sd.npz", "0.npz"])
def test_a_foreign_file_of_the_right_geometry_is_used_as_a_sample(name, folder, data, caplog):
    foreign(folder, name)
    cache, encoded = fill(data)
    assert encoded == 4
    mean, std = cache.get(0, flipped=False)
    assert torch.equal(mean, torch.full((4, 8, 8), 0.5))
    assert torch.equal(std, torch.zeros(4, 8, 8))
    assert caplog.text.count("written by another program (0.png)") == 1


@pytest.mark.parametrize(
    ("given", "flip", "words"),
    [
        ({"shape": (4, 4, 4)}, False, "for another size: latents 4x4x4 for a bucket of 64x64"),
        ({"shape": (16, 8, 8)}, False, "for another size"),
        ({"size": (65, 64)}, False, "for an image of another size"),
        ({}, True, "without mirrored latents"),
        ({"latents": np.full((4, 8, 8), np.nan, np.float32)}, False, "not finite"),
        ({"latents": np.zeros(4, np.float32)}, False, "not a file of latents"),
        ({"original_size": np.array([1])}, False, "not a file of latents"),
        ({"arr_0": np.zeros((4, 8, 8))}, False, "old format"),
    ],
)
def test_a_foreign_file_that_cannot_be_verified_is_rebuilt(given, flip, words, folder, caplog):
    foreign(folder, "0_0064x0064_sd.npz", **given)
    data = data_of(folder, augment=AugmentRules(flip_aug=flip))
    cache, encoded = fill(data)
    assert encoded == (10 if flip else 5)
    assert words in caplog.text
    assert_equals_memory(cache, data, flip)


@pytest.mark.parametrize("turn", [2, 3])
def test_a_foreign_file_of_a_turned_image_is_rebuilt(turn, folder, caplog):
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.open(folder / "0.png").save(folder / "0.png", exif=exif)
    foreign(folder, "0_0064x0064_sd.npz")
    data = data_of(folder)
    cache, encoded = fill(data)
    assert encoded == 5
    assert "orientation" in caplog.text
    assert_equals_memory(cache, data)


# --- names


def test_images_with_the_same_stem_do_not_share_an_entry(tmp_path, caplog):
    folder = tmp_path / "images"
    write_images(folder, [(64, 64)] * 4)
    for number, name in enumerate(["s.png", "S.jpg", "a.b.png", "a.b.png.png"]):
        (folder / f"{number}.png").rename(folder / name)
    foreign(folder, "s_0064x0064_sd.npz")
    data = data_of(folder)
    cache, encoded = fill(data)
    assert encoded == 4
    assert_equals_memory(cache, data)
    assert entries(folder) == {
        "s_0064x0064_sd.npz",
        "s.png_0064x0064_sd.npz",
        "S.jpg_0064x0064_sd.npz",
        "a.b_0064x0064_sd.npz",
        "a.b.png.png_0064x0064_sd.npz",
    }
    assert fill(data)[1] == 0


def test_one_image_at_two_sizes_in_one_run(folder):
    records = records_of(folder)
    spec = make_spec(make_subset(folder))
    both = replace(spec, datasets=(*spec.datasets, make_spec(make_subset(folder), resolution=(96, 96)).datasets[0]))
    data = prepare_data(both, [*records, *(replace(record, dataset=1) for record in records)])
    cache, encoded = fill(data)
    assert encoded == 10
    assert_equals_memory(cache, data)
    assert fill(data)[1] == 0


# --- trusting names


def test_names_are_trusted_when_asked_for(folder, data):
    fill(data)
    other_numbers(folder / "1_0064x0064_sd.npz")
    fill(data, vae="b", trust_names=True)
    (folder / "0_0064x0064_sd.npz").unlink()
    cache, encoded = fill(data, vae="b", trust_names=True)
    assert encoded == 1
    cache.get(0, flipped=False)
    cache.get(2, flipped=False)


def test_trusted_entries_of_the_wrong_size_are_refused_in_training(folder, data):
    fill(data)
    cache, encoded = fill(data_of(folder, resolution=(96, 96)), trust_names=True)
    assert encoded == 0
    with pytest.raises(UserError, match="do not fit") as caught:
        cache.get(0, flipped=False)
    assert "--skip_cache_check" in caught.value.problems[0].remedy


# --- several processes


def test_processes_share_the_work(folder, data):
    waited = []
    shares = [Share(rank=rank, world=2, wait=lambda rank=rank: waited.append(rank)) for rank in range(2)]
    assert [fill(data, share=share)[1] for share in shares] == [3, 2]
    assert waited == [0, 1]
    cache, encoded = fill(data)
    assert encoded == 0
    assert_equals_memory(cache, data)


def test_a_process_that_fails_ends_without_waiting(folder, data):
    for path in folder.glob("*.png"):
        truncate(path)
    with pytest.raises(UserError, match="cannot read the image"):
        fill(data, share=Share(world=2, wait=lambda: pytest.fail("it waits")))


SLOW_FILL = """
import sys, time
from pathlib import Path
from tests.library.data.test_disk_cache import AugmentRules, DiskLatentCache, data_of, encode

def slow(pixels):
    time.sleep(float(sys.argv[2]))
    return encode(pixels)

folder = Path(sys.argv[1])
changes = {"flip": {"augment": AugmentRules(flip_aug=True)}, "mask": {"alpha_mask": True}, "": {}}[sys.argv[3]]
DiskLatentCache.fill(data_of(folder, **changes), slow, vae="a", batch_size=1, progress=False)
"""


def start(folder, delay, changes=""):
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_FILL, str(folder), str(delay), changes],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def test_two_processes_fill_one_cache_at_once(folder, data):
    processes = [start(folder, 0.05) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert entries(folder) == NAMES
    cache, encoded = fill(data)
    assert encoded == 0
    assert_equals_memory(cache, data)


def test_two_processes_with_different_needs_fill_one_cache_at_once(folder):
    processes = [start(folder, 0.02, changes) for changes in ("flip", "mask")]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert entries(folder) == NAMES
    mirrored = data_of(folder, augment=AugmentRules(flip_aug=True))
    for data in (mirrored, data_of(folder, alpha_mask=True)):
        fill(data)
    # Neither takes away what the other has made.
    assert fill(mirrored)[1] == 0
    assert fill(data_of(folder, alpha_mask=True))[1] == 0


def test_a_killed_fill_leaves_nothing_that_is_trusted_wrongly(folder, data):
    process = start(folder, 0.5)
    deadline = time.monotonic() + 60
    while not entries(folder) & NAMES and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    whole = len(entries(folder) & NAMES)
    assert 0 < whole < 5
    # What a process leaves that is killed in the middle of writing.
    half = (folder / "0_0064x0064_sd.npz").read_bytes() if "0_0064x0064_sd.npz" in entries(folder) else b"PK"
    (folder / ".writing-0123abcd-4_0064x0064_sd.npz").write_bytes(half[:100])
    cache, encoded = fill(data)
    assert encoded == 5 - whole
    assert_equals_memory(cache, data)


def test_another_run_that_takes_the_name_at_the_same_moment_does_no_harm(folder, data):
    """The other run writes each entry for its own settings just before ours is looked at again."""
    larger = data_of(folder, resolution=(96, 96))

    class Meddling(Counting):
        def __call__(self, pixels):
            if self.images == 4:
                for path in folder.glob("*_sd.npz"):
                    path.unlink()
                fill(larger)
            return super().__call__(pixels)

    counting = Meddling()
    cache = DiskLatentCache.fill(data, counting, vae="a", batch_size=1, progress=False)
    assert_equals_memory(cache, data)
    assert fill(larger)[1] == 0


def test_a_folder_that_cannot_be_written_to_is_named(folder, data, monkeypatch):
    def refuse(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("library.files.os.replace", refuse)
    with pytest.raises(UserError, match="No space left") as caught:
        fill(data)
    assert caught.value.problems[0].where == str(folder)
    assert entries(folder) == set()


# --- upkeep


def test_only_entries_that_nothing_uses_and_old_remains_are_cleaned(folder, data):
    fill(data)
    fill(data_of(folder, resolution=(96, 96)))
    foreign(folder, "other_0064x0064_sd.npz")
    (folder / "gone_0064x0064_sd.npz").write_bytes(b"damaged")
    fresh, old = (folder / f".writing-{mark}-0_0064x0064_sd.npz" for mark in ("01234567", "89abcdef"))
    fresh.write_bytes(b"PK")
    old.write_bytes(b"PK")
    os.utime(old, (1, 1))
    cache, _ = fill(data)
    unused = {path.name for path in unused_files(cache, uses_of(data), progress=False)}
    second = {name for name in entries(folder) if name.count(".") == 2 and not name.startswith(".")}
    assert len(second) == 5
    assert unused == {*second, "gone_0064x0064_sd.npz", old.name}
