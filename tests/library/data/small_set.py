"""A small training set on disk, and stand-ins for the tokenizer and the VAE."""

import numpy as np
import torch
from PIL import Image

from library.data.records import ImageRecord
from library.data.setup import prepare_data
from library.data.spec import AugmentRules, BucketRules, CaptionRules, DatasetSpec, DataSpec, SubsetSpec

BUCKETS = BucketRules(enable_bucket=True, min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=8)
SIZES = ((64, 64), (64, 64), (96, 48), (48, 96), (64, 64))
"""Fall into three buckets."""


def make_subset(folder, **changes):
    return SubsetSpec(image_dir=folder, name=folder.name, where="a.toml:1", **changes)


def make_spec(*subsets, batch_size=2, buckets=BUCKETS, resolution=(64, 64)):
    dataset = DatasetSpec(resolution=resolution, batch_size=batch_size, buckets=buckets, subsets=subsets)
    return DataSpec(datasets=(dataset,), where="a.toml")


def write_images(folder, sizes=SIZES, *, subset=0, seed=0, repeats=1, is_reg=False, dataset=0):
    """Images of noise with their records; captions are their names."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((seed, subset, dataset))
    records = []
    for number, (width, height) in enumerate(sizes):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
        records.append(
            ImageRecord(
                folder=folder,
                name=path.name,
                size=(width, height),
                caption=f"image {number}, red, green, blue, tall",
                has_caption_file=True,
                dataset=dataset,
                subset=subset,
                is_reg=is_reg,
                repeats=repeats,
            )
        )
    return records


def make_data(tmp_path, *, repeats=2, augment=None, captions=None, batch_size=2):
    """Five images in one subset."""
    folder = tmp_path / "images"
    subset = make_subset(folder, augment=augment or AugmentRules(), captions=captions or CaptionRules())
    return prepare_data(make_spec(subset, batch_size=batch_size), write_images(folder, repeats=repeats))


def tokenize(caption):
    """One chunk of 77 characters' numbers."""
    codes = [ord(letter) for letter in caption[:77].ljust(77)]
    return torch.tensor([codes]), None


def tokenize_weighted(caption):
    ids, _ = tokenize(caption)
    return ids, torch.full((1, 77), 1.5)


def encode(pixels):
    """Means over 8 x 8 pixels as a latent of 4 channels."""
    small = torch.nn.functional.avg_pool2d(pixels, 8)
    mean = torch.cat([small, small[:, :1]], dim=1)
    return mean, mean.abs() + 0.1
