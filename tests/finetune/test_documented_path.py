"""The page on preparing data: its commands, typed as they are printed, say what the page says that they say."""

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.fresh import forget_accelerate
from tests.tiny import tiny_ldm

PAGE = (Path(__file__).parents[2] / "docs" / "data_preparation.md").read_text(encoding="utf-8")
SIZES = [(600, 600), (900, 600), (600, 900), (700, 700)]
CAPTIONS = [
    *("a woman in a park", "a cat on a chair", "a red car", "a lady with a hat", "a man and a woman"),
    *(
        "a house by the sea",
        "a person on a bike",
        "two dogs",
        "people at a table",
        "a tree",
        "a female singer",
        "a boat",
    ),
]
FIRST_TAGS = ["1girl, park, shirt, white_shirt, rating:safe", "cat, chair, no_humans, rating:safe"]
WITHOUT_TAGS = 11


def write_images(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, caption in enumerate(CAPTIONS, 1):
        width, height = SIZES[(number - 1) % len(SIZES)]
        small = rng.integers(0, 256, (height // 50, width // 50, 3), dtype=np.uint8)
        image = folder / f"{number:02d}.jpg"
        Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST).save(image)
        image.with_suffix(".caption").write_text(caption)
        if number != WITHOUT_TAGS:
            tags = FIRST_TAGS[number - 1] if number <= len(FIRST_TAGS) else "scenery, no_humans"
            image.with_suffix(".txt").write_text(tags)


def steps() -> list[tuple[list[str], list[str]]]:
    """The commands of the page that are followed by what they print, and the lines of that."""
    found = re.findall(r"```bash\n(python [^`]*?)```\n\n```\n(.*?)```", PAGE, re.DOTALL)
    return [(shlex.split(command.replace("\\\n", " "))[1:], output.splitlines()) for command, output in found]


def test_the_page_is_literally_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "train_data")
    tiny_ldm(tmp_path, "sd1", layers_per_block=1).rename("model.safetensors")
    ran = []
    for (script, *given), output in steps():
        module = script.removesuffix(".py").replace("/", ".")
        trains = module == "fine_tune"
        forget_accelerate()
        capfd.readouterr()
        # What is trained in earnest is tested elsewhere; the plan is the same.
        assert importlib.import_module(module).main([*given, *(["--dry_run"] if trains else [])]) == 0
        out, errors = capfd.readouterr()
        shown = [re.sub(r"^[\d:]+ ", "", line.split("\r")[-1]) for line in [*errors.splitlines(), *out.splitlines()]]
        shown = [line for line in shown if line.strip() and "%|" not in line]
        expected = [line for line in output if not (trains and line.startswith("INFO latent cache"))]
        start = shown.index(expected[0])
        assert shown[start : start + len(expected)] == expected
        ran.append(module)
    assert ran == [
        "finetune.merge_captions_to_metadata",
        "finetune.merge_dd_tags_to_metadata",
        "finetune.clean_captions_and_tags",
        "finetune.prepare_buckets_latents",
        "fine_tune",
    ]
