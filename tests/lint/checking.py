"""A clean data set to spoil, and the findings of ``--validate_dataset json`` about it."""

import json

import numpy as np
from PIL import Image

import train_network
from library.inspection import validate_dataset
from library.options import parse_options

CAPTIONS = (
    "sks dog, sitting on a meadow, sunny",
    "sks dog, running along the beach",
    "sks dog, asleep on a red sofa, indoors",
    "sks dog, with a ball in its mouth",
    "sks dog, in the snow, winter",
    "sks dog, looking out of a window",
)

CONFIG = """
[general]
enable_bucket = true
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 1

[[datasets]]
resolution = 128
min_bucket_reso = 64
batch_size = 2

[[datasets.subsets]]
image_dir = "images"
class_tokens = "sks dog"
num_repeats = 2
"""


def noise(number, size=(128, 128)):
    """An image like no other number's."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_clean(folder):
    """Six images with captions, and the dataset file; returns the file."""
    images = folder / "images"
    images.mkdir(parents=True)
    for number, caption in enumerate(CAPTIONS):
        noise(number).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(caption, encoding="utf-8")
    config = folder / "dataset.toml"
    config.write_text(CONFIG, encoding="utf-8")
    return config


def findings_of(capsys, *arguments):
    """The findings of a check, and its exit code."""
    options = parse_options(train_network.Options, ["--validate_dataset=json", *arguments], prog="", description="")
    capsys.readouterr()
    code = validate_dataset(options, as_json=True)
    report = json.loads(capsys.readouterr().out)
    findings = report["findings"]
    assert report["errors"] == sum(finding["severity"] == "error" for finding in findings)
    assert report["warnings"] == len(findings) - report["errors"]
    return findings, code
