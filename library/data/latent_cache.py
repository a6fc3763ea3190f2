"""Latents of the whole training set in memory, encoded once before training (``--cache_latents``)."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from library.data.images import ImageView
from library.data.latent_encoding import Encode, Posterior, Use, encoded, uses_of
from library.data.setup import TrainingData
from library.data.spec import Size


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

        Every process of a run fills its own cache.

        Args:
            data: The training set, without random crops or colour augmentation.
            encode: The VAE's encoder.
            batch_size: Images encoded at once; a batch never mixes buckets.
            progress: Show a progress bar.

        Raises:
            UserError: Images cannot be read (all of them are named) or encode to values that are not finite.
        """
        uses = uses_of(data)
        filling = _Filling(uses)
        for view, posterior in encoded(uses, encode, batch_size=batch_size, progress=progress):
            filling.add(view, posterior)
        return cls(filling.stacks, filling.rows)


class _Filling:
    """A cache in the making.

    The latents of a bucket lie in one tensor each: thousands of small ones would need a handle each in every worker.
    """

    def __init__(self, uses: Mapping[ImageView, Use]) -> None:
        self.stacks: dict[Size, tuple[Tensor, Tensor]] = {}
        self.rows: dict[tuple[int, bool], tuple[Size, int]] = {}
        self._uses = uses
        self._size = Counter[Size]()
        for view, use in uses.items():
            self._size[view.placement.bucket] += 1 + use.flip
        self._used = Counter[Size]()

    def add(self, view: ImageView, posterior: Posterior) -> None:
        """Keep the posterior of ``view``."""
        self._add(view, (posterior.mean, posterior.std), flipped=False)
        if posterior.mirrored is not None:
            self._add(view, posterior.mirrored, flipped=True)

    def _add(self, view: ImageView, pair: tuple[Tensor, Tensor], *, flipped: bool) -> None:
        bucket = view.placement.bucket
        if bucket not in self.stacks:
            rows = self._size[bucket]
            mean, std = (torch.empty(rows, *latents.shape) for latents in pair)
            self.stacks[bucket] = (mean, std)
        row = self._used[bucket]
        self._used[bucket] += 1
        for stack, latents in zip(self.stacks[bucket], pair, strict=True):
            stack[row] = latents
        for record in self._uses[view].records:
            self.rows[record, flipped] = (bucket, row)
