"""Facts of images are remembered, believed only while the files stay the same, and kept when a check is stopped."""

import os
import time

import pytest

from library.data import file_facts
from library.data.file_facts import read_facts
from tests.library.data.small_set import write_images

LONG_AGO = 1_600_000_000


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_facts, "_WORTH_KEEPING", 1)
    records = write_images(tmp_path / "images", sizes=[(16, 16)] * 6)
    records[2].path.write_bytes(records[2].path.read_bytes()[:-40])
    for record in records:
        os.utime(record.path, (LONG_AGO, LONG_AGO))
    return records


@pytest.fixture
def decoded(monkeypatch):
    names = []
    facts_of = file_facts._facts_of

    def noted(path):
        names.append(path.name)
        return facts_of(path)

    monkeypatch.setattr(file_facts, "_facts_of", noted)
    return names


def test_a_second_check_decodes_nothing_and_says_the_same(records, decoded):
    first = read_facts(records)
    assert len(decoded) == 6
    assert list(first[0]) == [record.path for record in records if record is not records[2]]
    (finding,) = first[1]
    assert finding.where == str(records[2].path)
    decoded.clear()
    assert read_facts(records) == first
    assert decoded == []


def test_a_changed_image_is_decoded_again(records, decoded):
    before, _ = read_facts(records)
    records[0].path.write_bytes(records[1].path.read_bytes() + b"\0")
    decoded.clear()
    facts, _ = read_facts(records)
    assert decoded == [records[0].path.name]
    assert facts[records[0].path].look == before[records[1].path].look
    assert facts[records[0].path].digest != before[records[0].path].digest


def test_an_image_that_cannot_be_reached_is_tried_again(records, decoded):
    content = records[4].path.read_bytes()
    records[4].path.unlink()
    assert len(read_facts(records)[1]) == 2
    records[4].path.write_bytes(content)
    assert len(read_facts(records)[1]) == 1


def test_what_was_decoded_before_a_stop_is_kept(records, monkeypatch, decoded):
    noted = file_facts._facts_of

    def stopping(path):
        if path == records[3].path:
            raise KeyboardInterrupt
        return noted(path)

    with monkeypatch.context() as context:
        context.setattr(file_facts, "_facts_of", stopping)
        with pytest.raises(KeyboardInterrupt):
            read_facts(records)
    decoded.clear()
    read_facts(records)
    assert not {record.path.name for record in records[:3]} & set(decoded)
    assert records[3].path.name in decoded


def test_few_pixels_are_not_remembered(records, monkeypatch, tmp_path):
    monkeypatch.setattr(file_facts, "_WORTH_KEEPING", 6 * 16 * 16 + 1)
    read_facts(records)
    assert not (tmp_path / "cache").exists()


def test_images_are_decoded_side_by_side(records, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    running, most = set(), []
    facts_of = file_facts._facts_of

    def slow(path):
        running.add(path)
        time.sleep(0.02)
        most.append(len(running))
        running.discard(path)
        return facts_of(path)

    monkeypatch.setattr(file_facts, "_facts_of", slow)
    read_facts(records)
    assert max(most) == 2
