"""What a latent cache is made of: each picture that training uses, decoded ahead and encoded once.

Mean and standard deviation of the VAE's posterior are kept rather than one sample, so that every use of an image draws
its own, as it does without a cache.
"""

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Final, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from library.data.cache_entry import Entry
from library.data.images import OPAQUE, ImageView, LoadedImage, Pixels, load_image, to_tensor
from library.data.latent_files import is_latent_file
from library.data.setup import TrainingData
from library.errors import Problem, UserError, raise_if_any

Encode: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Pixels (B, 3, H, W) in -1..1 -> mean and standard deviation of the posterior, (B, C, h, w), not scaled."""

Load: TypeAlias = Callable[[ImageView], LoadedImage]
"""Reads an image at the size of its bucket."""

MAX_READING_THREADS: Final = 4
_BATCHES_AHEAD: Final = 2


class LatentSource(Protocol):
    """A filled cache; it can be sent to another process."""

    def get(self, record: int, *, flipped: bool) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C, h, w), float32 on the CPU, of the record at position ``record``."""

    def opacity(self, record: int) -> Pixels | None:
        """The opacity that is kept with the latents of the record, (height, width) in 0..255; None where it is not."""


@dataclass(frozen=True, slots=True)
class Use:
    """The records (by position) that share an image's pixels.

    Attributes:
        records: The positions.
        flip: One of them is also needed mirrored.
        mask: One of them is masked by its transparency.
    """

    records: tuple[int, ...]
    flip: bool
    mask: bool = False


@dataclass(frozen=True, slots=True)
class Posterior:
    """The posterior of one image, each tensor (C, h, w), float32 on the CPU.

    Attributes:
        mean: Its mean.
        std: Its standard deviation.
        mirrored: The two of the mirrored image, where that is needed.
        opacity: (height, width) uint8 at the size of the bucket, where that is needed.
    """

    mean: Tensor
    std: Tensor
    mirrored: tuple[Tensor, Tensor] | None = None
    opacity: Pixels | None = None


def uses_of(data: TrainingData) -> dict[ImageView, Use]:
    """What to encode, bucket by bucket: every image that is trained on."""
    return _uses(data, [number for number in dict.fromkeys(data.examples) if not _is_file(data, number)])


def latent_files_of(data: TrainingData) -> dict[ImageView, Use]:
    """The records that have latents instead of an image, bucket by bucket."""
    return _uses(data, [number for number in dict.fromkeys(data.examples) if _is_file(data, number)])


def file_pair(entry: Entry, view: ImageView, *, flipped: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C, h, w) in a file of latents that takes the place of an image.

    Raises:
        UserError: The file has been changed since it was checked.
    """
    pair = entry.pair(flipped=flipped)
    if pair is None or not entry.fits(view.placement.bucket):
        raise UserError("the latents were changed during the run", where=str(view.path), remedy="Start again.")
    return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])


def _is_file(data: TrainingData, number: int) -> bool:
    return is_latent_file(data.records[number].name)


def _uses(data: TrainingData, numbers: Iterable[int]) -> dict[ImageView, Use]:
    records: defaultdict[ImageView, list[int]] = defaultdict(list)
    for number in numbers:
        rules = data.rules_of(data.records[number]).augment
        assert not rules.random_crop, "refused with the options: a cache knows one crop"
        assert not rules.color_aug, "refused with the options: a cache knows one colour"
        records[data.view(number)].append(number)
    return {
        view: Use(
            tuple(records[view]),
            flip=any(data.rules_of(data.records[one]).augment.flip_aug for one in records[view]),
            mask=any(data.masked_by_opacity(one) for one in records[view]),
        )
        for view in sorted(records, key=lambda view: view.placement.bucket)
    }


def encoded(
    uses: Mapping[ImageView, Use],
    encode: Encode,
    *,
    batch_size: int,
    progress: bool,
    load: Load = load_image,
    threads: int | None = None,
) -> Iterator[tuple[ImageView, Posterior]]:
    """Encode every image of ``uses`` once, and mirrored too where that is needed.

    Images are decoded ahead by a few threads while a batch is encoded; a batch never mixes buckets. After the first
    image that cannot be read the rest is only read, so that all of them can be named.

    Args:
        uses: The images, those of a bucket together.
        encode: The VAE's encoder.
        batch_size: Images encoded at once.
        progress: Show a progress bar.
        load: Reads an image; called in threads.
        threads: How many; a few when absent.

    Raises:
        UserError: Images cannot be read (all of them are named) or encode to values that are not finite.
    """
    problems: list[Problem] = []
    with tqdm(total=len(uses), desc="caching latents", unit="image", disable=not progress) as bar:
        for views, decoded in _decoded_batches(uses, batch_size, load, threads or _reading_threads()):
            problems += [problem for one in decoded if isinstance(one, UserError) for problem in one.problems]
            if not problems:
                loaded = [one for one in decoded if not isinstance(one, UserError)]
                yield from zip(views, _posteriors(views, loaded, uses, encode), strict=True)
            bar.update(len(views))
    raise_if_any(problems)


def _posteriors(
    views: list[ImageView], loaded: list[LoadedImage], uses: Mapping[ImageView, Use], encode: Encode
) -> list[Posterior]:
    images = torch.stack([to_tensor(one.rgb) for one in loaded])
    mean, std = _checked(views, encode(images))
    flipped = [position for position, view in enumerate(views) if uses[view].flip]
    mirrored: dict[int, tuple[Tensor, Tensor]] = {}
    if flipped:
        pair = _checked([views[position] for position in flipped], encode(images[flipped].flip(-1)))
        mirrored = dict(zip(flipped, zip(*pair, strict=True), strict=True))
    return [
        Posterior(mean[row], std[row], mirrored.get(row), _opacity(loaded[row]) if uses[view].mask else None)
        for row, view in enumerate(views)
    ]


def _opacity(image: LoadedImage) -> Pixels:
    """The opacity of an image: full, where it knows no transparency."""
    return np.full(image.rgb.shape[:2], OPAQUE, np.uint8) if image.opacity is None else image.opacity


def _decoded_batches(
    views: Iterable[ImageView], batch_size: int, load: Load, threads: int
) -> Iterator[tuple[list[ImageView], list[LoadedImage | UserError]]]:
    """Batches of one bucket each, with their pixels; decoded ahead of their use."""

    def decoded(view: ImageView) -> LoadedImage | UserError:
        try:
            return load(view)
        except UserError as error:
            return error

    batches = [
        batch
        for _, group in groupby(views, key=lambda view: view.placement.bucket)
        for batch in _cut(list(group), batch_size)
    ]
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[tuple[list[ImageView], list[Future[LoadedImage | UserError]]]] = deque()
        for batch in batches:
            pending.append((batch, [pool.submit(decoded, view) for view in batch]))
            if len(pending) > _BATCHES_AHEAD:
                ready, futures = pending.popleft()
                yield ready, [future.result() for future in futures]
        for ready, futures in pending:
            yield ready, [future.result() for future in futures]


def _reading_threads() -> int:
    return min(MAX_READING_THREADS, os.cpu_count() or 1)


def _cut(views: list[ImageView], length: int) -> list[list[ImageView]]:
    return [views[start : start + length] for start in range(0, len(views), length)]


def _checked(views: list[ImageView], posterior: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Both tensors in float32 on the CPU, if they are finite."""
    mean, std = (latents.detach().to("cpu", torch.float32) for latents in posterior)
    raise_if_any(
        [
            Problem(
                "the VAE encodes the image to values that are not finite",
                str(view.path),
                "Use --no_half_vae, or another --vae; if it is this image alone, replace it.",
            )
            for view, one_mean, one_std in zip(views, mean, std, strict=True)
            if not bool(torch.isfinite(one_mean).all() and torch.isfinite(one_std).all())
        ]
    )
    return mean, std
