"""``docs/data_preparation.md`` is run from its first merge to the plan of the training, and shows what was said."""

import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.finetune.runs import ROOT
from tests.tiny import tiny_ldm

PAGE = (ROOT / "docs" / "data_preparation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SIZES = ((640, 640), (640, 640), (480, 720), (720, 480))
CAPTIONS = ("a woman in a park", "a cat on a chair", "a house by a lake", "a cartoon lady with a hat")
TAGS = (
    "1girl, park, shirt, white_shirt, rating:safe",
    "cat, chair, no_humans, rating:safe",
    "house, lake, no_humans, rating:safe",
    "1girl, hat, long_hair, rating:safe",
)
IMAGES = 12


def write_data(folder: Path) -> None:
    """Twelve images with captions and tags, but for the tags of the eleventh."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        width, height = SIZES[number % len(SIZES)]
        colours = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        path = folder / f"{number + 1:02d}.jpg"
        Image.fromarray(colours).resize((width, height)).save(path)
        path.with_suffix(".caption").write_text(CAPTIONS[number % len(CAPTIONS)], encoding="utf-8")
        if number + 1 != IMAGES - 1:
            path.with_suffix(".txt").write_text(TAGS[number % len(TAGS)], encoding="utf-8")


def command(start: str) -> tuple[list[str], str]:
    """The words of the documented command that begins so, and the block that shows what it says."""
    place = next(number for number, (kind, text) in enumerate(BLOCKS) if kind == "bash" and text.startswith(start))
    kind, shown = BLOCKS[place + 1]
    assert kind == "", start
    return shlex.split(BLOCKS[place][1].replace("\\\n", " ")), shown


def said(words: list[str], capfd: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that the command ``words`` writes, without times."""
    assert words[0] == "python"
    main = importlib.import_module(words[1].removesuffix(".py").replace("/", ".")).main
    capfd.readouterr()
    assert main(words[2:]) == 0
    shown = capfd.readouterr()
    return [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in (shown.err + shown.out).splitlines()]


def assert_shown(block: str, lines: list[str]) -> None:
    """The lines of ``block`` stand in ``lines`` one after the other, with nothing but others between."""
    rest = iter(lines)
    for line in block.splitlines():
        assert line in rest, f"{line!r} is not said, or not there:\n" + "\n".join(lines)


def test_every_line_of_the_page_is_what_the_tools_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "train_data")
    tiny_ldm(tmp_path, "sd1", layers_per_block=1).rename(tmp_path / "model.safetensors")
    for tool in ("merge_captions_to_metadata", "merge_dd_tags_to_metadata"):
        words, block = command(f"python finetune/{tool}.py")
        lines = said(words, capfd)
        assert lines == block.splitlines()
    words, block = command("python finetune/clean_captions_and_tags.py")
    changes = said([*words, "--dry_run"], capfd)
    assert_shown(next(text for _, text in BLOCKS if text.startswith("~ ")), changes)
    assert said(words, capfd) == block.splitlines()
    words, block = command("python finetune/prepare_buckets_latents.py")
    lines = said(words, capfd)
    assert_shown(block, lines)
    entry = json.loads(next(text for kind, text in BLOCKS if kind == "json"))
    assert entry.items() <= json.loads((tmp_path / "meta_lat.json").read_text()).items()
    words, block = command("python fine_tune.py")
    used, *plan = block.splitlines()
    assert used == f"INFO latent cache: {IMAGES} entries are used, 0 are made"
    # At 512 pixels a step takes seconds; that training uses the latents is tested with smaller images.
    assert_shown("\n".join(plan), said([*words, "--dry_run"], capfd))
