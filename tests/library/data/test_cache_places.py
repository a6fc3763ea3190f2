"""Where entries of the latent cache are written: beside images, and never outside the folders of a data set."""

import json
import logging
import os

import pytest
from PIL import Image

from library.data.cache_upkeep import unused_files
from library.data.disk_cache import DiskLatentCache
from library.data.latent_encoding import uses_of
from library.data.records import scan
from library.data.setup import prepare_data
from tests.library.data.small_set import BUCKETS, encode
from tests.library.data.test_metadata import spec_of


def picture(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), (shade, 0, 0)).save(path)
    return path


def filled(tmp_path, keys, *, image_dir=None, vae="a"):
    metadata = tmp_path / "set" / "meta.json"
    metadata.parent.mkdir(exist_ok=True)
    metadata.write_text(json.dumps({str(key): {"caption": "c"} for key in keys}))
    spec = spec_of(metadata, image_dir or tmp_path / "set" / "images", buckets=BUCKETS)
    records, _ = scan(spec)
    assert len(records) == len(keys)
    data = prepare_data(spec, records)
    return data, DiskLatentCache.fill(data, encode, vae=vae, batch_size=1, progress=False)


def entries(tmp_path):
    return {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.npz")}


def test_entries_of_images_below_the_folders_lie_beside_them(tmp_path):
    for name in ("set/images/a.png", "set/images/deep/b.png", "set/other/c.png"):
        picture(tmp_path / name)
    filled(tmp_path, ["a", "deep/b.png", tmp_path / "set" / "other" / "c.png"])
    assert entries(tmp_path) == {
        "set/images/a_0064x0064_sd.npz",
        "set/images/deep/b_0064x0064_sd.npz",
        "set/other/c_0064x0064_sd.npz",
    }


@pytest.mark.parametrize("way", ["absolute", "upwards", "link"])
def test_an_image_outside_is_read_and_its_entry_written_inside(tmp_path, way, caplog):
    outside = picture(tmp_path / "outside" / "a.png")
    (tmp_path / "set" / "images").mkdir(parents=True)
    keys = {"absolute": outside, "upwards": "../../outside/a.png", "link": "link/a.png"}
    if way == "link":
        os.symlink(outside.parent, tmp_path / "set" / "images" / "link")
    with caplog.at_level(logging.INFO):
        data, cache = filled(tmp_path, [keys[way]])
    (name,) = entries(tmp_path)
    assert name.startswith("set/images/a-")
    assert name.endswith("_0064x0064_sd.npz")
    assert "1 images lie outside the folders of their metadata file (a.png); their entries go to" in caplog.text
    assert cache.get(0, flipped=False)[0].shape == (4, 8, 8)
    # Found again, whichever way the image is named.
    before = (tmp_path / name).stat().st_mtime_ns
    filled(tmp_path, [outside])
    assert (tmp_path / name).stat().st_mtime_ns == before
    assert entries(tmp_path) == {name}
    assert unused_files(cache, uses_of(data), progress=False) == []


def test_images_of_one_name_outside_do_not_share_an_entry(tmp_path):
    (tmp_path / "set" / "images").mkdir(parents=True)
    paths = [picture(tmp_path / folder / "a.png", shade) for folder, shade in (("one", 10), ("two", 200))]
    _, cache = filled(tmp_path, paths)
    assert len(entries(tmp_path)) == 2
    first, second = (cache.get(number, flipped=False)[0] for number in range(2))
    assert first[0, 0, 0] < second[0, 0, 0]


def test_entries_outside_are_read_but_neither_restamped_nor_cleaned(tmp_path):
    outside = picture(tmp_path / "outside" / "a.png")
    # Another data set has them as its own.
    filled(tmp_path, [outside], image_dir=outside.parent)
    (name,) = entries(tmp_path)
    assert name == "outside/a_0064x0064_sd.npz"
    before = (tmp_path / name).read_bytes()
    (tmp_path / "set" / "images").mkdir()
    os.utime(outside, (1, 1))
    data, cache = filled(tmp_path, [outside])
    assert entries(tmp_path) == {name}
    assert (tmp_path / name).read_bytes() == before
    other = DiskLatentCache(data, vae="b")
    assert unused_files(other, uses_of(data), progress=False) == []


def test_a_folder_of_images_writes_through_a_link_to_an_image_beside_the_link(tmp_path):
    outside = picture(tmp_path / "outside" / "a.png")
    (tmp_path / "set" / "images").mkdir(parents=True)
    os.symlink(outside, tmp_path / "set" / "images" / "a.png")
    filled(tmp_path, ["a.png"])
    assert entries(tmp_path) == {"set/images/a_0064x0064_sd.npz"}


def test_a_link_in_the_place_of_an_entry_is_replaced_and_not_followed(tmp_path):
    picture(tmp_path / "set" / "images" / "a.png")
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    os.symlink(victim, tmp_path / "set" / "images" / "a_0064x0064_sd.npz")
    filled(tmp_path, ["a.png"])
    assert victim.read_bytes() == b"mine"


def test_without_an_image_folder_entries_go_to_that_of_the_metadata_file(tmp_path):
    outside = picture(tmp_path / "outside" / "a.png")
    filled(tmp_path, [outside], image_dir=tmp_path / "nowhere")
    (name,) = entries(tmp_path)
    assert name.startswith("set/a-")


def test_the_entry_of_an_image_with_a_very_long_name_has_room_for_the_rest(tmp_path):
    folder = tmp_path / "set" / "images"
    # 255 bytes each, in 89 letters of which the last one differs.
    names = [f"{'図' * 83}{end}" for end in ("aa", "ab")]
    for shade, name in enumerate(names):
        picture(folder / f"{name}.png", shade)
    data, cache = filled(tmp_path, names)
    found = {name.removeprefix("set/images/") for name in entries(tmp_path)}
    assert len(found) == 2
    assert all(name.startswith("図" * 70) and name.endswith("_0064x0064_sd.npz") for name in found)
    assert all(len(name.encode()) <= 255 for name in found)
    assert not any(verdict.reason for verdict in cache.judge_all(uses_of(data), progress=False).values())
    # With other settings their entries go beside, under names of their own.
    other_data, other = filled(tmp_path, names, vae="b")
    assert len(entries(tmp_path)) == 4
    assert not any(verdict.reason for verdict in other.judge_all(uses_of(other_data), progress=False).values())
    assert not any(verdict.reason for verdict in cache.judge_all(uses_of(data), progress=False).values())
    assert len(unused_files(cache, uses_of(data), progress=False)) == 2
