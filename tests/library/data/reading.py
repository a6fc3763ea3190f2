"""Write small data sets and read them as the options would."""

import json
from pathlib import Path

from PIL import Image

from library.data.config import read_spec
from library.data.options import CacheOptions, CaptionOptions, ImageOptions, SourceOptions
from library.data.support import NETWORK

GOLDEN = Path(__file__).parents[2] / "golden"


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def write(tmp_path, text, name="data.toml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def read(
    path=None,
    *,
    train=None,
    reg=None,
    in_json=None,
    repeats=1,
    masks=None,
    masked=False,
    cache=False,
    captions=None,
    support=NETWORK,
    **image,
):
    source = SourceOptions(
        dataset_config=path,
        train_data_dir=train,
        reg_data_dir=reg,
        in_json=in_json,
        dataset_repeats=repeats,
        conditioning_data_dir=masks,
        masked_loss=masked,
    )
    return read_spec(
        source,
        ImageOptions(**({"resolution": (512, 512)} | image)),
        captions or CaptionOptions(),
        CacheOptions(cache_latents=cache),
        support=support,
    )


def errors(findings):
    return [finding for finding in findings if finding.severity == "error"]


def make_images(folder, count=1, size=(64, 64)):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", size).save(folder / f"{number}.png")
