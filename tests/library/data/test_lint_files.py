"""Copies, look-alikes and damage."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data.file_facts import read_facts
from library.data.lint_files import lint_copies, near_pairs
from tests.library.data.small_set import write_images


def named(**looks):
    return {Path(name): look for name, look in looks.items()}


@pytest.mark.parametrize("bits", [(), (0,), (5, 21, 37), (58, 59, 60, 61, 62, 63), (0, 9, 18, 27, 36, 45)])
def test_up_to_six_bits_are_near(bits):
    look = 0x0123_4567_89AB_CDEF
    other = look ^ sum(1 << bit for bit in bits)
    assert near_pairs(named(a=look, b=other)) == [(Path("a"), Path("b"))]


def test_seven_bits_are_not_near():
    assert near_pairs(named(a=0, b=0b111_1111)) == []
    assert near_pairs(named(a=0, b=sum(1 << bit for bit in range(0, 63, 9)))) == []


def test_the_pairs_are_those_of_a_full_comparison():
    rng = np.random.default_rng(5)
    base = [int(value) for value in rng.integers(0, 2**63, 40)]
    near = [value ^ (1 << int(bit)) for value, bit in zip(base, rng.integers(0, 63, 40), strict=True)]
    looks = {Path(str(number)): look for number, look in enumerate(base + near)}
    assert near_pairs(looks) == [(Path(str(number)), Path(str(number + 40))) for number in range(40)]


def test_one_image_in_many_versions_is_paired_with_the_first():
    pairs = near_pairs(named(a=0, b=1, c=2, d=4))
    assert pairs == [(Path("a"), Path(other)) for other in "bcd"]


def test_a_resized_recompressed_image_looks_the_same(tmp_path):
    records = write_images(tmp_path, sizes=[(64, 64)] * 2)
    smooth = Image.open(records[0].path).resize((6, 6)).resize((300, 300), Image.Resampling.BICUBIC)
    smooth.save(records[0].path)
    smooth.resize((200, 200)).save(records[1].path, format="JPEG", quality=70)
    facts, findings = read_facts(records)
    assert findings == []
    first, second = (facts[record.path] for record in records)
    assert (first.look ^ second.look).bit_count() <= 6
    assert first.digest != second.digest
    (finding,) = lint_copies(records, facts, "here")
    assert "0.png and 1.png" in finding.what


def test_noise_does_not_look_the_same(tmp_path):
    records = write_images(tmp_path, sizes=[(64, 64)] * 12)
    assert list(lint_copies(records, read_facts(records)[0], "here")) == []


def test_many_copies_are_counted(tmp_path):
    records = write_images(tmp_path, sizes=[(64, 64)] * 14)
    for number in range(7):
        records[number + 7].path.write_bytes(records[number].path.read_bytes())
    findings = list(lint_copies(records, read_facts(records)[0], "here"))
    assert len(findings) == 6
    assert findings[-1].what.startswith("2 more images have copies")


def test_facts_of_blank_transparent_turned_and_animated(tmp_path):
    records = write_images(tmp_path, sizes=[(16, 16)] * 5)
    noise = Image.open(records[0].path).convert("RGB")
    Image.new("RGB", (16, 16), "red").save(records[1].path)
    clear = noise.convert("RGBA")
    clear.putpixel((0, 0), (0, 0, 0, 0))
    clear.save(records[2].path)
    exif = Image.Exif()
    exif[0x0112] = 3
    noise.save(records[3].path, format="JPEG", exif=exif)
    noise.save(records[4].path, format="WEBP", save_all=True, append_images=[clear.convert("RGB")], lossless=True)
    facts = [read_facts(records)[0][record.path] for record in records]
    assert [fact.is_blank for fact in facts] == [False, True, False, False, False]
    assert [fact.is_transparent for fact in facts] == [False, False, True, False, False]
    assert [fact.is_turned for fact in facts] == [False, False, False, True, False]
    assert [fact.frames for fact in facts] == [1, 1, 1, 1, 2]


def test_one_colour_is_blank_although_a_lossy_format_blurs_it(tmp_path):
    records = write_images(tmp_path, sizes=[(16, 16)] * 2)
    for record, levels in zip(records, (2, 3), strict=True):
        image = Image.new("RGB", (16, 16), (200, 100, 50))
        image.putpixel((3, 3), (200, 100 + levels, 50))
        image.save(record.path)
    assert [read_facts(records)[0][record.path].is_blank for record in records] == [True, False]


def test_an_opaque_alpha_channel_is_not_transparent(tmp_path):
    records = write_images(tmp_path, sizes=[(16, 16)])
    Image.open(records[0].path).convert("RGBA").save(records[0].path)
    assert not read_facts(records)[0][records[0].path].is_transparent
