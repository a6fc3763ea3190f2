"""Latents of the whole training set in memory, encoded once before training (``--cache_latents``).

Mean and standard deviation of the VAE's posterior are kept rather than one sample, so that every use of an image draws
its own, as it does without a cache.
"""

import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Final, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from library.data.images import ImageView, Pixels, load_view, to_tensor
from library.data.setup import TrainingData
from library.data.spec import Size
from library.errors import Problem, UserError, raise_if_any

Encode: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Pixels (B, 3, H, W) in -1..1 -> mean and standard deviation of the posterior, (B, C, h, w), not scaled."""

_MAX_DECODING_THREADS: Final = 4
_BATCHES_AHEAD: Final = 2


class LatentCache:
    """The posterior of every image of the training set; it can be sent to another process."""

    def __init__(
        self, stacks: Mapping[Size, tuple[Tensor, Tensor]], rows: Mapping[tuple[int, bool], tuple[Size, int]]
    ) -> None:
        """A filled cache; see :meth:`fill`.

        Args:
            stacks: Means and standard deviations (N, C, h, w) by bucket.
            rows: Bucket and row by (position of the record, whether mirrored).
        """
        self._stacks = stacks
        self._rows = rows

    def __len__(self) -> int:
        """Number of different latents."""
        return sum(len(mean) for mean, _ in self._stacks.values())

    def get(self, record: int, *, flipped: bool) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C, h, w), float32 on the CPU, of the record at position ``record``."""
        bucket, row = self._rows[record, flipped]
        mean, std = self._stacks[bucket]
        return mean[row], std[row]

    @classmethod
    def fill(cls, data: TrainingData, encode: Encode, *, batch_size: int, progress: bool = True) -> "LatentCache":
        """Encode every image of ``data`` once, and mirrored too where its subset asks for ``flip_aug``.

        Images are decoded ahead by a few threads while a batch is encoded. Every process of a run fills its own cache.

        Args:
            data: The training set, without random crops or colour augmentation.
            encode: The VAE's encoder.
            batch_size: Images encoded at once; a batch never mixes buckets.
            progress: Show a progress bar.

        Raises:
            UserError: Images cannot be read (all of them are named) or encode to values that are not finite.
        """
        uses = _uses(data)
        filling = _Filling(uses, encode)
        problems: list[Problem] = []
        with tqdm(total=len(uses), desc="caching latents", unit="image", disable=not progress) as bar:
            for views, decoded in _decoded_batches(uses, batch_size):
                problems += [problem for one in decoded if isinstance(one, UserError) for problem in one.problems]
                if not problems:
                    images = torch.stack([to_tensor(one) for one in decoded if not isinstance(one, UserError)])
                    filling.add(views, images)
                bar.update(len(views))
        raise_if_any(problems)
        return cls(filling.stacks, filling.rows)


@dataclass(frozen=True, slots=True)
class _Use:
    """The records (by position) that share an image's pixels, and whether one of them is also needed mirrored."""

    records: tuple[int, ...]
    flip: bool


def _uses(data: TrainingData) -> dict[ImageView, _Use]:
    """What to encode, bucket by bucket."""
    records: defaultdict[ImageView, list[int]] = defaultdict(list)
    for number in dict.fromkeys(data.examples):
        rules = data.rules_of(data.records[number]).augment
        assert not rules.random_crop, "refused with the options: a cache knows one crop"
        assert not rules.color_aug, "refused with the options: a cache knows one colour"
        records[data.view(number)].append(number)
    return {
        view: _Use(
            tuple(records[view]), any(data.rules_of(data.records[one]).augment.flip_aug for one in records[view])
        )
        for view in sorted(records, key=lambda view: view.placement.bucket)
    }


def _decoded_batches(
    views: Iterable[ImageView], batch_size: int
) -> Iterator[tuple[list[ImageView], list[Pixels | UserError]]]:
    """Batches of one bucket each, with their pixels; decoded ahead of their use."""
    batches = [
        batch
        for _, group in groupby(views, key=lambda view: view.placement.bucket)
        for batch in _cut(list(group), batch_size)
    ]
    threads = min(_MAX_DECODING_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[tuple[list[ImageView], list[Future[Pixels | UserError]]]] = deque()
        for batch in batches:
            pending.append((batch, [pool.submit(_decoded, view) for view in batch]))
            if len(pending) > _BATCHES_AHEAD:
                ready, futures = pending.popleft()
                yield ready, [future.result() for future in futures]
        for ready, futures in pending:
            yield ready, [future.result() for future in futures]


def _decoded(view: ImageView) -> Pixels | UserError:
    try:
        return load_view(view)
    except UserError as error:
        return error


def _cut(views: list[ImageView], length: int) -> list[list[ImageView]]:
    return [views[start : start + length] for start in range(0, len(views), length)]


class _Filling:
    """A cache in the making.

    The latents of a bucket lie in one tensor each: thousands of small ones would need a handle each in every worker.
    """

    def __init__(self, uses: Mapping[ImageView, _Use], encode: Encode) -> None:
        self.stacks: dict[Size, tuple[Tensor, Tensor]] = {}
        self.rows: dict[tuple[int, bool], tuple[Size, int]] = {}
        self._uses = uses
        self._encode = encode
        self._size = Counter[Size]()
        for view, use in uses.items():
            self._size[view.placement.bucket] += 1 + use.flip
        self._used = Counter[Size]()

    def add(self, views: Sequence[ImageView], images: Tensor) -> None:
        """Encode ``images`` (B, 3, H, W) of ``views``, and mirrored where that is needed."""
        self._add(views, images, flipped=False)
        to_flip = [position for position, view in enumerate(views) if self._uses[view].flip]
        if to_flip:
            self._add([views[position] for position in to_flip], images[to_flip].flip(-1), flipped=True)

    def _add(self, views: Sequence[ImageView], images: Tensor, *, flipped: bool) -> None:
        mean, std = (latents.detach().to("cpu", torch.float32) for latents in self._encode(images))
        _require_finite(views, mean, std)
        bucket = views[0].placement.bucket
        if bucket not in self.stacks:
            rows = self._size[bucket]
            self.stacks[bucket] = (torch.empty(rows, *mean.shape[1:]), torch.empty(rows, *std.shape[1:]))
        first = self._used[bucket]
        self._used[bucket] += len(views)
        for stack, latents in zip(self.stacks[bucket], (mean, std), strict=True):
            stack[first : first + len(views)] = latents
        for row, view in enumerate(views, first):
            for record in self._uses[view].records:
                self.rows[record, flipped] = (bucket, row)


def _require_finite(views: Sequence[ImageView], mean: Tensor, std: Tensor) -> None:
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
